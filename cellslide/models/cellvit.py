"""CellViT and CellViT++: a ViT encoder of some kind behind three HoVer decoder branches.

Source: the CellViT and CellViT++ papers and their public code. All four skips are token grids of one resolution; the
encoders differ in where positions come from, in the blocks, and in what feeds the tissue head:

256      DINO ViT (HIPT): plain bicubic positions, tissue head on the normed CLS token.
sam      Segment Anything image encoder: windows, relative positions, cropped absolute positions, tissue head on the
         neck.
uni      timm ViT with LayerScale: antialiased positions, tissue head on the CLS token without norm.
virchow  as uni with a packed SwiGLU, patches of 14 px (the image is resized for them) and, in Virchow2, registers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellslide.errors import UsageError
from cellslide.models.layers import Block, Conv2DBlock, Deconv2DBlock, HoverBranch, PatchEmbed, resample_abs_pos_embed

EncoderKind = Literal["256", "sam", "uni", "virchow"]


@dataclass(frozen=True, slots=True)
class CellViTConfig:
    """Sizes of a CellViT; see `PUBLISHED` for the published ones.

    extract_layers      the skips are the outputs of these blocks, counted from 1; the last one is the bottleneck.
    mlp_hidden          rows of the first linear layer of the MLP; None is four times `embed_dim`.
    global_attn_indexes, window_size, neck_dim   SAM only: blocks with attention over the whole image, counted from 0.
    num_nuclei_classes  includes background; 0 leaves the type branch out.
    regression_loss     the nuclei branch has two more channels, returned as `regression_map`.
    decoder_widths      skip channels at scale 1, 1/2, 1/4, 1/8; None takes the published ones for `embed_dim`.
    skip_widths         channels inside the skip decoders; None likewise.
    """

    encoder: EncoderKind = "256"
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    extract_layers: tuple[int, ...] = (3, 6, 9, 12)
    mlp_hidden: int | None = None
    patch_size: int = 16
    img_size: int = 224
    n_registers: int = 0
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = ()
    neck_dim: int = 256
    num_nuclei_classes: int = 6
    num_tissue_classes: int = 19
    regression_loss: bool = False
    decoder_widths: tuple[int, int, int, int] | None = None
    skip_widths: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("extract_layers", "global_attn_indexes", "decoder_widths", "skip_widths"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))
        if len(self.extract_layers) != 4 or self.extract_layers[-1] != self.depth:
            raise ValueError(f"extract_layers {self.extract_layers} must be four blocks, the last one {self.depth}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by {self.num_heads} heads")

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Skip channels of the decoder."""
        return self.decoder_widths or (64, 128, 256, 312 if self.embed_dim < 512 else 512)

    @property
    def inner_widths(self) -> tuple[int, int]:
        """Channels inside the skip decoders."""
        return self.skip_widths or ((256, 128) if self.embed_dim < 512 else (512, 256))


_VIRCHOW = CellViTConfig(
    "virchow", embed_dim=1280, depth=32, num_heads=16, extract_layers=(8, 16, 24, 32), mlp_hidden=6832, patch_size=14
)

PUBLISHED: dict[str, CellViTConfig] = {
    "cellvit_256": CellViTConfig(),
    "cellvit_sam_b": CellViTConfig("sam", 768, 12, 12, (3, 6, 9, 12), img_size=1024, global_attn_indexes=(2, 5, 8, 11)),
    "cellvit_sam_l": CellViTConfig(
        "sam", 1024, 24, 16, (6, 12, 18, 24), img_size=1024, global_attn_indexes=(5, 11, 17, 23)
    ),
    "cellvit_sam_h": CellViTConfig(
        "sam", 1280, 32, 16, (8, 16, 24, 32), img_size=1024, global_attn_indexes=(7, 15, 23, 31)
    ),
    "cellvit_uni": CellViTConfig("uni", 1024, 24, 16, (6, 12, 18, 24)),
    "cellvit_virchow": _VIRCHOW,
    "cellvit_virchow2": replace(_VIRCHOW, n_registers=4),
}


