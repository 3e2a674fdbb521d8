"""Layers of deformable detectors: attention at reference boxes, encoder and decoder layers, sine positions.

Boxes are (cx, cy, w, h) in 0..1 of the valid image. Names of parameters are those of the published checkpoints. What
ONNX or autocast would round (boxes, sampling places) is kept in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellslide.models.layers import MSDeformAttn, places_around, sample_deformable, softmax_of_few

Shapes = Sequence[tuple[int, int]]
TEMPERATURE = 10_000.0


@dataclass(frozen=True, slots=True)
class Memory:
    """What an encoder says of B images: tokens of all levels one after the other, each level row by row.

    tokens        (B, S, d).
    shapes        (H, W) of each level.
    valid_ratios  (B, L, 2), the valid share of the width and height of each level.
    padding       bool (B, S), True at padding, or None where nothing is padded.
    """

    tokens: Tensor
    shapes: tuple[tuple[int, int], ...]
    valid_ratios: Tensor
    padding: Tensor | None = None


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and scale are fixed; eps 1e-5."""

    def __init__(self, num_features: int, eps: float = 1e-5, **where: Any) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, **where))
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


class BoxMlp(nn.Module):
    """Three linear layers with ReLU between, to changes of a box: at first none, but for `size` added to the sides."""

    def __init__(self, dim: int, size: float = 0.0) -> None:
        super().__init__()
        last = nn.Linear(dim, 4)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.constant_(last.bias[2:], size)
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), last])

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))


def class_head(dim: int, n_classes: int) -> nn.Linear:
    """Return a linear layer to logits that starts at a probability of 0.01, so that the many empty queries agree."""
    head = nn.Linear(dim, n_classes)
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


