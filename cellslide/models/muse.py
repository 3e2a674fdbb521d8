"""MUSE: an encoder and a decoder that give a dense map at stride 4, from which the feature of any nucleus is read.

Parameters keep the names of the published checkpoints (alibaba-damo-academy/MUSE) once their prefix is stripped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellslide.errors import short
from cellslide.models.layers import Block, PatchEmbed, enlarged
from cellslide.models.pyramid import conv_network

STRIDE_PX = 4
Aligned = Literal["corners", "pixels"]
# Strides of the four maps that the decoder reads.
_STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class MuseConfig:
    """Sizes of a MUSE backbone.

    encoder         "vit" with the sizes below, or the name of a convolutional network of timm.
    extract_layers  blocks of the ViT, counted from 0, that feed the decoder.
    img_size        pixels that the stored position embedding stands for.
    widths          channels at strides 4, 8, 16, 32; None: D/4, D/2, D, 2D of a ViT, the encoder's own of a
                    convolutional one. Widths other than its own are reached by 1x1 convolutions.
    aligned         where maps lie on the image: by the "corners" of the image, as published, so that what is found at a
                    place depends a little on the size of the tile around it; or by "pixels", so that it does not.
    """

    encoder: str = "vit"
    embed_dim: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16
    img_size: int = 224
    extract_layers: tuple[int, int, int, int] = (2, 5, 8, 11)
    widths: tuple[int, int, int, int] | None = None
    aligned: Aligned = "corners"

    def __post_init__(self) -> None:
        if self.aligned not in get_args(Aligned):
            raise ValueError(f"aligned {short(self.aligned)} must be one of {', '.join(get_args(Aligned))}")
        object.__setattr__(self, "extract_layers", tuple(int(i) for i in self.extract_layers))
        if self.widths is not None:
            object.__setattr__(self, "widths", tuple(int(n) for n in self.widths))
        if len(self.extract_layers) != 4 or (self.widths is not None and len(self.widths) != 4):
            raise ValueError("extract_layers and widths: the decoder reads four maps, so four numbers")
        if self.is_vit and not 0 <= min(self.extract_layers) <= max(self.extract_layers) < self.depth:
            raise ValueError(f"extract_layers {self.extract_layers}: blocks are counted 0 to {self.depth - 1}")
        if self.is_vit and (self.embed_dim % self.heads or self.embed_dim % 4):
            raise ValueError(f"embed_dim {self.embed_dim}: must divide by 4 and by heads {self.heads}")

    @classmethod
    def of(cls, config: Mapping[str, Any], encoder: str = "vit_small") -> MuseConfig:
        """Return the sizes that plain values give.

        `config["encoder"]` is a name (vit_tiny, vit_small, vit_base, resnet50, any convolutional network of timm) or
        {name, and sizes of a "vit"}; `encoder` is used where it is absent. Other keys are fields.
        Raises TypeError for keys that are not known, ValueError for values that are not possible.
        """
        values = dict(config)
        raw = values.pop("encoder", encoder)
        named = {"name": raw} if isinstance(raw, str) else dict(raw)
        name = named.pop("name", "vit")
        return cls(**({"encoder": name} | PRESETS.get(name, {}) | named | values))

    @property
    def is_vit(self) -> bool:
        """Whether the encoder is a ViT."""
        return self.encoder == "vit"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that `of` reads back."""
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        if self.is_vit:
            return plain
        return {"encoder": self.encoder, "widths": plain["widths"], "aligned": self.aligned}


PRESETS: dict[str, dict[str, Any]] = {
    "vit_tiny": {"encoder": "vit", "embed_dim": 192, "heads": 3},
    "vit_small": {"encoder": "vit", "embed_dim": 384, "heads": 6},
    "vit_base": {"encoder": "vit", "embed_dim": 768, "heads": 12},
}


@dataclass(frozen=True, slots=True)
class MuseFeatures:
    """What a MUSE says of a batch: `map` (B, D, H/4, W/4) for nuclei, `image` (B, E) one vector a picture."""

    map: Tensor
    image: Tensor