class PackedSwiGLU(nn.Module):
    """MLP whose first layer gives gate and value in one matrix: silu(gate) * value."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def resample_dino_pos_embed(pos_embed: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Resize a position embedding (1, 1 + g², C) to a grid of (H, W) tokens as DINO does.

    Plain bicubic, with (n + 0.1) / g as the scale: the 0.1 guards the size against rounding, but it also enters the
    coordinates, so it matters for parity.
    """
    prefix, grid = pos_embed[:, :1], pos_embed[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    if (side, side) == grid_hw:
        return pos_embed
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = tuple((n + 0.1) / side for n in grid_hw)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([prefix, grid.permute(0, 2, 3, 1).reshape(1, grid_hw[0] * grid_hw[1], -1)], dim=1)


class ViTEncoder(nn.Module):
    """Plain ViT (256, UNI, Virchow): image to tissue logits and the four token grids (B, C, H/p, W/p)."""

    def __init__(self, cfg: CellViTConfig) -> None:
        super().__init__()
        dim, self.config = cfg.embed_dim, cfg
        self.n_prefix = 1 + cfg.n_registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if cfg.n_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, cfg.n_registers, dim))
        n_tokens = self.n_prefix + (cfg.img_size // cfg.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, n_tokens, dim))
        self.patch_embed = PatchEmbed(cfg.patch_size, dim)
        self.blocks = nn.ModuleList(self._block() for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, cfg.num_tissue_classes) if cfg.num_tissue_classes else None
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def _block(self) -> Block:
        cfg = self.config
        hidden = cfg.mlp_hidden or 4 * cfg.embed_dim
        return Block(
            cfg.embed_dim,
            cfg.num_heads,
            mlp_ratio=hidden / cfg.embed_dim,
            init_values=None if cfg.encoder == "256" else 1e-5,
            mlp=PackedSwiGLU(cfg.embed_dim, hidden) if cfg.encoder == "virchow" else None,
        )

    def forward(self, image: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Return tissue logits (B, T) or None, and the four grids, shallow to deep."""
        grid = (image.shape[-2] // self.config.patch_size, image.shape[-1] // self.config.patch_size)
        x = self._tokens(image, grid)
        grids = []
        for depth, block in enumerate(self.blocks, start=1):
            x = block(x)
            if depth in self.config.extract_layers:
                grids.append(_to_map(x[:, self.n_prefix :], grid))
        return self._tissue(x), grids

    def _tokens(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        prefix = [self.cls_token, self.reg_token] if self.config.n_registers else [self.cls_token]
        x = torch.cat([*(p.expand(image.shape[0], -1, -1) for p in prefix), self.patch_embed(image)], dim=1)
        if self.config.encoder == "256":
            return x + resample_dino_pos_embed(self.pos_embed, grid)
        return x + resample_abs_pos_embed(self.pos_embed, grid, self.n_prefix)

    def _tissue(self, x: Tensor) -> Tensor | None:
        if self.head is None:
            return None
        # Only the HIPT variant norms the CLS token; `norm` is in the other checkpoints but takes no part.
        return self.head((self.norm(x) if self.config.encoder == "256" else x)[:, 0])


def _to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


class SamMlp(nn.Module):
    """Two linear layers with exact GELU between, under SAM's names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class SamAttention(nn.Module):
    """Self-attention over a grid (B, H, W, C) with decomposed relative positions (MViTv2, eq. 4)."""

    def __init__(self, dim: int, num_heads: int, side: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).reshape(b, h * w, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(q, h, w))
        return self.proj(x.transpose(1, 2).reshape(b, h, w, c))

    def _bias(self, q: Tensor, h: int, w: int) -> Tensor:
        """Return the position term (B, heads, H * W, H * W); it uses the unscaled query, as published."""
        grid = q.reshape(q.shape[0], q.shape[1], h, w, q.shape[-1])
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, _relative(self.rel_pos_h, h).to(q.dtype))
        cols = torch.einsum("bnhwc,wkc->bnhwk", grid, _relative(self.rel_pos_w, w).to(q.dtype))
        return (rows[..., :, None] + cols[..., None, :]).reshape(q.shape[0], q.shape[1], h * w, h * w)


def _relative(table: Tensor, size: int) -> Tensor:
    """Return vectors (size, size, d) by distance query - key; the table is stretched linearly to the grid."""
    length = 2 * size - 1
    if table.shape[0] != length:
        table = F.interpolate(table.t()[None].float(), size=length, mode="linear")[0].t()
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index[None, :] + size - 1]


