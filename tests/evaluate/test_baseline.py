"""The classical segmenter on painted nuclei and on real tissue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellslide.evaluate.baseline import BaselineConfig, haematoxylin, segment_classical
from cellslide.evaluate.dataset import read_dataset
from cellslide.evaluate.matching import dice, overlaps, panoptic_quality
from tests.support.labelled import discs, paint

CENTRES = [(20, 22), (70, 20), (120, 30), (25, 70), (80, 75), (130, 80)]


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_separate_nuclei_are_found_at_any_pixel_size(mpp: float) -> None:
    scale = 0.25 / mpp
    true = discs((int(100 * scale), int(150 * scale)), [(x * scale, y * scale) for x, y in CENTRES], 12 * scale)
    found = segment_classical(paint(true), mpp)
    assert found.dtype == np.int32 and found.shape == true.shape
    quality = panoptic_quality(overlaps(true, found))
    assert (quality.tp, quality.fp, quality.fn) == (6, 0, 0) and quality.sq > 0.85


def test_touching_nuclei_are_parted() -> None:
    true = discs((60, 90), [(30, 30), (52, 30)], 13)
    found = segment_classical(paint(true), 0.25)
    assert panoptic_quality(overlaps(true, found)).tp == 2


def test_specks_are_dropped_and_holes_filled() -> None:
    true = discs((80, 80), [(30, 30)], 14)
    image = paint(true)
    image[28:31, 28:31] = (240, 230, 238)
    image[70:73, 70:73] = (90, 60, 140)
    found = segment_classical(image, 0.25)
    assert len(np.unique(found)) == 2 and found[29, 29] > 0 and found[71, 71] == 0
    kept = segment_classical(image, 0.25, BaselineConfig(smooth_um=0.01, opening_um=0, min_area_um2=0.1))
    assert kept[71, 71] > 0


def test_blank_image_holds_nothing() -> None:
    assert not segment_classical(np.full((50, 40, 3), 230, np.uint8), 0.25).any()


def test_haematoxylin_is_high_in_nuclei() -> None:
    true = discs((40, 40), [(20, 20)], 10)
    density = haematoxylin(paint(true))
    assert density[true > 0].min() > density[true == 0].max()


def test_real_tissue(shared: Path) -> None:
    sample = read_dataset(shared / "data" / "tnbc").samples[1]
    pairs = overlaps(sample.load_mask(), segment_classical(sample.load_image(), 0.25))
    assert panoptic_quality(pairs).pq > 0.4 and dice(pairs) > 0.7
