"""Lightning, importable also beside a torchvision that was built for another torch; its devices, precision and logs.

Lightning imports torchmetrics, which imports torchvision if it is installed.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from cellslide.errors import MissingDependencyError, UsageError
from cellslide.inference.device import cpu_computes_bf16
from cellslide.models.torchvision_ops import declare_torchvision_operators
from cellslide.train.recipe import Recipe

declare_torchvision_operators()

import lightning as L  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger  # noqa: E402

__all__ = ["L", "accelerator_of", "loggers", "precision_of"]


def accelerator_of(device: str) -> tuple[str, int | list[int]]:
    """Return Lightning's accelerator and devices for auto, cpu, mps, cuda or cuda:N; raises if it is not there."""
    name, _, index = device.partition(":")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name not in ("cpu", "mps", "cuda") or (index and not (name == "cuda" and index.isdigit())):
        raise UsageError(f"--device {device}: must be auto, cpu, mps, cuda or cuda:N")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[name]:
        raise MissingDependencyError(f"--device {device}: this device is not there; use --device cpu")
    return name, [int(index)] if index else 1


def precision_of(recipe: Recipe, accelerator: str) -> str:
    """Return Lightning's precision; auto is bf16 where the device computes it, which on a CPU needs AVX512-BF16."""
    if recipe.precision == "fp32":
        return "32-true"
    if recipe.precision == "bf16":
        return "bf16-mixed"
    quick = torch.cuda.is_bf16_supported() if accelerator == "cuda" else accelerator == "cpu" and cpu_computes_bf16()
    return "bf16-mixed" if quick else "32-true"


def loggers(folder: Path, first_epoch: int) -> list[Logger]:
    """Return a CSV logger, and a TensorBoard logger where it is installed.

    A resumed run writes a CSV file of its own, since Lightning deletes the one that it finds.
    """
    found: list[Logger] = [CSVLogger(folder, name="logs", version=f"csv_from_epoch_{first_epoch:04d}")]
    with suppress(ModuleNotFoundError):
        found.append(TensorBoardLogger(folder, name="logs", version="tensorboard"))
    return found