class SamBlock(nn.Module):
    """Pre-norm transformer block over a grid (B, H, W, C), in windows where `window` is not 0."""

    def __init__(self, cfg: CellViTConfig, window: int) -> None:
        super().__init__()
        dim = cfg.embed_dim
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SamAttention(dim, cfg.num_heads, window or cfg.img_size // cfg.patch_size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SamMlp(dim, cfg.mlp_hidden or 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self._windowed(self.norm1(x)) if self.window else self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))

    def _windowed(self, x: Tensor) -> Tensor:
        """Attend within windows; the grid is padded with zeros, which take part, as published."""
        b, h, w, c = x.shape
        s = self.window
        x = F.pad(x, (0, 0, 0, -w % s, 0, -h % s))
        rows, cols = x.shape[1] // s, x.shape[2] // s
        x = x.reshape(b, rows, s, cols, s, c).transpose(2, 3).reshape(-1, s, s, c)
        x = self.attn(x).reshape(b, rows, cols, s, s, c).transpose(2, 3)
        return x.reshape(b, rows * s, cols * s, c)[:, :h, :w]


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


class SamPatchEmbed(PatchEmbed):
    """Image (B, 3, H, W) to a token grid (B, H/p, W/p, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class SamEncoder(nn.Module):
    """Segment Anything's image encoder: image to the mean of its neck (B, neck_dim) and the four token grids."""

    def __init__(self, cfg: CellViTConfig) -> None:
        super().__init__()
        dim, self.config = cfg.embed_dim, cfg
        side = cfg.img_size // cfg.patch_size
        self.patch_embed = SamPatchEmbed(cfg.patch_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, dim))
        self.blocks = nn.ModuleList(
            SamBlock(cfg, 0 if i in cfg.global_attn_indexes else cfg.window_size) for i in range(cfg.depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(dim, cfg.neck_dim, 1, bias=False),
            LayerNorm2d(cfg.neck_dim),
            nn.Conv2d(cfg.neck_dim, cfg.neck_dim, 3, padding=1, bias=False),
            LayerNorm2d(cfg.neck_dim),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled neck and the four grids; raises UsageError for images beyond the position table."""
        x = self.patch_embed(image)
        h, w = x.shape[1:3]
        if max(h, w) > self.pos_embed.shape[1]:
            raise UsageError(
                f"--tile-size {max(image.shape[-2:])}: a SAM encoder knows positions up to {self.config.img_size} px;"
                f" use --tile-size {self.config.img_size} or less"
            )
        # Published code crops both axes by the height; rows and columns are kept apart here, equal on square images.
        x = x + self.pos_embed[:, :h, :w]
        grids = []
        for depth, block in enumerate(self.blocks, start=1):
            x = block(x)
            if depth in self.config.extract_layers:
                grids.append(x.permute(0, 3, 1, 2))
        return self.neck(x.permute(0, 3, 1, 2)).mean(dim=(2, 3)), grids


class CellViTBranch(HoverBranch):
    """Decoder branch whose last upsampling is brought to the size of the image where patches do not divide it."""

    def forward(self, skips: Sequence[Tensor], bottom: Tensor) -> Tensor:
        """Decode `bottom` with `skips` at scale 1, 1/2, 1/4, 1/8; returns (B, n_out, H, W)."""
        x = self.bottleneck_upsampler(bottom)
        x = self.decoder3_upsampler(torch.cat([skips[3], x], 1))
        x = self.decoder2_upsampler(torch.cat([skips[2], x], 1))
        x = self.decoder1_upsampler(torch.cat([skips[1], x], 1))
        return self.decoder0_header(torch.cat([skips[0], _resize(x, skips[0].shape[-2:])], 1))


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class CellViT(nn.Module):
    """The whole network; images are normalised, height and width are multiples of 16.

    Skip decoders are computed once and shared by the branches, which is bit-identical to the published three times.
    """

    def __init__(self, cfg: CellViTConfig) -> None:
        super().__init__()
        self.config = cfg
        dim, (w0, w1, w2, w3), (s1, s2) = cfg.embed_dim, cfg.widths, cfg.inner_widths
        self.encoder: ViTEncoder | SamEncoder = SamEncoder(cfg) if cfg.encoder == "sam" else ViTEncoder(cfg)
        self.decoder0 = nn.Sequential(Conv2DBlock(3, w0 // 2), Conv2DBlock(w0 // 2, w0))
        self.decoder1 = nn.Sequential(Deconv2DBlock(dim, s1), Deconv2DBlock(s1, s2), Deconv2DBlock(s2, w1))
        self.decoder2 = nn.Sequential(Deconv2DBlock(dim, s1), Deconv2DBlock(s1, w2))
        self.decoder3 = nn.Sequential(Deconv2DBlock(dim, w3))
        self.nuclei_binary_map_decoder = self._branch(4 if cfg.regression_loss else 2)
        self.hv_map_decoder = self._branch(2)
        self.n_types = max(cfg.num_nuclei_classes - 1, 0)
        self.nuclei_type_maps_decoder = self._branch(cfg.num_nuclei_classes) if cfg.num_nuclei_classes else None
        has_head = cfg.encoder == "sam" and cfg.num_tissue_classes
        self.classifier_head = nn.Linear(cfg.neck_dim, cfg.num_tissue_classes) if has_head else None

    def _branch(self, n_out: int) -> CellViTBranch:
        widths = self.config.widths
        return CellViTBranch(widths, n_out, nn.ConvTranspose2d(self.config.embed_dim, widths[3], 2, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return raw logits by published name: (B, 2, H, W) nuclei and HV maps, (B, K, H, W) types, (B, T) tissue."""
        size = x.shape[-2:]
        if size[0] % 16 or size[1] % 16:
            raise ValueError(f"image of {size[1]} x {size[0]} px: both sides must be multiples of 16")
        x = self._fit(x)
        tissue, (z1, z2, z3, z4) = self.encoder(x)
        if self.classifier_head is not None:
            tissue = self.classifier_head(tissue)
        skips = (_resize(self.decoder0(x), size), self.decoder1(z1), self.decoder2(z2), self.decoder3(z3))
        out = self._heads(skips, z4)
        if tissue is not None and self.config.num_tissue_classes:
            out["tissue_types"] = tissue
        return out

    def _heads(self, skips: Sequence[Tensor], bottom: Tensor) -> dict[str, Tensor]:
        nuclei = self.nuclei_binary_map_decoder(skips, bottom)
        out = {"nuclei_binary_map": nuclei[:, :2], "hv_map": self.hv_map_decoder(skips, bottom)}
        if self.nuclei_type_maps_decoder is not None:
            out["nuclei_type_map"] = self.nuclei_type_maps_decoder(skips, bottom)
        if self.config.regression_loss:
            out["regression_map"] = nuclei[:, 2:]
        return out

    def _fit(self, x: Tensor) -> Tensor:
        """Shrink by area to whole patches: 256 px to 252 and 1024 to 1022 for patches of 14, as published."""
        patch = self.config.patch_size
        size = tuple(n // patch * patch for n in x.shape[-2:])
        return x if size == tuple(x.shape[-2:]) else F.interpolate(x, size=size, mode="area")


def build(arch: str, config: Mapping[str, Any]) -> CellViT:
    """Build the published variant `arch` with the fields of `config` changed; raises ValueError or TypeError."""
    return CellViT(replace(PUBLISHED[arch], **config))
