"""Both paths run again on a few cells, with maps of where the last block of each backbone looked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cellslide.inference.device import resolve_device
from cellslide.report.explain.gradcam import Seen, watching
from cellslide.types import Float32, Int64

if TYPE_CHECKING:
    from cellslide.weights.classifier import LoadedClassifier


@dataclass(frozen=True, slots=True)
class Heats:
    """Heat maps of N cells for one class each, (N, h, w), 0..1; the global path's are None where it has none."""

    local: Float32
    global_local: Float32 | None
    context: Float32 | None


@dataclass(frozen=True, slots=True)
class Rerun:
    """What both paths say of N cells when run again: probabilities (N, K), and heat maps per explained class."""

    local: Float32
    global_: Float32 | None
    heats: tuple[Heats, ...]


class Explainer:
    """A classifier that shows where it looks; fp32, gradients from the last block of each backbone on."""

    def __init__(self, loaded: LoadedClassifier, device: str = "auto") -> None:
        self.spec = loaded.spec
        self.device = resolve_device(device)
        # Without gradients of weights the graph begins at the last block, so a pass costs little more than typing.
        self.module: Any = loaded.module.eval().requires_grad_(False).to(self.device)
        self._mean, self._std = (
            torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.spec.mean, self.spec.std)
        )

    def run(self, local: Tensor, context: Tensor | None, organ: Tensor, targets: Sequence[Int64]) -> Rerun:
        """Run both paths on crops (N, 3, h, w), 0..255, and make maps for each of `targets`, class indices (N,).

        organ   int64 (N,), index in the weights' organs, -1 for unknown. Without `context` the local path runs alone.
        """
        with torch.enable_grad():
            crops = self._normalised(local)
            first, seen = self._local(crops, organ.to(self.device))
            if context is None:
                heats = [Heats(_map(seen, first, t), None, None) for t in targets]
                return Rerun(_prob(first), None, tuple(heats))
            second, own, wide = self._global(crops, self._normalised(context))
            heats = [Heats(_map(seen, first, t), _map(own, second, t), _map(wide, second, t)) for t in targets]
            return Rerun(_prob(first), _prob(second), tuple(heats))

    def _local(self, crops: Tensor, organ: Tensor) -> tuple[Tensor, Seen]:
        with watching(self.module.local_backbone) as seen:
            return self.module.local_path(crops, organ).logits.float(), seen

    def _global(self, crops: Tensor, context: Tensor) -> tuple[Tensor, Seen, Seen]:
        with ExitStack() as stack:
            own = stack.enter_context(watching(self.module.global_backbone))
            wide = stack.enter_context(watching(self.module.context_backbone))
            vector = self.module.context_vector(context)
            return self.module.global_path(crops, vector).logits.float(), own, wide

    def _normalised(self, crops: Tensor) -> Tensor:
        return (crops.to(self.device) / 255.0 - self._mean) / self._std


def _map(seen: Seen, logits: Tensor, target: Int64) -> Float32:
    rows = torch.arange(len(logits), device=logits.device)
    heat = seen.heat(logits[rows, torch.from_numpy(target).to(logits.device)])
    return heat.cpu().numpy().astype(np.float32)


def _prob(logits: Tensor) -> Float32:
    return logits.detach().softmax(dim=1).cpu().numpy().astype(np.float32)
