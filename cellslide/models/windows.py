"""Attention of tokens on a grid to those near them, computed window by window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Edge of a window of queries, in tokens: with a radius of 3 such a window reads three times as many keys.
BLOCK = 8


@dataclass(frozen=True, slots=True)
class Windows:
    """Attention within a radius, as windows of queries with the keys around them: what a full mask gives, for less.

    queries  int64 (n, BLOCK²), tokens of each window; what lies beyond the grid repeats its edge.
    keys     int64 (n, (BLOCK + 2 radius)²), the tokens that any of them may see.
    mask     bool (n, BLOCK², (BLOCK + 2 radius)²), which it sees.
    place    int64 (N,), where each token stands in `queries`, flattened.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    place: Tensor

    @classmethod
    def of(cls, grid_hw: tuple[int, int], radius: int, device: torch.device) -> Windows:
        """Return the windows of a grid of (H, W) tokens, row-major."""
        inner = [_starts(n, device)[:, None] + torch.arange(BLOCK, device=device) for n in grid_hw]
        # A window that hangs over the edge repeats the last token: a query that sees no key would give NaN.
        inner = [places.clamp(max=n - 1) for places, n in zip(inner, grid_hw, strict=True)]
        reach = torch.arange(-radius, BLOCK + radius, device=device)
        outer = [_starts(n, device)[:, None] + reach for n in grid_hw]
        queries, keys = (_numbers(places, grid_hw) for places in (inner, outer))
        near = [
            ((o[:, None] - i[:, :, None]).abs() <= radius) & ((o >= 0) & (o < n))[:, None]
            for i, o, n in zip(inner, outer, grid_hw, strict=True)
        ]  # (windows along the axis, BLOCK, reach)
        rows, cols = near[0][:, None, :, None, :, None], near[1][None, :, None, :, None, :]
        mask = (rows & cols).flatten(4).flatten(2, 3).flatten(0, 1)
        return cls(queries, keys, mask, _places(grid_hw, device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with queries, keys and values (B, heads, N, d) of all tokens; returns (B, heads, N, d)."""
        b, heads, _, d = q.shape
        q, k, v = (
            t.index_select(2, index.flatten()).unflatten(2, index.shape).transpose(1, 2).flatten(0, 1)
            for t, index in ((q, self.queries), (k, self.keys), (v, self.keys))
        )  # (B * n, heads, tokens of a window, d)
        mask = self.mask[None, :, None].expand(b, -1, heads, -1, -1).flatten(0, 1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x.unflatten(0, (b, -1)).transpose(1, 2).reshape(b, heads, -1, d)
        return x.index_select(2, self.place)


def _starts(n: int, device: torch.device) -> Tensor:
    return torch.arange(0, n, BLOCK, device=device)


def _numbers(places: Sequence[Tensor], grid_hw: tuple[int, int]) -> Tensor:
    """Return the tokens (windows, tokens of one) of rows and columns (windows along the axis, tokens along it)."""
    rows, cols = (p.clamp(0, n - 1) for p, n in zip(places, grid_hw, strict=True))
    return (rows[:, None, :, None] * grid_hw[1] + cols[None, :, None, :]).flatten(2).flatten(0, 1)


def _places(grid_hw: tuple[int, int], device: torch.device) -> Tensor:
    """Return where each token of the grid stands in windows of BLOCK by BLOCK, one after another."""
    row, col = (torch.arange(n, device=device) for n in grid_hw)
    across = -(-grid_hw[1] // BLOCK)
    window = (row // BLOCK)[:, None] * across + col // BLOCK
    return (window * BLOCK**2 + (row % BLOCK)[:, None] * BLOCK + col % BLOCK).flatten()
