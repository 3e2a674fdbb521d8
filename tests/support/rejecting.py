"""A slide of which some nuclei abstain and some objects are rejected: discs of five colours, typed by a fake."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from cellslide.store.table_schema import NOT_NUCLEUS
from cellslide.types import ClassSpec
from tests.painted import grid_centres, paint_slide
from tests.support.fake_classifier import CLASSES, FakeNuClass, GlobalOut, LocalOut, fake_loaded

# Surely blue, surely pink, rejected, blue at best, and at best no nucleus.
COLORS = ((60, 60, 220), (220, 60, 60), (60, 120, 60), (110, 60, 130), (60, 107, 60))
ABSTAIN = 0.85
STEP_PX, SIZE_PX = 50, (600, 400)


class Rejecting(FakeNuClass):
    """Types as its parent does, and takes what is green for no nucleus, the surer the greener."""

    def local_path(self, local: Tensor, organ: Tensor) -> LocalOut:
        out = super().local_path(local, organ)
        return LocalOut(out.features, _with_green(out.logits, out.raw), out.raw)

    def global_path(self, local: Tensor | None, v: Tensor, u: Tensor | None = None) -> GlobalOut:
        out = super().global_path(local, v, u)
        return GlobalOut(out.fused, _with_green(out.logits, v))


def _with_green(logits: Tensor, mean: Tensor) -> Tensor:
    return torch.cat([logits, 80 * (mean[:, 1:2] - 0.4)], dim=1)


def rejecting_classifier(*_: object) -> SimpleNamespace:
    """Stand for `cellslide.weights.classifier.load_classifier`."""
    return fake_loaded(Rejecting(), classes=(*CLASSES, ClassSpec(NOT_NUCLEUS, (90, 90, 90))))


def paint_doubtful(path: Path) -> int:
    """Paint a slide with as many discs of each colour, give or take one, and return how many there are."""
    centres = grid_centres(*SIZE_PX, STEP_PX)
    colors = [COLORS[k % len(COLORS)] for k in range(len(centres))]
    paint_slide(path, *SIZE_PX, 0.5, centres, 7.0, disc_color=colors)
    return len(centres)
