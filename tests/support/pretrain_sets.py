"""Fields for the pretraining tests: discs whose grey value tells which nucleus they are."""

from __future__ import annotations

import numpy as np

from cellslide.train.pixels import InMemory
from cellslide.train.pretrain.fields import Field, FieldSet
from cellslide.train.recipe import AugmentConfig

PLAIN = AugmentConfig(stain_p=0, color_p=0, blur_p=0, sharpen_p=0, noise_p=0, jpeg_p=0)
RADIUS = 6


def grey_of(nucleus: int) -> int:
    """Return the value that nucleus 0.. is painted with."""
    return 10 + 8 * nucleus


def grey_field(mpp: float = 0.5, size: int = 160, boxes: bool = True) -> Field:
    """Return a white field with 16 discs of radius 6 on a 4 x 4 grid, off its middle so that flips show."""
    image = np.full((size, size, 3), 255, np.uint8)
    xy = np.array([(18.5 + 34 * x, 14.5 + 37 * y) for y in range(4) for x in range(4)])
    rows, cols = np.mgrid[0:size, 0:size] + 0.5
    for k, (x, y) in enumerate(xy):
        image[(cols - x) ** 2 + (rows - y) ** 2 <= RADIUS**2] = grey_of(k)
    box = np.concatenate([xy - RADIUS, xy + RADIUS], axis=1) if boxes else np.full((16, 4), np.nan)
    return Field("grey", InMemory(image), size, size, mpp, xy, box)


def grey_sets(n: int = 2) -> list[FieldSet]:
    """Return one set of fields."""
    return [FieldSet("grey", 1.0, tuple(grey_field() for _ in range(n)))]
