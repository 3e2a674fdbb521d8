"""HoVer U-Net: a convolutional encoder of timm, which may have seen images before, under one decoder for all maps.

HoVer-Net's outputs (Graham et al. 2019) from a U-Net (Ronneberger et al. 2015). It gives the maps of CellVTA by the
same names, so it is trained, decoded and exported as one, and it has no ViT: on a CPU it takes a quarter of the time of
a CellVTA of the same number of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellslide.models.layers import Conv2DBlock, enlarged
from cellslide.models.pyramid import conv_network

STRIDES = (2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class HoverUNetConfig:
    """Sizes of a HoVer U-Net.

    encoder             network of timm with maps at 1/2 to 1/32.
    widths              channels of the decoder at 1/2, 1/4, 1/8 and 1/16.
    num_nuclei_classes  includes background; 0 leaves the types out.
    """

    encoder: str = "tf_efficientnet_lite0"
    widths: tuple[int, int, int, int] = (32, 64, 96, 128)
    num_nuclei_classes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(int(w) for w in self.widths))
        if len(self.widths) != 4 or min(self.widths) < 1:
            raise ValueError(f"widths {self.widths} must be four numbers of channels")


class HoverUNet(nn.Module):
    """forward: images (B, 3, H, W), normalised, sides multiples of 16, to raw logits by published name:
    (B, 2, H, W) nuclei and HV maps, (B, K, H, W) types."""

    def __init__(self, cfg: HoverUNetConfig) -> None:
        super().__init__()
        self.config = cfg
        self.encoder, self._indices, channels = conv_network(cfg.encoder, STRIDES)
        self.outputs = {"nuclei_binary_map": 2, "hv_map": 2}
        self.n_types = max(cfg.num_nuclei_classes - 1, 0)
        if cfg.num_nuclei_classes:
            self.outputs["nuclei_type_map"] = cfg.num_nuclei_classes
        self.decoder = SharedDecoder(channels, cfg.widths, sum(self.outputs.values()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[-1] % 16 or x.shape[-2] % 16:
            raise ValueError(f"image of {x.shape[-1]} x {x.shape[-2]} px: both sides must be multiples of 16")
        levels = self.encoder.forward_intermediates(x, indices=self._indices, intermediates_only=True)
        maps = self.decoder(levels).split(list(self.outputs.values()), dim=1)
        return dict(zip(self.outputs, maps, strict=True))


class SharedDecoder(nn.Module):
    """One decoder for all maps, from a pyramid at 1/2 to 1/32 to logits (B, n_out, H, W).

    Nothing is computed at full size: the last layer gives each pixel of the map at 1/2 the four pixels that it stands
    for (Shi et al. 2016), since maps of full size cost most of the time and the memory of a decoder.

    channels  of the pyramid, the largest map first.
    widths    channels of the decoder's maps at 1/2, 1/4, 1/8 and 1/16.
    """

    def __init__(self, channels: tuple[int, ...], widths: tuple[int, int, int, int], n_out: int) -> None:
        super().__init__()
        below = (*widths[1:], channels[-1])
        self.merges = nn.ModuleList(
            nn.Sequential(Conv2DBlock(skip + deeper, width), Conv2DBlock(width, width))
            for skip, deeper, width in zip(channels[:-1], below, widths, strict=True)
        )
        self.head = nn.Conv2d(widths[0], 4 * n_out, 3, padding=1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        *skips, x = levels
        for skip, merge in zip(reversed(skips), reversed(self.merges), strict=True):
            # A map of an odd size at 1/32 reaches one pixel further than the one above it.
            x = merge(torch.cat([skip, enlarged(x, 2)[..., : skip.shape[-2], : skip.shape[-1]]], 1))
        return F.pixel_shuffle(self.head(x), 2)


def build(config: Mapping[str, Any]) -> HoverUNet:
    """Build a HoVer U-Net with `config` over its default sizes; raises TypeError or ValueError."""
    return HoverUNet(HoverUNetConfig(**config))