class MuseBackbone(nn.Module):
    """Encoder and decoder. forward: float (B, 3, H, W), normalised, H and W multiples of 16, not square too.

    `dim` is D, the channels of the map and the length of a nucleus feature; `image_dim` is E.
    """

    def __init__(self, config: MuseConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VitEncoder(config) if config.is_vit else ConvEncoder(config.encoder)
        own = self.encoder.channels
        d = config.embed_dim
        widths = config.widths or ((d // 4, d // 2, d, 2 * d) if config.is_vit else own)
        self.decoder = Decoder(own, widths, config.is_vit or widths != own, config.aligned)
        self.dim, self.image_dim = 4 * widths[0], own[-1]

    def forward(self, x: Tensor) -> MuseFeatures:
        """Return the dense map and the image feature; raises ValueError when an edge is no multiple of 16."""
        h, w = int(x.shape[-2]), int(x.shape[-1])
        if h % 16 or w % 16:
            raise ValueError(f"{w}x{h} px: edges must be multiples of 16")
        maps, image = self.encoder(x)
        return MuseFeatures(self.decoder(maps, (h, w)), image)

    def nucleus_features(self, feature_map: Tensor, points: Tensor) -> Tensor:
        """Return (B, N, D), read from the map (B, D, H/4, W/4) at `points` (B, N, 2), x and y in input pixels."""
        return sample_points(feature_map, points, STRIDE_PX, self.config.aligned)


def sample_points(feature_map: Tensor, points: Tensor, stride: int, aligned: Aligned = "corners") -> Tensor:
    """Read a map (B, C, h, w) at `points` (B, N, 2), x and y in pixels `stride` times smaller than the map's.

    Returns (B, N, C). Bilinear, zero outside. By the "corners", the rule of the published models, 0 is the centre of
    the first pixel of the map and w * stride that of the last; by "pixels", pixel i covers [i, i + 1) * stride.
    """
    # Half precision cannot tell neighbouring pixels of a large tile apart.
    wide = torch.promote_types(feature_map.dtype, torch.float32)
    size = torch.tensor([feature_map.shape[-1], feature_map.shape[-2]], dtype=wide, device=points.device) * stride
    grid = (2 * points.to(wide) / size - 1).unsqueeze(1)
    sampled = F.grid_sample(
        feature_map.to(wide), grid, mode="bilinear", padding_mode="zeros", align_corners=aligned == "corners"
    )
    return sampled.squeeze(2).transpose(1, 2).to(feature_map.dtype)


def build(encoder: str, config: Mapping[str, Any]) -> MuseBackbone:
    """Build a MUSE, `config` as `MuseConfig.of` reads it, with `encoder` where it names none."""
    return MuseBackbone(MuseConfig.of(config, encoder))


class VitEncoder(nn.Module):
    """A ViT's tokens after four of its blocks, each normalised, as maps at the patch's stride; the class token."""

    def __init__(self, config: MuseConfig) -> None:
        super().__init__()
        self.layers = config.extract_layers
        self.channels = (config.embed_dim,) * 4
        self.encoder = Vit(config)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        grid = x.shape[-2] // self.encoder.patch, x.shape[-1] // self.encoder.patch
        taps = self.encoder(x, self.layers)
        maps = [tokens[:, 1:].transpose(1, 2).unflatten(2, grid) for tokens in taps]
        return maps, taps[-1][:, 0]


class Vit(nn.Module):
    """The ViT of DINO: class token, learned positions, pre-norm blocks."""

    def __init__(self, config: MuseConfig) -> None:
        super().__init__()
        self.patch, dim = config.patch, config.embed_dim
        self.patch_embed = PatchEmbed(config.patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (config.img_size // config.patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Return the normalised tokens (B, 1 + N, D) after each of `layers`, class token first."""
        grid = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)], dim=1)
        tokens = tokens + positions(self.pos_embed, grid)
        taps = {}
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in layers:
                taps[i] = self.norm(tokens)
        return [taps[i] for i in layers]


def positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return a position embedding (1, 1 + g*g, D) for `grid` rows and columns of patches, as it is where they agree."""
    side = math.isqrt(table.shape[1] - 1)
    return table if grid == (side, side) else resample_positions(table, grid)


def resample_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a position embedding bicubically to `grid`, also where it has that size already.

    The scale is (n + 0.1) / g, as in DINO: the 0.1 guards against a lost row, and moves the values even at n = g,
    which every load of a published MUSE does.
    """
    prefix, patches = table[:, :1], table[:, 1:]
    side = math.isqrt(patches.shape[1])
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    resized = F.interpolate(square, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class ConvEncoder(nn.Module):
    """A convolutional network of timm: its maps at strides 4, 8, 16, 32, and the mean of the last.

    Raises ValueError when the network has no such maps.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder, self._indices, self.channels = conv_network(name, _STRIDES)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        maps = self.encoder.forward_intermediates(x, indices=self._indices, intermediates_only=True)
        return maps, maps[-1].mean(dim=(2, 3))


class Decoder(nn.Module):
    """Four maps to one at stride 4: a U-Net's decoder, all of whose levels are concatenated.

    mapped  a 1x1 convolution takes each map of the encoder to its width first.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], mapped: bool, aligned: Aligned) -> None:
        super().__init__()
        w1, w2, w3, w4 = widths
        self.aligned = aligned
        if mapped:
            pairs = zip(channels, widths, strict=True)
            self.dim_map_layers = nn.ModuleList(nn.Conv2d(c, w, 1, bias=False) for c, w in pairs)
        self.mapped = mapped
        self.decoder3 = DecoderBlock(w4 + w3, w3, aligned)
        self.decoder2 = DecoderBlock(w3 + w2, w2, aligned)
        self.decoder1 = DecoderBlock(w2 + w1, w1, aligned)
        self.hyper_feats = HyperFeatures(widths, w1, aligned)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return (B, 4 * w1, H/4, W/4) for `size` (H, W) in input pixels."""
        if self.mapped:
            maps = [layer(level) for layer, level in zip(self.dim_map_layers, maps, strict=True)]
        # What stands at its stride already is not touched; a ViT's maps all come at stride 16. An odd grid of patches
        # has no half, so the coarsest map is rounded down, as published, and later levels follow the finer one.
        e1, e2, e3, e4 = (
            resize(level, (size[0] // stride, size[1] // stride), self.aligned) if self.mapped else level
            for level, stride in zip(maps, _STRIDES, strict=True)
        )
        d3 = self.decoder3(e4, e3)
        d2 = self.decoder2(d3, e2)
        d1 = self.decoder1(d2, e1)
        return self.hyper_feats((d1, d2, d3, e4))


class DecoderBlock(nn.Module):
    """A deeper map enlarged to the size of a skip, joined with it, and convolved three times."""

    def __init__(self, c_in: int, c_out: int, aligned: Aligned) -> None:
        super().__init__()
        self.aligned = aligned
        self.first_block = ConvBN(c_in, c_out, 3)
        self.last_block = Residual(c_out)

    def forward(self, deeper: Tensor, skip: Tensor) -> Tensor:
        joined = torch.cat([resize(deeper, (skip.shape[-2], skip.shape[-1]), self.aligned), skip], dim=1)
        return self.last_block(F.relu(self.first_block(joined)))


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity, ReLU after the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(width, width, 3)
        self.conv2 = ConvBN(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class ConvBN(nn.Module):
    """Convolution without bias, batch norm."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(c_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class HyperFeatures(nn.Module):
    """All levels at `width` channels each, enlarged to the first one's size and concatenated."""

    def __init__(self, widths: Sequence[int], width: int, aligned: Aligned) -> None:
        super().__init__()
        self.aligned = aligned
        self.conv_list = nn.ModuleList(ConvBN(c, width, 1) for c in widths)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        size = int(levels[0].shape[-2]), int(levels[0].shape[-1])
        pairs = zip(self.conv_list, levels, strict=True)
        return torch.cat([resize(conv(level), size, self.aligned) for conv, level in pairs], 1)


def resize(x: Tensor, size: tuple[int, int], aligned: Aligned = "corners") -> Tensor:
    """Resize a map (B, C, h, w) bilinearly to `size`, with its corners or its pixels aligned; as it is at that size.

    By pixels a map is enlarged by a whole factor and cut off, since a map of an odd size reaches further than the one
    above it; one that must shrink is averaged.
    """
    if (x.shape[-2], x.shape[-1]) == tuple(size):
        return x
    if aligned == "pixels":
        factor = -(-size[0] // x.shape[-2])
        if factor == 1:
            return F.adaptive_avg_pool2d(x, size)
        return enlarged(x, factor)[..., : size[0], : size[1]]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
