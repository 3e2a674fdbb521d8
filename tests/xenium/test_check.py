"""The check of bundle, alignment and slide: right ones pass, and every silent way of being wrong is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from cellslide import open_slide
from cellslide.cli.main import cli
from cellslide.config import TissueConfig
from cellslide.slides.tissue import find_tissue
from cellslide.types import Cells, Float64, UInt8
from cellslide.xenium.alignment import Alignment
from cellslide.xenium.bundle import Bundle
from cellslide.xenium.check import XeniumCheck, check_bundle, compare_fields, compare_nuclei
from tests.support.xenium_slide import PaintedPair, paint_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> PaintedPair:
    return paint_pair(tmp_path_factory.mktemp("pair"), turn=90)


def dark_spots(image: UInt8, mpp: float) -> Cells:
    """Find nuclei roughly, by their colour."""
    dark = cv2.morphologyEx(cv2.inRange(image[..., 0], 0, 140), cv2.MORPH_OPEN, np.ones((9, 9), np.uint8))
    _, _, stats, centre = cv2.connectedComponentsWithStats(dark)
    xy = centre[1:][stats[1:, cv2.CC_STAT_AREA] < 4000]
    n = len(xy)
    return Cells(xy, *(np.zeros(n, kind) for kind in (np.int32, np.int32, np.float32, np.float32)))


def check(pair: PaintedPair, matrix: Float64) -> XeniumCheck:
    bundle, alignment = Bundle(pair.bundle.folder), Alignment(matrix[None], 0.2125)
    with open_slide(pair.slide) as slide:
        test = compare_fields(slide, alignment, bundle.nuclei().centroid_um, dark_spots, 4)
        return check_bundle(bundle, slide, alignment, find_tissue(slide, TissueConfig()), test)


def test_a_right_alignment_is_good(pair: PaintedPair) -> None:
    found = check(pair, pair.matrix)
    assert found.verdict == "good", found
    assert found.test.median_um is not None and found.test.shifted_um is not None
    assert found.test.median_um < 0.5 * found.test.shifted_um
    assert found.inside_slide > 0.99 and found.inside_tissue > 0.95
    assert found.transcripts_used < found.transcripts_qv < found.transcripts
    assert found.mpp_matrix == pytest.approx(found.mpp_slide, rel=1e-3)


def moved(matrix: Float64) -> Float64:
    matrix[:2, 2] += 40 / 0.2125
    return matrix


def transposed(matrix: Float64) -> Float64:
    matrix[:2] = matrix[1::-1]
    return matrix


def mirrored(matrix: Float64) -> Float64:
    """Turn the slide over about its middle column."""
    flip = np.eye(3)
    flip[0, 0], flip[0, 2] = -1, 1700.0
    return np.asarray(matrix @ flip, np.float64)


@pytest.mark.parametrize("wrong", [moved, transposed, mirrored, np.linalg.inv])
def test_a_wrong_alignment_is_refused(pair: PaintedPair, wrong: Callable[[Float64], Float64]) -> None:
    found = check(pair, wrong(pair.matrix.copy()))
    assert found.verdict == "wrong"
    assert found.reasons


def test_a_pixel_size_that_differs_is_told(pair: PaintedPair) -> None:
    off = pair.matrix.copy()
    off[:2, :2] *= 1.05
    assert any("pixel of the slide" in words for words in check(pair, off).warnings)


def test_few_nuclei_decide_nothing() -> None:
    assert compare_nuclei(np.zeros((10, 2)), np.zeros((100, 2))).median_um is None
    rng = np.random.default_rng(0)
    places = rng.uniform(0, 1000, (2000, 2))
    right = compare_nuclei(places + rng.normal(0, 1, places.shape), places)
    chance = compare_nuclei(rng.uniform(0, 1000, (2000, 2)), places)
    assert right.median_um is not None and right.shifted_um is not None
    assert right.median_um < 0.2 * right.shifted_um
    assert chance.median_um is not None and chance.median_um > 0.8 * (chance.shifted_um or 0)


def test_the_command_ends_with_2_and_the_reason(pair: PaintedPair, tmp_path: Path) -> None:
    np.savetxt(tmp_path / "m.csv", np.linalg.inv(pair.matrix), delimiter=",")
    line = ["xenium", "check", str(pair.bundle.folder), "--slide", str(pair.slide), "--fields", "1"]
    wrong = CliRunner().invoke(cli, [*line, "--alignment", str(tmp_path / "m.csv"), "--json"])
    assert wrong.exit_code == 2
    assert "lie on the slide" in wrong.stderr
    assert json.loads(wrong.stdout)["verdict"] == "wrong"
    missing = CliRunner().invoke(cli, line)
    assert missing.exit_code == 2
    assert "--alignment" in missing.stderr
