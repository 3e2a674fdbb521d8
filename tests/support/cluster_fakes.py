"""Fake networks for processes that the tests do not share memory with: named by where they stand, so they pickle."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor

from cellslide.weights import LoadedModel
from tests.support.fake_classifier import fake_loaded
from tests.support.fakes import FakeMask, fake_model

# No disc and no background of the painted slides is as red as this without any green.
POISON = (250, 0, 0)


class DeadlyMask(FakeMask):
    """Ends its process, as the kernel does when memory runs out, when it sees the colour POISON."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        red, green, _ = x.unbind(1)
        if bool(((red > 0.95) & (green < 0.05)).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def load_deadly(model: str | None = None, weights: Path | None = None) -> LoadedModel:
    """Stand for `cellslide.weights.load_model`."""
    return LoadedModel(fake_model().spec, DeadlyMask().eval(), entry=None)


def load_fake_classifier(model: str | None = None, weights: Path | None = None) -> SimpleNamespace:
    """Stand for `cellslide.weights.classifier.load_classifier`."""
    return fake_loaded()