class BoxDeformAttn(MSDeformAttn):
    """Deformable attention whose reference may be a box, and which may be held inside it.

    free         a point: (x, y) + (dx, dy) / (W_l, H_l); a box: (x, y) + (dx, dy) / K * 0.5 (w, h)
                 (Deformable DETR, eq. 3 and A.4).
    constrained  (x, y) + 0.5 tanh(dx, dy) (w, h), so that no sample leaves the box (CellDETR, eq. 4).
    """

    def __init__(self, dim: int, n_levels: int, n_heads: int, n_points: int, constrained: bool = False) -> None:
        super().__init__(dim, n_levels, n_heads, n_points)
        self.constrained = constrained

    def attend(self, query: Tensor, reference: Tensor, memory: Memory, value: Tensor | None = None) -> Tensor:
        """Attend from `query` (B, Q, d) at `reference` (B, Q, 2 or 4) into `value`, by default the memory's tokens."""
        value = memory.tokens if value is None else value
        b, q, _ = query.shape
        heads, levels, points = self.n_heads, self.n_levels, self.n_points
        v = self.value_proj(value)
        if memory.padding is not None:
            v = v.masked_fill(memory.padding[..., None], 0.0)
        offsets = self.sampling_offsets(query).view(b, q, heads, levels, points, 2).float()
        weights = softmax_of_few(self.attention_weights(query).view(b, q, heads, levels * points))
        places = self._places(offsets, reference.float(), memory)
        # In half precision a place would be off by pixels.
        v = v.float().view(b, value.shape[1], heads, -1)
        sampled = sample_deformable(v, memory.shapes, places, weights.view(b, q, heads, levels, points))
        return self.output_proj(sampled.to(query.dtype))

    def _places(self, offsets: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        ratios = memory.valid_ratios
        if reference.shape[-1] == 4:
            ratios = torch.cat([ratios, ratios], -1)
        at = (reference[:, :, None] * ratios[:, None])[:, :, None, :, None]  # B, Q, 1, levels, 1, 2 or 4
        if reference.shape[-1] == 2:
            return places_around(at, offsets, memory.shapes)
        if self.constrained:
            return at[..., :2] + 0.5 * torch.tanh(offsets) * at[..., 2:]
        return at[..., :2] + offsets / self.n_points * 0.5 * at[..., 2:]


class FeedForward(nn.Module):
    """The two linear layers of a post-norm layer; a base class, so that their names stand in the layer itself."""

    linear1: nn.Linear
    linear2: nn.Linear

    def _add_ffn(self, dim: int, hidden: int, dropout: float) -> None:
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def _ffn(self, x: Tensor) -> Tensor:
        return x + self.drop(self.linear2(self.drop(F.relu(self.linear1(x)))))


class EncoderLayer(FeedForward):
    """Deformable self-attention over all tokens, then the two linear layers, each with its norm behind it."""

    def __init__(self, dim: int, hidden: int, n_levels: int, n_heads: int, n_points: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = BoxDeformAttn(dim, n_levels, n_heads, n_points)
        self.norm1 = nn.LayerNorm(dim)
        self._add_ffn(dim, hidden, dropout)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, memory: Memory) -> Tensor:
        x = self.norm1(x + self.drop(self.self_attn.attend(x + positions, centres, memory, x)))
        return self.norm2(self._ffn(x))


class DecoderLayer(FeedForward):
    """Self-attention between queries, deformable attention into the memory, two linear layers; norms behind each.

    constrained  cross-attention stays inside the reference box.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        n_levels: int,
        n_heads: int,
        n_points: int,
        dropout: float,
        constrained: bool = False,
    ) -> None:
        super().__init__()
        self.cross_attn = BoxDeformAttn(dim, n_levels, n_heads, n_points, constrained)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, n_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self._add_ffn(dim, hidden, dropout)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        return self.look(self.compare(x, positions), positions, reference, memory)

    def compare(self, x: Tensor, positions: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Self-attention of queries (B, N, d); `mask` bool (B, N, N), True where a row may not see a column."""
        keys = x if positions is None else x + positions
        if mask is not None:
            mask = mask.repeat_interleave(self.self_attn.num_heads, dim=0)
        seen = self.self_attn(keys, keys, x, attn_mask=mask, need_weights=False)[0]
        return self.norm2(x + self.drop(seen))

    def look(self, x: Tensor, positions: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Cross-attention at `reference` (B, N, 2 or 4), then the linear layers."""
        x = self.norm1(x + self.drop(self.cross_attn.attend(x + positions, reference, memory)))
        return self.norm3(self._ffn(x))


def draw_layers(module: nn.Module) -> None:
    """Draw the linear layers of all encoder and decoder layers in `module` as Deformable DETR does."""
    for part in module.modules():
        if isinstance(part, FeedForward):
            nn.init.xavier_uniform_(part.linear1.weight)
            nn.init.xavier_uniform_(part.linear2.weight)
        if isinstance(part, nn.MultiheadAttention):
            nn.init.xavier_uniform_(part.in_proj_weight)
            nn.init.xavier_uniform_(part.out_proj.weight)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of `x` in 0..1, each side of it held above `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def _waves(x: Tensor, n: int) -> Tensor:
    """Return sines and cosines in turn, (..., n), of `x` (...) in radians."""
    place = torch.arange(n, dtype=torch.float32, device=x.device)
    angles = x[..., None] / TEMPERATURE ** (2 * torch.div(place, 2, rounding_mode="floor") / n)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def sine_positions(padding: Tensor, dim: int) -> Tensor:
    """Return sine positions (B, H * W, dim), half of y and half of x, of a level with `padding` bool (B, H, W).

    Pixels count from 1 and are divided by the last valid one, as in DETR: no half-pixel offset.
    """
    valid = (~padding).float()
    y, x = valid.cumsum(1), valid.cumsum(2)
    y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.cat([_waves(y, dim // 2), _waves(x, dim // 2)], dim=-1).flatten(1, 2)


def box_positions(boxes: Tensor, dim: int) -> Tensor:
    """Return sine positions (B, N, 4 * dim) of boxes (B, N, 4)."""
    return _waves(boxes * (2 * math.pi), dim).flatten(-2)


def token_centres(shapes: Shapes, valid_ratios: Tensor) -> Tensor:
    """Return the centres (B, S, 2) of all tokens in 0..1 of the valid image."""
    centres = []
    for level, (h, w) in enumerate(shapes):
        ys = torch.arange(h, dtype=torch.float32, device=valid_ratios.device) + 0.5
        xs = torch.arange(w, dtype=torch.float32, device=valid_ratios.device) + 0.5
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        grid = torch.stack([x.reshape(-1) / w, y.reshape(-1) / h], -1)
        centres.append(grid[None] / valid_ratios[:, level, None])
    return torch.cat(centres, dim=1)
