"""Lightning, importable also beside a torchvision that was built for another torch.

Lightning imports torchmetrics, which imports torchvision if it is installed. A CUDA build of torchvision beside a CPU
build of torch cannot load its operators and fails at import. Nothing here uses them, so declaring them is enough.
"""

from __future__ import annotations

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare_torchvision_operators() -> torch.library.Library | None:
    """Declare operators that torchvision registers at import if it cannot be imported; None if all is well."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        return library
    return None


_declared = declare_torchvision_operators()

import lightning as L  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger  # noqa: E402

__all__ = ["CSVLogger", "L", "Logger", "TensorBoardLogger"]
