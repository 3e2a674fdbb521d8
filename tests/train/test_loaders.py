"""Draws by number and by weight, and whole images in order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.train.hover.recipe import HoverRecipe
from cellslide.train.loaders import Draws, DrawSampler, draw_loader, whole_loader
from cellslide.train.task import FitOptions, Run


class Numbers(Dataset[int]):
    """Gives back the number that is drawn."""

    def __getitem__(self, draw: int) -> int:
        return draw


def test_groups_are_drawn_by_weight_and_their_items_alike() -> None:
    draws: Draws[str] = Draws([(3.0, ["a", "b"]), (1.0, ["c"])])
    rng = np.random.default_rng(0)
    found = [draws.draw(rng) for _ in range(4000)]
    assert [found.count(name) / 4000 for name in "abc"] == pytest.approx([0.375, 0.375, 0.25], abs=0.03)
    twice = (draws.draw(np.random.default_rng([0, k])) for k in (7, 7))
    assert next(twice) == next(twice)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_begins_where_the_last_one_ended(workers: int) -> None:
    run = Run(HoverRecipe(batch_size=2, epoch_samples=5), FitOptions(Path(), workers=workers), [], first_epoch=3)
    loader = draw_loader(Numbers(), run, collate=list)
    # The incomplete third batch is not drawn, so an epoch is four numbers.
    assert list(loader) == [[12, 13], [14, 15]]
    assert isinstance(loader.sampler, DrawSampler)
    loader.sampler.set_epoch(4)
    assert list(loader) == [[16, 17], [18, 19]]


def test_whole_images_come_as_they_are_one_by_one() -> None:
    images: list[Any] = [{"a": 1}, "b", np.zeros((2, 3))]
    assert all(given is image for given, image in zip(whole_loader([SimpleNamespace(val=images)]), images, strict=True))
