"""Two paths that look at colours and have backbones to look into, so that their maps are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cellslide.types import ClassifierSpec, ClassSpec, CropSpec

CLASSES = (ClassSpec("red", (200, 30, 30)), ClassSpec("blue", (30, 30, 200)), ClassSpec("grey", (99, 99, 99)))
SPEC = ClassifierSpec(
    name="fake", mpp=0.5, local=CropSpec(32, 32), context=CropSpec(128, 64), mean=(0.0,) * 3, std=(1.0,) * 3,
    classes=CLASSES, organs=("breast", "lung"), weights_id="fake-typer", weights_sha256="ab" * 32,
)  # fmt: skip


class ColourStage(nn.Module):
    """Means over 4 x 4 px, so that a place of the map is a place of the picture."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 4)


class ColourNet(nn.Module):
    """A backbone whose features are how dark each channel is, averaged over the picture."""

    feature_info = ({"module": "stage"},)

    def __init__(self) -> None:
        super().__init__()
        self.stage = ColourStage()

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(1.0 - x).mean(dim=(2, 3))


class FakePaths(nn.Module):
    """Two paths: red is what is dark in green and blue, blue what is dark in red, grey takes no look."""

    shares_backbone = False

    def __init__(self) -> None:
        super().__init__()
        self.local_backbone, self.global_backbone, self.context_backbone = ColourNet(), ColourNet(), ColourNet()
        self.organs: list[Tensor] = []

    def local_path(self, local: Tensor, organ: Tensor) -> Any:
        self.organs.append(organ)
        return SimpleNamespace(logits=_logits(self.local_backbone(local)))

    def context_vector(self, context: Tensor) -> Tensor:
        return self.context_backbone(context)

    def global_path(self, local: Tensor, v: Tensor, u: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=_logits(self.global_backbone(local) + 0.5 * v))


def _logits(dark: Tensor) -> Tensor:
    return torch.stack([dark[:, 1] + dark[:, 2], 2 * dark[:, 0], 0 * dark[:, 0]], dim=1)


def fake_classifier(spec: ClassifierSpec = SPEC) -> Any:
    return SimpleNamespace(spec=spec, module=FakePaths(), entry=None)
