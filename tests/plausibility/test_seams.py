"""Nuclei that are lost or doubled where tiles meet are seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cellslide.plausibility.seams import SeamCheck
from cellslide.slides.tiles import tile_grid
from cellslide.types import Plane
from tests.support.random_cells import slide_info


def seam_check(xy: np.ndarray, tile: np.ndarray) -> tuple[int, float, int, bool]:
    info = replace(slide_info(), mpp_x=0.5, mpp_y=0.5)
    check = SeamCheck(tile_grid(Plane.of(info, 0.5), 512, 64))
    for rows in np.array_split(np.arange(len(xy)), 3):
        check.add(xy[rows], tile[rows])
    verdict = check.verdict()
    return verdict.near, verdict.expected, verdict.twins, verdict.odd


def test_losses_and_doubles_along_seams_are_seen() -> None:
    """Random places have neither; nuclei taken out along the seams, or put there twice, are noticed."""
    rng = np.random.default_rng(3)
    xy = rng.uniform(0, (4000, 3000), (40_000, 2))
    tile = np.zeros(len(xy), np.int64)
    near, expected, twins, odd = seam_check(xy, tile)
    assert not odd and twins == 0 and abs(near - expected) < 4 * np.sqrt(expected)
    # Tiles of 512 px, 64 shared: they meet at 480, 928, ...
    cuts = 480 + 448 * np.arange(8)
    apart = np.abs(xy[:, :1] - cuts).min(axis=1) * 0.5
    lost = seam_check(xy[apart > 2], tile[apart > 2])
    assert lost[3] and lost[0] < near
    doubled = apart < 3
    both = np.concatenate([xy, xy[doubled] + (0.5, 0)])
    twice = seam_check(both, np.concatenate([tile, np.ones(doubled.sum(), np.int64)]))
    assert twice[2] >= 0.9 * doubled.sum() and twice[3]
