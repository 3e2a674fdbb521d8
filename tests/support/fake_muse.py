"""A backbone whose map is the picture's own colours: what is read at a place is the colour there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cellslide.models.muse import MuseFeatures, sample_points
from cellslide.weights.manifest import Source, WeightsEntry
from cellslide.weights.muse import LoadedMuse


class FakeMuse(nn.Module):
    """Means of 4 x 4 pixels as features; notes the sizes of the batches it was given, fails above `fits`."""

    dim = 3

    def __init__(self, fits: int = 1000) -> None:
        super().__init__()
        self.fits, self.asked = fits, []

    def forward(self, x: Tensor) -> MuseFeatures:
        self.asked.append(len(x))
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return MuseFeatures(functional.avg_pool2d(x, 4), x.mean(dim=(2, 3)))

    def nucleus_features(self, feature_map: Tensor, points: Tensor) -> Tensor:
        return sample_points(feature_map, points, 4)


def fake_muse(module: nn.Module | None = None, mpp: float = 0.5, tile_px: int = 128) -> LoadedMuse:
    """Return a backbone as `load_muse` would; vectors are RGB / 255."""
    entry = WeightsEntry(
        "fake-muse", "backbone", "muse", source=Source(), mpp=mpp, tile_px=tile_px, mean=(0, 0, 0), std=(1, 1, 1)
    )
    return LoadedMuse(module or FakeMuse(), entry, "0" * 64)
