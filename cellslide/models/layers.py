"""Layers that several models share: ViT blocks, deformable attention, convolution blocks, position embeddings.

Names and shapes of parameters follow the published checkpoints, so that state dicts load without renaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellslide.geometry import kernels
from cellslide.models.windows import Windows

# Queries are independent, so they are sampled in chunks: the sampled tensor of 86,016 queries (a 1024² tile) would
# take 704 MB in float32, twice over.
QUERY_CHUNK = 16_384


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of whole samples during training."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask / keep


class LayerScale(nn.Module):
    """Per-channel scale of a residual branch (CaiT, eq. 7)."""

    def __init__(self, dim: int, init_value: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, C); `near` says which keys a query sees, None: all."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, near: Windows | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v) if near is None else near.attend(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    """Two linear layers with exact GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; `init_values` None leaves LayerScale out (and its keys)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        mlp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio)) if mlp is None else mlp
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, near: Windows | None = None) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), near)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) to tokens (B, H/p * W/p, C), row-major."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def resample_abs_pos_embed(pos_embed: Tensor, grid_hw: tuple[int, int], n_prefix: int = 1) -> Tensor:
    """Resize a position embedding (1, prefix + g², C) to a grid of (H, W) tokens.

    Antialiased bicubic in float32, as timm does; torch's antialiased kernel differs from its plain one even when
    enlarging, so the flag matters for parity.
    """
    prefix, grid = pos_embed[:, :n_prefix], pos_embed[:, n_prefix:]
    side = round(grid.shape[1] ** 0.5)
    if (side, side) == grid_hw:
        return pos_embed
    grid = grid.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=grid_hw, mode="bicubic", antialias=True)
    grid = grid.permute(0, 2, 3, 1).reshape(1, grid_hw[0] * grid_hw[1], -1).to(pos_embed.dtype)
    return torch.cat([prefix, grid], dim=1)


