"""Suppression of points that stand for one nucleus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellslide.nuclei.nms import point_nms
from tests.support.parity import load_fixture


def test_published_case(shared: Path) -> None:
    _, case = load_fixture(shared, "point_nms_match")
    kept = point_nms(case["points"], case["scores"], 12)
    for name in ("points", "scores", "classes"):
        assert np.array_equal(case[name][kept], case[f"nms12_{name}"])


def test_published_detector(shared: Path) -> None:
    _, case = load_fixture(shared, "dpa_p2pnet_convnext_atto")
    kept = point_nms(case["predict_points_no_nms"], case["predict_scores_no_nms"], 12)
    assert np.array_equal(case["predict_points_no_nms"][kept], case["predict_points_nms12"])


def test_the_best_stays_and_a_dropped_point_drops_none() -> None:
    # A chain: 1 drops 0 and 2, so 3 is near a dropped point only and stays.
    xy = np.array([[0, 0], [5, 0], [10, 0], [15, 0]], np.float64)
    assert point_nms(xy, np.array([0.5, 0.9, 0.6, 0.1]), 5).tolist() == [1, 3]
    assert point_nms(xy, np.array([0.5, 0.9, 0.6, 0.1]), 4.99).tolist() == [0, 1, 2, 3]


def test_of_equal_scores_the_first_stays() -> None:
    assert point_nms(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([0.5, 0.5]), 5).tolist() == [0]
    assert point_nms(np.zeros((3, 2)), np.full(3, 0.5), 0).tolist() == [0]


def test_same_as_the_plain_rule_on_many_points() -> None:
    rng = np.random.default_rng(1)
    xy, score = rng.random((400, 2)) * 100, np.round(rng.random(400), 2)
    assert np.array_equal(point_nms(xy, score, 6), _kept(xy, score, 6))
    assert len(point_nms(xy, score, 6)) < 200


def _kept(xy: np.ndarray, score: np.ndarray, radius: float) -> list[int]:
    kept: list[int] = []
    for i in np.argsort(-score, kind="stable"):
        if all(np.hypot(*(xy[i] - xy[k])) > radius for k in kept):
            kept.append(int(i))
    return sorted(kept)


def test_no_points() -> None:
    assert point_nms(np.zeros((0, 2)), np.zeros(0), 3).tolist() == []


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 scores for 3 points"):
        point_nms(np.zeros((3, 2)), np.zeros(2), 3)
