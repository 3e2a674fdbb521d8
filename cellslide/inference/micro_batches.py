"""How many tiles or crops pass a network at once: chosen here, and halved where memory runs out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeVar

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
from cellslide.types import UInt8

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Item = Literal["tile", "crop", "window"]

# The most items, and pixels, of one pass. More gains a GPU nothing, and the host would hold gigabytes of a tile's maps.
_ANY = 1 << 62
LIMITS: dict[Item, dict[str, tuple[int, int]]] = {
    "tile": {"cpu": (2, 2 * 256**2), "mps": (4, 1024**2), "cuda": (64, 16 * 1024**2)},
    "crop": {"cpu": (8, 8 * 128**2), "mps": (8, _ANY), "cuda": (128, _ANY)},
    "window": {"cpu": (_ANY, 512**2), "mps": (_ANY, 512**2), "cuda": (_ANY, 64 * 512**2)},
}
# Share of a GPU's free memory that a batch may take.
FREE_SHARE = 0.6


class Batched(Protocol):
    """What runs batches on a device."""

    device: str
    batch_size: int


def auto_batch_size(item: Item, edge_px: int, device: torch.device) -> int:
    """Return the largest batch worth trying of items of this edge (px)."""
    most, pixels = LIMITS[item][device.type]
    return max(1, min(most, pixels // edge_px**2))


def fitting_batch_size(limit: int, device: torch.device, run_one: Callable[[], None]) -> int:
    """Return how many items fit into a GPU's memory, `limit` at most; one is tried, elsewhere it is the limit."""
    if device.type != "cuda":
        return limit
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_one()
    each = max(torch.cuda.max_memory_allocated(device) - before, 1)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(limit, int(FREE_SHARE * free / each)))


def halve_batch(engine: Batched) -> bool:
    """Halve the batch size, since memory ran out, and log it; return False where it is 1 already."""
    if engine.batch_size == 1:
        return False
    engine.batch_size //= 2
    log.warning("out of memory on %s: going on with --batch-size %d", engine.device, engine.batch_size)
    return True


def in_steps(
    engine: Batched, images: UInt8, attempt: Callable[[UInt8], Result | None], free: Callable[[], None]
) -> list[Result | None]:
    """Run images in micro-batches of at most `engine.batch_size`, which is halved where memory runs out.

    attempt  runs a micro-batch; None where memory ran out.
    free     waits for what is under way and gives memory back.
    Gives None for a tile that does not fit alone either.
    """
    steps: list[Result | None] = []
    first = 0
    while first < len(images):
        size = min(engine.batch_size, len(images) - first)
        step = attempt(images[first : first + size])
        if step is None:
            free()
            if halve_batch(engine):
                continue
            step = attempt(images[first : first + 1])
        steps.append(step)
        first += size
    return steps


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
