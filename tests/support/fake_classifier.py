"""A fake classifier of two paths with the interface of `models.nuclass`: it looks at colours, so its answer is known.

The local path says "blue" where the middle of the local crop is bluer than red, "pink" where not, the surer the
stronger. The global path says so of the whole context. The gate is the mean green of the context. Mean 0 and std 1:
the input is the pixel's value / 255.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from cellslide.types import Calibration, ClassifierSpec, ClassSpec, CropSpec

CLASSES = (ClassSpec("pink", (255, 100, 100)), ClassSpec("blue", (60, 60, 220)))
SPEC = ClassifierSpec(
    name="fake-classifier",
    mpp=0.5,
    local=CropSpec(16, 8),
    context=CropSpec(64, 16),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    classes=CLASSES,
    organs=("breast", "lung"),
    calibration=Calibration(
        temperature_local=1.5, temperature_mix=0.8, reliability_local=(0.9, 0.8), reliability_global=(0.7, 0.95)
    ),
    weights_id="fake-classifier",
    weights_sha256="1" * 64,
    licence="Apache-2.0",
)


@dataclass
class LocalOut:
    features: Tensor
    logits: Tensor
    raw: Tensor


@dataclass
class GlobalOut:
    fused: Tensor
    logits: Tensor


class FakeNuClass(nn.Module):
    """Counts what it is asked; `fits` rows at a time, where given, are all that its memory holds."""

    context_patch_px = 4
    has_global = True

    def __init__(self, shares_backbone: bool = False, fits: int | None = None) -> None:
        super().__init__()
        self.shares_backbone, self.fits = shares_backbone, fits
        self.seen = {"local": 0, "context": 0, "global": 0}

    def _count(self, name: str, n: int) -> None:
        if self.fits is not None and n > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        self.seen[name] += n

    def local_path(self, local: Tensor, organ: Tensor) -> LocalOut:
        self._count("local", len(local))
        h = local.shape[-1] // 4
        middle = local[:, :, h:-h, h:-h].mean(dim=(2, 3)).float()
        features = middle * (1 + 0.1 * organ[:, None].float())
        return LocalOut(features, _blueness(features), middle)

    def context_vector(self, context: Tensor) -> Tensor:
        self._count("context", len(context))
        return context.mean(dim=(2, 3)).float()

    def global_path(self, local: Tensor | None, v: Tensor, u: Tensor | None = None) -> GlobalOut:
        assert (local is None) == self.shares_backbone and (u is None) != self.shares_backbone
        self._count("global", len(v))
        return GlobalOut(v, _blueness(v))

    def gate(self, features: Tensor, fused: Tensor, logits_local: Tensor, logits_global: Tensor) -> Tensor:
        return fused[:, 1]


def _blueness(mean: Tensor) -> Tensor:
    margin = 10 * (mean[:, 2] - mean[:, 0])
    return torch.stack([-margin, margin], dim=1)


def fake_loaded(module: FakeNuClass | None = None, **changes: object) -> SimpleNamespace:
    """Return a fake classifier as `load_classifier` would, with some fields of its spec changed."""
    return SimpleNamespace(spec=replace(SPEC, **changes), module=(module or FakeNuClass()).eval(), entry=None)