def sample_deformable(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable sampling with `grid_sample` (Deformable DETR, eq. 3).

    value      (B, S, heads, d), S = sum of H * W over `shapes`, level by level, row-major.
    locations  (B, Q, heads, levels, points, 2), (x, y) in [0, 1]; outside is zero.
    weights    (B, Q, heads, levels, points).
    Returns (B, Q, heads * d). On a CPU, where no gradient is asked for, a compiled loop does it.
    """
    if _compiled_here(value):
        return _sample_compiled(value, shapes, locations, weights)
    chunks = [
        _sample_chunk(value, shapes, loc, weight)
        for loc, weight in zip(locations.split(QUERY_CHUNK, 1), weights.split(QUERY_CHUNK, 1), strict=True)
    ]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)


def _compiled_here(value: Tensor) -> bool:
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    return value.device.type == "cpu" and not traced and kernels.available()


def _sample_compiled(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    from cellslide.models.deform_kernels import sample

    b, q = locations.shape[:2]
    out = np.empty((b, q, *value.shape[2:]), np.float32)
    values, places, shares = (t.float().contiguous().numpy() for t in (value, locations, weights))
    sizes = np.array(shapes, np.int64)

    def fill(begin: int, end: int) -> None:
        sample(values, sizes, places, shares, out, begin, end)

    # Queries are independent, so the threads of torch share them, and any number of threads gives the same.
    threads = torch.get_num_threads()
    cuts = [q * i // threads for i in range(threads + 1)]
    if threads == 1:
        fill(0, q)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, cuts[:-1], cuts[1:]))
    return torch.from_numpy(out).flatten(2).to(value.dtype)


@torch.inference_mode()
def prepare() -> None:
    """Load the compiled loop, where there is one, by one call on next to nothing."""
    sample_deformable(torch.zeros(1, 4, 1, 4), [(2, 2)], torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1))


def softmax_of_few(logits: Tensor) -> Tensor:
    """Return the softmax along a short last axis, in at least float32.

    torch works through the last axis one value at a time on a CPU, and through the first many at once.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if wide.device.type != "cpu":
        return wide.softmax(-1)
    return wide.flatten(0, -2).t().contiguous().softmax(0).t().reshape(wide.shape)


def places_around(reference: Tensor, offsets: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Return where `offsets` (B, Q, heads, levels, points, 2), in pixels of each level, lead from `reference`.

    reference  (1 or B, Q, 1, 1 or levels, 1, 2), (x, y) in [0, 1]; the answer is too.
    """
    levels, points = offsets.shape[-3:-1]
    size = torch.tensor([(w, h) for h, w in shapes], dtype=reference.dtype, device=offsets.device)
    # One axis in place of three short ones, which a CPU would work through one by one.
    size = size[:, None].expand(levels, points, 2).flatten()
    start = reference.expand(-1, -1, 1, levels, points, 2).flatten(-3)
    return (start + offsets.flatten(-3) / size).unflatten(-1, (levels, points, 2))


def _sample_chunk(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    b, _, heads, d = value.shape
    q, points = locations.shape[1], locations.shape[4]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5)  # levels, B, heads, Q, points, 2
    weights = weights.permute(3, 0, 2, 1, 4)  # levels, B, heads, Q, points
    total = value.new_zeros(b * heads, d, q)
    for level, (h, w) in enumerate(shapes):
        first = sum(hh * ww for hh, ww in shapes[:level])
        maps = value[:, first : first + h * w].permute(0, 2, 3, 1).reshape(b * heads, d, h, w)
        grid = grids[level].reshape(b * heads, q, points, 2)
        sampled = F.grid_sample(maps, grid.to(maps.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
        total = total + (sampled * weights[level].reshape(b * heads, 1, q, points)).sum(-1)
    return total.reshape(b, heads * d, q).transpose(1, 2)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention; the value width is `ratio` times `dim` (ViT-Adapter's one addition)."""

    def __init__(self, dim: int, n_levels: int, n_heads: int, n_points: int, ratio: float = 1.0) -> None:
        super().__init__()
        self.n_heads, self.n_levels, self.n_points = n_heads, n_levels, n_points
        width = int(dim * ratio)
        if width % n_heads:
            raise ValueError(f"value width {width} is not divisible by {n_heads} heads")
        self.sampling_offsets = nn.Linear(dim, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(dim, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(dim, width)
        self.output_proj = nn.Linear(width, dim)
        self._reset()

    def _reset(self) -> None:
        # Each head starts out looking in its own direction, each point one step further (Deformable DETR, A.2).
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2.0 * torch.pi / self.n_heads)
        grid = torch.stack([angles.cos(), angles.sin()], -1)
        grid = (grid / grid.abs().max(-1, keepdim=True)[0]).view(self.n_heads, 1, 1, 2)
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32).view(1, 1, -1, 1)
        bias = (grid * steps).expand(self.n_heads, self.n_levels, self.n_points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias = nn.Parameter(bias.reshape(-1).clone())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, reference: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Attend from `query` (B, Q, C) at `reference` (1, Q, 1, 2) into `value` (B, S, C)."""
        b, q, _ = query.shape
        heads, levels, points = self.n_heads, self.n_levels, self.n_points
        v = self.value_proj(value).view(b, value.shape[1], heads, -1)
        offsets = self.sampling_offsets(query).view(b, q, heads, levels, points, 2)
        weights = softmax_of_few(self.attention_weights(query).view(b, q, heads, levels * points))
        locations = places_around(reference[:, :, None, :, None, :], offsets, shapes)
        return self.output_proj(sample_deformable(v, shapes, locations, weights.view(b, q, heads, levels, points)))


def reference_points(shapes: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pixel centres of the grids `shapes` [(H, W), ...] as (1, sum H * W, 1, 2), (x, y) in (0, 1)."""
    points = []
    for h, w in shapes:
        ys = (torch.arange(h, dtype=torch.float32, device=device) + 0.5) / h
        xs = (torch.arange(w, dtype=torch.float32, device=device) + 0.5) / w
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        points.append(torch.stack([x.reshape(-1), y.reshape(-1)], -1))
    return torch.cat(points)[None, :, None].to(dtype)


def enlarged(x: Tensor, scale: int) -> Tensor:
    """Enlarge maps (B, C, h, w) bilinearly by a whole factor.

    Without a gradient to keep on a CPU, by a product with each axis' weights, which is several times as fast as
    torch's own filter and differs by rounding.
    """
    if scale == 1:
        return x
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    down, across = (
        F.interpolate(torch.eye(n)[None], scale_factor=scale, mode="linear", align_corners=False)[0].t().to(x.dtype)
        for n in x.shape[-2:]
    )
    rows = down @ x.permute(0, 2, 3, 1).flatten(2)  # (B, scale * h, w * C)
    return (across @ rows.unflatten(2, (x.shape[-1], -1))).permute(0, 3, 1, 2)


class Conv2DBlock(nn.Module):
    """3×3 convolution, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Deconv2DBlock(nn.Module):
    """2×2 transposed convolution (doubles the size), 3×3 convolution, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ConvTranspose2d(c_in, c_out, 2, 2),
            nn.Conv2d(c_out, c_out, 3, padding=1),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class HoverBranch(nn.Module):
    """One decoder branch from 1/16 to full size, fed by the shared skips, ending in `n_out` logits a pixel.

    widths      channels of the skips at scale 1, 1/2, 1/4 and 1/8: published 64, 128, 256 and 312 or 512.
    bottleneck  the first upsampling, 1/16 to 1/8; its form differs between CellViT and CellVTA.
    """

    def __init__(self, widths: tuple[int, int, int, int], n_out: int, bottleneck: nn.Module) -> None:
        super().__init__()
        w0, w1, w2, w3 = widths
        self.bottleneck_upsampler = bottleneck
        self.decoder3_upsampler = nn.Sequential(
            Conv2DBlock(2 * w3, w3), Conv2DBlock(w3, w3), Conv2DBlock(w3, w3), nn.ConvTranspose2d(w3, w2, 2, 2)
        )
        self.decoder2_upsampler = nn.Sequential(
            Conv2DBlock(2 * w2, w2), Conv2DBlock(w2, w2), nn.ConvTranspose2d(w2, w1, 2, 2)
        )
        self.decoder1_upsampler = nn.Sequential(
            Conv2DBlock(2 * w1, w1), Conv2DBlock(w1, w1), nn.ConvTranspose2d(w1, w0, 2, 2)
        )
        self.decoder0_header = nn.Sequential(Conv2DBlock(2 * w0, w0), Conv2DBlock(w0, w0), nn.Conv2d(w0, n_out, 1))

    def forward(self, skips: Sequence[Tensor], bottom: Tensor) -> Tensor:
        """Decode `bottom` (1/16) with `skips` at scale 1, 1/2, 1/4, 1/8; returns (B, n_out, H, W)."""
        x = self.bottleneck_upsampler(bottom)
        x = self.decoder3_upsampler(torch.cat([skips[3], x], 1))
        x = self.decoder2_upsampler(torch.cat([skips[2], x], 1))
        x = self.decoder1_upsampler(torch.cat([skips[1], x], 1))
        return self.decoder0_header(torch.cat([skips[0], x], 1))
