"""CellVTA: a ViT with a convolutional adapter and three HoVer decoder branches.

Source: the CellVTA paper and its public code; ViT-Adapter for the interaction blocks; CellViT for the decoder.
Two traits of the published model are kept, since the weights depend on them: the CLS token never passes through the
blocks (so `tissue_types` is the same for every image and is not a prediction), and positions are resampled with an
antialiased bicubic filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellslide.models.layers import (
    Block,
    Conv2DBlock,
    Deconv2DBlock,
    DropPath,
    HoverBranch,
    MSDeformAttn,
    PatchEmbed,
    enlarged,
    reference_points,
    resample_abs_pos_embed,
)
from cellslide.models.pyramid import conv_network
from cellslide.models.windows import Windows

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class CellVTAConfig:
    """Sizes of a CellVTA; the defaults are the published UNI variant on PanNuke.

    prior               convolutional network of timm whose maps at 1/2 to 1/32 are the spatial prior, which can then
                        start from weights that have seen images; None is the published stem of width `conv_inplane`.
    num_nuclei_classes  includes background; 0 leaves the type branch out.
    num_tissue_classes  0 leaves the (constant) tissue head out.
    decoder_widths      skip channels at scale 1, 1/2, 1/4, 1/8; None takes the published ones for `embed_dim`.
    use_pos_embed       False leaves position and CLS embeddings out, so that the place in a tile is not known.
    attention_radius    how many tokens far the ViT sees; 0 sees the whole image, as published. With a radius, what is
                        found at a place does not depend on the size of the tile around it.
    init_values         start of LayerScale and of the injectors' gamma: 1e-5 suits a pretrained, frozen ViT.
    """

    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: int = 16
    img_size: int = 224
    use_pos_embed: bool = True
    attention_radius: int = 0
    init_values: float = 1e-5
    drop_path_rate: float = 0.0
    interaction_indexes: tuple[tuple[int, int], ...] = ((0, 5), (6, 11), (12, 17), (18, 23))
    conv_inplane: int = 64
    prior: str | None = None
    n_points: int = 4
    deform_num_heads: int = 8
    deform_ratio: float = 0.5
    cffn_ratio: float = 0.25
    n_extra_extractors: int = 2
    num_nuclei_classes: int = 6
    num_tissue_classes: int = 19
    decoder_widths: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        pairs = tuple((int(a), int(b)) for a, b in self.interaction_indexes)
        object.__setattr__(self, "interaction_indexes", pairs)
        covered = [i for first, last in pairs for i in range(first, last + 1)]
        if covered != list(range(self.depth)) or len(pairs) != 4:
            raise ValueError(f"interaction_indexes {pairs} must be four runs that cover blocks 0..{self.depth - 1}")
        if self.num_tissue_classes and not self.use_pos_embed:
            raise ValueError("the tissue head reads the CLS token: num_tissue_classes 0 goes with use_pos_embed false")
        if self.decoder_widths is not None:
            object.__setattr__(self, "decoder_widths", tuple(int(w) for w in self.decoder_widths))

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Skip channels of the decoder."""
        return self.decoder_widths or (64, 128, 256, 312 if self.embed_dim < 512 else 512)


class SpatialPrior(nn.Module):
    """Convolutional stem: image to c1 (B, C, H/2, W/2) and flattened c2, c3, c4 at 1/4, 1/8, 1/16."""

    def __init__(self, inplane: int, dim: int) -> None:
        super().__init__()
        p = inplane
        stem: list[nn.Module] = []
        for c_in in (3, p, p):
            stem += [nn.Conv2d(c_in, p, 3, 1, 1, bias=False), nn.BatchNorm2d(p), nn.ReLU(inplace=True)]
        # The published stem ends in a strided convolution with neither norm nor activation.
        self.stem = nn.Sequential(*stem, nn.Conv2d(p, p, 3, 2, 1, bias=False))
        self.conv2 = self._down(p, 2 * p)
        self.conv3 = self._down(2 * p, 4 * p)
        self.conv4 = self._down(4 * p, 4 * p)
        add_projections(self, (p, 2 * p, 4 * p, 4 * p), dim)

    @staticmethod
    def _down(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(c_in, c_in, 3, 1, 1, bias=False),
            nn.BatchNorm2d(c_in),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), *flattened((self.fc2(c2), self.fc3(c3), self.fc4(c4)))


