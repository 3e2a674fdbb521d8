"""How samples come to a training: by draw number, from sets by their weight, or whole and in order to validate."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cellslide.train.task import Run

ItemT = TypeVar("ItemT")


class Draws(Generic[ItemT]):
    """The items of several groups: a group by its weight, then each of its items alike."""

    def __init__(self, groups: Iterable[tuple[float, Sequence[ItemT]]]) -> None:
        weights, self.items = zip(*groups, strict=True)
        self.cumulative = np.cumsum(np.array(weights, np.float64) / np.sum(weights))

    def draw(self, rng: np.random.Generator) -> ItemT:
        """Draw an item."""
        chosen = min(int(np.searchsorted(self.cumulative, rng.random(), side="right")), len(self.items) - 1)
        items = self.items[chosen]
        return items[int(rng.integers(len(items)))]


class DrawSampler(Sampler[int]):
    """The draw numbers of an epoch: epoch e draws e * n .. e * n + n - 1, so they never repeat and need no state."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.n, (self.epoch + 1) * self.n))

    def __len__(self) -> int:
        return self.n


def draw_loader(dataset: Dataset[Any], run: Run, collate: Callable[[Any], Any] | None = None) -> DataLoader[Any]:
    """Return the loader of batches drawn by number; `workers` processes prepare them (0: in this one).

    Lightning starts the workers before it sets the sampler's epoch, so a resumed run sets its first one here.
    """
    recipe = run.recipe
    sampler = DrawSampler(recipe.epoch_steps * recipe.batch_size)
    sampler.set_epoch(run.first_epoch)
    return batch_loader(dataset, sampler, recipe.batch_size, run.options.workers, collate)


def batch_loader(
    dataset: Dataset[Any],
    sampler: Sampler[int],
    batch_size: int,
    workers: int,
    collate: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Return the loader of whole batches in a sampler's order; `workers` processes stay for all epochs."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=start_worker,
        collate_fn=collate,
        drop_last=True,
    )


def start_worker(_: int) -> None:
    """Keep a worker to one thread, and let the process that trains decide how to end."""
    # `timeout` and schedulers signal the whole group; a worker that dies first would turn a clean stop into an error.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def whole_loader(sets: Sequence[Any]) -> DataLoader[Any]:
    """Return the loader of the images of `sets` that validate, whole and one at a time."""
    items: Any = [image for s in sets for image in s.val]
    return DataLoader(items, batch_size=None, collate_fn=_as_it_is)


def _as_it_is(item: Any) -> Any:
    return item
