"""Detection scores: pairs one to one within the radius, published values, and class by class."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from cellslide.evaluate.detection import Tally, centroids, class_tallies, hover_type_score, pair_points, tally


@pytest.mark.parametrize("name", ["pp_clean", "pp_noisy"])
def test_published_detection_and_types(shared: Path, name: str) -> None:
    values = json.loads((shared / "parity" / "metrics.json").read_text())[name]
    data = np.load(shared / "parity" / f"{name}.npz")
    ids, xy = centroids(data["gen_inst"])
    # The published centroids are means of pixel indices, half a pixel less than ours, on both sides.
    pairs = pair_points(xy - 0.5, data["m40_centroid"], 12)
    counts = tally(pairs, len(xy), len(data["m40_centroid"]))
    assert len(pairs) == values["n_pairs"]
    assert [counts.f1, counts.precision, counts.recall] == pytest.approx(values["detection_f1_prec_rec"], rel=1e-12)
    true_class = np.array([np.bincount(data["gen_type"][data["gen_inst"] == i]).argmax() for i in ids])
    for class_index, expected in values["type_f1_prec_rec"].items():
        score = hover_type_score(pairs, true_class, data["m40_type"], int(class_index))
        assert score is not None
        assert [score.f1, score.precision, score.recall] == pytest.approx(expected, rel=1e-12)


def test_radius_is_inclusive_and_ends_there() -> None:
    true, near, far = np.array([[0.0, 0]]), np.array([[12.0, 0]]), np.array([[12.001, 0]])
    assert len(pair_points(true, near, 3 / 0.25)) == 1
    assert len(pair_points(true, far, 3 / 0.25)) == 0


def test_each_point_is_used_once() -> None:
    true, pred = np.array([[0.0, 0]]), np.array([[0.0, 1], [0, 0.5], [0, 2]])
    pairs = pair_points(true, pred, 5)
    assert pairs.pred_index.tolist() == [1] and pairs.distance_px.tolist() == [0.5]
    assert tally(pairs, 1, 3) == Tally(tp=1, fp=2, fn=0)


def test_a_near_pair_does_not_cost_another() -> None:
    # Nearest first would pair the middle ones and leave both ends alone.
    true, pred = np.array([[0.0, 0], [10, 0]]), np.array([[9.0, 0], [19.0, 0]])
    assert len(pair_points(true, pred, 9.5)) == 2


def test_x_and_y_are_not_exchanged() -> None:
    labels = np.zeros((10, 30), np.int32)
    labels[2:4, 20:26] = 7
    ids, xy = centroids(labels)
    assert ids.tolist() == [7] and xy.tolist() == [[23.0, 3.0]]


def test_no_points_and_bad_radius() -> None:
    none, one = np.zeros((0, 2)), np.zeros((1, 2))
    assert len(pair_points(none, one, 3)) == len(pair_points(one, none, 3)) == 0
    assert centroids(np.zeros((4, 4), np.int32))[1].shape == (0, 2)
    with pytest.raises(ValueError, match="radius"):
        pair_points(one, one, 0)


def most_pairs(near: np.ndarray) -> int:
    n_true, n_pred = near.shape
    return max(
        sum(near[t, p] for t, p in enumerate(order) if p < n_pred)
        for order in itertools.permutations(range(n_pred + n_true), n_true)
    )


@pytest.mark.parametrize("seed", range(8))
def test_as_many_pairs_as_there_can_be(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, pred = rng.uniform(0, 10, (4, 2)), rng.uniform(0, 10, (4, 2))
    near = np.linalg.norm(true[:, None] - pred[None], axis=2) <= 4
    pairs = pair_points(true, pred, 4)
    assert len(pairs) == most_pairs(near)
    np.testing.assert_allclose(
        pairs.distance_px, np.linalg.norm(true[pairs.true_index] - pred[pairs.pred_index], axis=1)
    )


@pytest.mark.parametrize("seed", range(4))
def test_order_of_points_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, pred = rng.uniform(0, 100, (120, 2)), rng.uniform(0, 100, (130, 2))
    shuffled = rng.permutation(len(pred))
    pairs, again = pair_points(true, pred, 6), pair_points(true, pred[shuffled], 6)
    assert pairs.true_index.tolist() == again.true_index.tolist()
    assert pairs.pred_index.tolist() == shuffled[again.pred_index].tolist()


def test_class_tallies_count_a_wrong_type_twice() -> None:
    xy = np.array([[0.0, 0], [50, 0], [100, 0]])
    found = class_tallies(xy, np.array([0, 0, 1]), xy, np.array([0, 1, -1]), 2, 6)
    assert found == [Tally(tp=1, fp=0, fn=1), Tally(tp=0, fp=1, fn=1)]


def test_tally_adds_up_and_is_undefined_without_objects() -> None:
    total = Tally(8, 2, 0) + Tally(0, 0, 4)
    assert (total.precision, total.recall, total.support) == (0.8, 8 / 12, 12)
    assert total.f1 == pytest.approx(16 / 22)
    assert Tally().precision is None and Tally().recall is None and Tally().f1 is None
    assert Tally(0, 3, 0).f1 == 0 and Tally(0, 0, 3).f1 == 0


def test_hover_score_of_an_absent_class_is_none() -> None:
    xy = np.array([[0.0, 0]])
    pairs = pair_points(xy, xy, 3)
    assert hover_type_score(pairs, np.array([1]), np.array([1]), 2) is None
    wrong = hover_type_score(pairs, np.array([1]), np.array([2]), 2)
    assert wrong is not None and wrong.f1 == 0.0
