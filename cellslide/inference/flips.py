"""A network of outlines that looks at every tile four times, mirrored, and gives the mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cellslide.errors import UsageError
from cellslide.types import ModelSpec

# Axes of (B, C, H, W) that are mirrored: none, left and right, top and bottom, both.
FLIPS: tuple[tuple[int, ...], ...] = ((), (3,), (2,), (2, 3))
HORIZONTAL_MAP, VERTICAL_MAP = 0, 1


class FlipMean(nn.Module):
    """The mean of a network's raw outputs over the four mirror images of its input, each mirrored back.

    forward: images (B, 3, H, W) -> the outputs of `module` by name. The mean of logits is that of log odds. A mirrored
    horizontal map runs the other way, so its sign changes with the axis; so does the vertical one's.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the mean outputs of images (B, 3, H, W)."""
        views = [self._view(images, axes) for axes in FLIPS]
        return {name: torch.stack([view[name] for view in views]).mean(0) for name in views[0]}

    def _view(self, images: Tensor, axes: tuple[int, ...]) -> dict[str, Tensor]:
        out: Mapping[str, Tensor] = self.module(images.flip(axes) if axes else images)
        return {name: _mirrored(name, value.float(), axes) for name, value in out.items()}


def _mirrored(name: str, value: Tensor, axes: tuple[int, ...]) -> Tensor:
    if value.ndim < 4 or not axes:
        return value  # A class of the whole tile has no places.
    value = value.flip(axes)
    if name != "hv_map":
        return value
    sign = value.new_ones(2)
    sign[HORIZONTAL_MAP] = -1 if 3 in axes else 1
    sign[VERTICAL_MAP] = -1 if 2 in axes else 1
    return value * sign.view(1, 2, 1, 1)


def with_flips(module: nn.Module, spec: ModelSpec) -> FlipMean:
    """Return the network that `--tta` asks for; raises UsageError for a model of boxes or points."""
    if spec.kind != "mask":
        raise UsageError(f"--tta: is for models of outlines, {spec.name} gives {spec.kind}s; leave it out")
    return FlipMean(module)
