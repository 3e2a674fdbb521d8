"""Augmentation: what it may change, and that chance comes from the generator alone."""

from __future__ import annotations

import numpy as np

from cellslide.train.augment import pale_nuclei, recolor
from cellslide.train.recipe import AugmentConfig


def _nucleus() -> tuple[np.ndarray, np.ndarray]:
    image = np.full((64, 64, 3), 200, np.uint8)
    y, x = np.mgrid[:64, :64]
    labels = np.where((x - 32) ** 2 + (y - 32) ** 2 < 14**2, 1, 0).astype(np.int32)
    labels[0, 0] = -1
    image[labels == 1] = (90, 60, 130)
    return image, labels


def test_pale_nuclei_are_bleached_from_within_only() -> None:
    image, labels = _nucleus()
    lighter = 0
    for seed in range(20):
        out = pale_nuclei(np.random.default_rng(seed), AugmentConfig(pale_p=1.0), image, labels)
        assert np.array_equal(out[labels != 1], image[labels != 1])
        lighter += out[labels == 1].mean() > image[labels == 1].mean() + 3
    assert lighter >= 5


def test_without_pale_nuclei_nothing_is_drawn() -> None:
    image, labels = _nucleus()
    rng = np.random.default_rng(0)
    assert pale_nuclei(rng, AugmentConfig(pale_p=0.0), image, labels) is image
    assert rng.random() == np.random.default_rng(0).random()


def test_the_same_generator_gives_the_same_picture() -> None:
    image, _ = _nucleus()
    one, other, third = (recolor(np.random.default_rng(s), AugmentConfig(), image) for s in (1, 1, 2))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, third)