class PyramidPrior(nn.Module):
    """Spatial prior from a convolutional network of timm: its maps at 1/2, 1/4, 1/8 and 1/16, projected to `dim`.

    The map at 1/32, which knows most of what is in the image, is enlarged and added to the last. Raises ValueError if
    timm has no such network, or if it has no maps of these sizes.
    """

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.net, self._indices, channels = conv_network(name, (2, 4, 8, 16, 32))
        add_projections(self, channels, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        maps = self.net.forward_intermediates(x, indices=self._indices, intermediates_only=True)
        c1, c2, c3, c4, c5 = (getattr(self, f"fc{i}")(c) for i, c in enumerate(maps, start=1))
        c4 = c4 + enlarged(c5, 2)[..., : c4.shape[-2], : c4.shape[-1]]
        return c1, *flattened((c2, c3, c4))


def add_projections(prior: nn.Module, channels: Sequence[int], dim: int) -> None:
    """Give a spatial prior its 1x1 convolutions fc1, fc2 and so on, from `channels` of its maps to `dim`."""
    for i, c_in in enumerate(channels, start=1):
        setattr(prior, f"fc{i}", nn.Conv2d(c_in, dim, 1))


def flattened(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return maps (B, C, h, w) as tokens (B, h * w, C)."""
    return tuple(c.flatten(2).transpose(1, 2) for c in maps)


class DepthwiseConv(nn.Module):
    """One depthwise 3×3 convolution applied to each of the three grids in turn."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        b, _, c = x.shape
        parts = x.split([h * w for h, w in shapes], dim=1)
        maps = [p.transpose(1, 2).reshape(b, c, h, w) for p, (h, w) in zip(parts, shapes, strict=True)]
        return torch.cat([self.dwconv(m).flatten(2).transpose(1, 2) for m in maps], dim=1)


class ConvFFN(nn.Module):
    """Linear, depthwise convolution, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), shapes)))


class Injector(nn.Module):
    """ViT tokens query the three adapter grids: x + gamma * attention (ViT-Adapter, eq. 1)."""

    def __init__(self, cfg: CellVTAConfig) -> None:
        super().__init__()
        dim = cfg.embed_dim
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn(dim, 3, cfg.deform_num_heads, cfg.n_points, cfg.deform_ratio)
        self.gamma = nn.Parameter(torch.full((dim,), cfg.init_values))

    def forward(self, x: Tensor, c: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        return x + self.gamma * self.attn(self.query_norm(x), reference, self.feat_norm(c), shapes)


class Extractor(nn.Module):
    """Adapter grids query the ViT tokens, then a ConvFFN (ViT-Adapter, eqs. 2 and 3)."""

    def __init__(self, cfg: CellVTAConfig) -> None:
        super().__init__()
        dim = cfg.embed_dim
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn(dim, 1, cfg.deform_num_heads, cfg.n_points, cfg.deform_ratio)
        self.ffn = ConvFFN(dim, int(dim * cfg.cffn_ratio))
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.drop_path = DropPath(cfg.drop_path_rate)

    def forward(self, c: Tensor, x: Tensor, reference: Tensor, x_shape: Shapes, c_shapes: Shapes) -> Tensor:
        c = c + self.attn(self.query_norm(c), reference, self.feat_norm(x), x_shape)
        return c + self.drop_path(self.ffn(self.ffn_norm(c), c_shapes))


class InteractionBlock(nn.Module):
    """Inject, run a run of ViT blocks on the patch tokens, extract; the last one extracts twice more."""

    def __init__(self, cfg: CellVTAConfig, n_extra: int) -> None:
        super().__init__()
        self.injector = Injector(cfg)
        self.extractor = Extractor(cfg)
        self.extra_extractors = nn.ModuleList(Extractor(cfg) for _ in range(n_extra)) if n_extra else None

    def forward(self, x: Tensor, c: Tensor, blocks: Sequence[nn.Module], grid: AdapterGrid) -> tuple[Tensor, Tensor]:
        x = self.injector(x, c, grid.x_reference, grid.c_shapes)
        for block in blocks:
            x = block(x, grid.near)
        for extractor in (self.extractor, *(self.extra_extractors or ())):
            c = extractor(c, x, grid.c_reference, grid.x_shape, grid.c_shapes)
        return x, c


@dataclass(frozen=True, slots=True)
class AdapterGrid:
    """Shapes and reference points of one input size: tokens at 1/16, adapter grids at 1/4, 1/8, 1/16.

    near  which token sees which; None: each sees all.
    """

    x_shape: Shapes
    c_shapes: Shapes
    x_reference: Tensor
    c_reference: Tensor
    near: Windows | None = None

    @classmethod
    def of(cls, height: int, width: int, like: Tensor, attention_radius: int = 0) -> AdapterGrid:
        """Return the grids for an image of `height` by `width` pixels, on the device of `like`."""
        c_shapes = [(height // s, width // s) for s in (4, 8, 16)]
        x_shape = c_shapes[-1:]
        x_ref, c_ref = (reference_points(s, like.device, like.dtype) for s in (x_shape, c_shapes))
        near = Windows.of(x_shape[0], attention_radius, like.device) if attention_radius else None
        return cls(x_shape, c_shapes, x_ref, c_ref, near)


class AdapterEncoder(nn.Module):
    """ViT with spatial prior and interaction blocks: image to f1..f4 (B, C, ...) at 1/2, 1/4, 1/8, 1/16."""

    def __init__(self, cfg: CellVTAConfig) -> None:
        super().__init__()
        dim = cfg.embed_dim
        self.interaction_indexes = cfg.interaction_indexes
        self.attention_radius = cfg.attention_radius
        self.patch_embed = PatchEmbed(cfg.patch_size, dim)
        self.cls_token = self.pos_embed = None
        if cfg.use_pos_embed:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (cfg.img_size // cfg.patch_size) ** 2, dim))
        rates = [cfg.drop_path_rate * i / max(cfg.depth - 1, 1) for i in range(cfg.depth)]
        self.blocks = nn.ModuleList(
            Block(dim, cfg.num_heads, cfg.mlp_ratio, cfg.init_values, drop_path=rate) for rate in rates
        )
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = PyramidPrior(cfg.prior, dim) if cfg.prior else SpatialPrior(cfg.conv_inplane, dim)
        last = len(cfg.interaction_indexes) - 1
        self.interactions = nn.ModuleList(
            InteractionBlock(cfg, cfg.n_extra_extractors if i == last else 0) for i in range(last + 1)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        for i in range(1, 5):
            setattr(self, f"norm{i}", nn.BatchNorm2d(dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6) if cfg.num_tissue_classes else None
        self.head = nn.Linear(dim, cfg.num_tissue_classes) if cfg.num_tissue_classes else None
        self._reset()

    def _reset(self) -> None:
        for table in (self.cls_token, self.pos_embed, self.level_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, image: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]:
        """Return the pyramid f1..f4 and the tissue logits (B, T), or None without that head."""
        h, w = image.shape[-2:]
        grid = AdapterGrid.of(h, w, image, self.attention_radius)
        c1, c2, c3, c4 = self.spm(image)
        c = torch.cat([c2 + self.level_embed[0], c3 + self.level_embed[1], c4 + self.level_embed[2]], dim=1)
        x = self.patch_embed(image)
        pos = None if self.pos_embed is None else resample_abs_pos_embed(self.pos_embed, grid.x_shape[0])
        if pos is not None:
            x = x + pos[:, 1:]
        outs = []
        for (first, stop), interaction in zip(self.interaction_indexes, self.interactions, strict=True):
            x, c = interaction(x, c, self.blocks[first : stop + 1], grid)
            outs.append(_to_map(x, grid.x_shape[0]))
        return self._pyramid(c1, c, outs, grid), self._tissue(x, pos)

    def _pyramid(self, c1: Tensor, c: Tensor, outs: list[Tensor], grid: AdapterGrid) -> tuple[Tensor, ...]:
        parts = c.split([h * w for h, w in grid.c_shapes], dim=1)
        c2, c3, c4 = (_to_map(p, shape) for p, shape in zip(parts, grid.c_shapes, strict=True))
        c1 = self.up(c2).add_(c1)  # the largest maps: a sum of their own would cost more than the convolution
        levels = [c + enlarged(x, scale) for c, x, scale in zip((c1, c2, c3, c4), outs, (8, 4, 2, 1), strict=True)]
        return self.norm1(levels[0]), self.norm2(levels[1]), self.norm3(levels[2]), self.norm4(levels[3])

    def _tissue(self, x: Tensor, pos: Tensor | None) -> Tensor | None:
        if self.head is None or self.norm is None or self.cls_token is None or pos is None:
            return None
        return self.head(self.norm((self.cls_token + pos[:, :1]).expand(x.shape[0], -1, -1))[:, 0])


def _to_map(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *shape)


class CellVTA(nn.Module):
    """The whole network; images are normalised, height and width are multiples of 16.

    Skip decoders are computed once and shared by the branches, which is bit-identical to the published three times.
    """

    def __init__(self, cfg: CellVTAConfig) -> None:
        super().__init__()
        self.config = cfg
        dim, widths = cfg.embed_dim, cfg.widths
        self.encoder = AdapterEncoder(cfg)
        w0, w1, w2, w3 = widths
        self.decoder0 = nn.Sequential(Conv2DBlock(3, w0 // 2), Conv2DBlock(w0 // 2, w0))
        self.decoder1 = nn.Sequential(Conv2DBlock(dim, w1), Conv2DBlock(w1, w1))
        self.decoder2 = nn.Sequential(Conv2DBlock(dim, w2), Conv2DBlock(w2, w2))
        self.decoder3 = nn.Sequential(Conv2DBlock(dim, w3), Conv2DBlock(w3, w3))
        self.nuclei_binary_map_decoder = self._branch(2)
        self.hv_map_decoder = self._branch(2)
        self.n_types = max(cfg.num_nuclei_classes - 1, 0)
        self.nuclei_type_maps_decoder = self._branch(cfg.num_nuclei_classes) if cfg.num_nuclei_classes else None

    def _branch(self, n_out: int) -> HoverBranch:
        widths = self.config.widths
        return HoverBranch(widths, n_out, nn.Sequential(Deconv2DBlock(self.config.embed_dim, widths[3])))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return raw logits by published name: (B, 2, H, W) nuclei and HV maps, (B, K, H, W) types, (B, T) tissue."""
        if x.shape[-1] % 16 or x.shape[-2] % 16:
            raise ValueError(f"image of {x.shape[-1]} x {x.shape[-2]} px: both sides must be multiples of 16")
        (f1, f2, f3, f4), tissue = self.encoder(x)
        skips = (self.decoder0(x), self.decoder1(f1), self.decoder2(f2), self.decoder3(f3))
        out = {
            "nuclei_binary_map": self.nuclei_binary_map_decoder(skips, f4),
            "hv_map": self.hv_map_decoder(skips, f4),
        }
        if self.nuclei_type_maps_decoder is not None:
            out["nuclei_type_map"] = self.nuclei_type_maps_decoder(skips, f4)
        if tissue is not None:
            out["tissue_types"] = tissue
        return out


def build(config: Mapping[str, Any]) -> CellVTA:
    """Build a CellVTA with `config` over the published sizes; raises TypeError or ValueError."""
    return CellVTA(CellVTAConfig(**config))
