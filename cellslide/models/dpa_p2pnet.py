"""DPA-P2PNet (PromptNucSeg's prompter): nuclei as points from a pyramid of a convolutional network, as published.

Parameters keep the published names: network and two feature pyramids below `backbone.`, heads beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cellslide.models.point_head import PointHead, PointOutput, found_points, mask_head, size_of
from cellslide.models.pyramid import conv_network


@dataclass(frozen=True, slots=True)
class DpaP2pnetConfig:
    """Sizes of a DPA-P2PNet; the defaults are the published ones for PanNuke.

    encoder   a network of timm that has maps at strides 4 to 32.
    n_levels  maps of the first pyramid that the heads read, from stride 4 on.
    """

    encoder: str = "convnext_small"
    n_classes: int = 5
    hidden: int = 256
    space_px: int = 8
    n_levels: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.n_levels <= 4:
            raise ValueError(f"n_levels {self.n_levels}: must be 1 to 4")


class DpaP2pnet(PointHead):
    """The published detector. forward: float (B, 3, H, W), normalised, edges multiples of 32 -> `found_points`.

    `scores` are the probability of the best class, by which the published rule suppresses neighbours.
    """

    def __init__(self, config: DpaP2pnetConfig) -> None:
        super().__init__(config.hidden, config.n_classes, config.hidden, config.space_px, n_maps=config.n_levels)
        self.config = config
        # The published last convolution pads its 1x1 kernel, so the map has a border of one pixel before it is resized.
        self.mask_head: nn.Sequential = mask_head(config.hidden, config.hidden, border=1)
        self.backbone = TwoPyramids(config)

    @property
    def n_types(self) -> int:
        """How many classes `forward` gives."""
        return self.config.n_classes

    def raw(self, x: Tensor) -> PointOutput:
        """Return what the heads say before any decision; the mask (B, 1, H, W) is resized to the picture."""
        maps, fine = self.backbone(x)
        points, logits = self.regress(maps, size_of(x))
        mask = F.interpolate(self.mask_head(fine), size=size_of(x), mode="bilinear", align_corners=True)
        return PointOutput(points, logits, mask)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        maps, _ = self.backbone(x)
        return found_points(PointOutput(*self.regress(maps, size_of(x))), size_of(x), score="class")


class TwoPyramids(nn.Module):
    """A network with two feature pyramids: one for the points, one of a single level for the mask."""

    def __init__(self, config: DpaP2pnetConfig) -> None:
        super().__init__()
        self.backbone, self._indices, channels = conv_network(config.encoder, (4, 8, 16, 32))
        self.neck = Pyramid(channels, config.hidden, config.n_levels)
        self.neck1 = Pyramid(channels, config.hidden, 1)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps that the points are read from, the finest first, and the one for the mask."""
        maps = self.backbone.forward_intermediates(x, indices=self._indices, norm=False, intermediates_only=True)
        return self.neck(maps), self.neck1(maps)[0]


class Pyramid(nn.Module):
    """Feature pyramid (Lin et al. 2017): each level adds the coarser ones; the first `n_levels` are convolved."""

    def __init__(self, channels: Sequence[int], width: int, n_levels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(Convolution(c, width, 1) for c in channels)
        self.fpn_convs = nn.ModuleList(Convolution(width, width, 3) for _ in range(n_levels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [conv(level) for conv, level in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[-2:], mode="nearest")
        return [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=False)]


class Convolution(nn.Module):
    """A convolution below `conv.`, as the published pyramid names it."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def build(config: Mapping[str, Any]) -> DpaP2pnet:
    """Build the detector with `config` over the published sizes; raises TypeError for keys that are not known."""
    return DpaP2pnet(DpaP2pnetConfig(**config))
