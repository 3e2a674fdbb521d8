"""Lightning, importable also beside a torchvision that was built for another torch.

Lightning imports torchmetrics, which imports torchvision if it is installed.
"""

from __future__ import annotations

from cellslide.models.torchvision_ops import declare_torchvision_operators

declare_torchvision_operators()

import lightning as L  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger  # noqa: E402

__all__ = ["CSVLogger", "L", "Logger", "TensorBoardLogger"]
