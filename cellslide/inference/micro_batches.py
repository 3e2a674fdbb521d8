"""A network on its device, run in micro-batches of one size, which is halved where memory runs out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cellslide.config import InferConfig
from cellslide.errors import CellslideError
from cellslide.inference.device import (
    DTYPES,
    device_name,
    is_out_of_memory,
    peak_device_bytes,
    resolve_device,
    resolve_precision,
)

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Batched(Protocol):
    """What runs batches on a device."""

    device: str
    batch_size: int


def halve_batch(engine: Batched) -> bool:
    """Halve the batch size, since memory ran out, and log it; return False where it is 1 already."""
    if engine.batch_size == 1:
        return False
    engine.batch_size //= 2
    log.warning("out of memory on %s: going on with --batch-size %d", engine.device, engine.batch_size)
    return True


class OnDevice(ABC):
    """What networks for crops share: device, number format, normalisation, and what to do when memory runs out.

    batch_size  set by who derives from this; `too_large` says what to do where not even one fits.
    """

    batch_size: int

    def __init__(self, config: InferConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        """Raises MissingDependencyError when the device is not there."""
        self._device = resolve_device(config.device)
        self.device = device_name(self._device)
        self.precision = resolve_precision(config.precision, self._device)
        self._mean, self._std = (torch.tensor(v, device=self._device).view(1, 3, 1, 1) for v in (mean, std))

    @abstractmethod
    def too_large(self) -> str:
        """Return why even one does not fit into the device's memory, and what mends it."""

    def peak_device_bytes(self) -> int:
        """Return the most device memory torch has held (bytes)."""
        return peak_device_bytes(self._device)

    def normalised(self, images: Tensor) -> Tensor:
        """Return images (N, 3, h, w), 0..255, as the network takes them."""
        return (images / 255.0 - self._mean) / self._std

    def autocast(self) -> AbstractContextManager[None]:
        """Return what the network runs under, for the number format."""
        dtype = DTYPES[self.precision]
        return torch.autocast(self._device.type, dtype=dtype, enabled=dtype != torch.float32)

    def in_memory(self, run: Callable[[], Result]) -> Result:
        """Return what `run` gives; while memory runs out, `batch_size` is halved and it is called again.

        Raises CellslideError where not even one fits.
        """
        while True:
            try:
                return run()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: the error holds the tensors of the failed pass.
            self._halve()

    def _halve(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if not halve_batch(self):
            raise CellslideError(self.too_large())
