"""Instance scores: known answers, the published values, and plain re-computations by masks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellslide.evaluate.matching import (
    Overlaps,
    aji,
    aji_plus,
    assign,
    class_quality,
    dice,
    dice_ensemble,
    overlaps,
    panoptic_quality,
)
from tests.support.labelled import discs


def published(shared: Path, name: str) -> tuple[dict[str, Any], Any]:
    values = json.loads((shared / "parity" / "metrics.json").read_text())[name]
    return values, np.load(shared / "parity" / f"{name}.npz")


@pytest.mark.parametrize("name", ["pp_clean", "pp_noisy"])
def test_published_binary_scores(shared: Path, name: str) -> None:
    values, data = published(shared, name)
    pairs = overlaps(data["gen_inst"], data["m40_inst"])
    cellvit, hovernet = panoptic_quality(pairs), panoptic_quality(pairs, dq_epsilon=0)
    found = [cellvit.dq, cellvit.sq, cellvit.pq, hovernet.dq, hovernet.sq, hovernet.pq]
    expected = [values["bDQ"], values["bSQ"], values["bPQ"], *values["hovernet_pq"]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    found = [aji(pairs), aji_plus(pairs), dice(pairs), dice_ensemble(pairs)]
    np.testing.assert_allclose(found, [values[k] for k in ("aji", "aji_plus", "dice1", "dice2")], rtol=1e-12)


@pytest.mark.parametrize("name", ["pp_clean", "pp_noisy"])
def test_published_class_scores(shared: Path, name: str) -> None:
    values, data = published(shared, name)
    pairs = overlaps(data["gen_inst"], data["m40_inst"])
    true_class = np.array([np.bincount(data["gen_type"][data["gen_inst"] == i]).argmax() for i in pairs.true_id])
    type_of = dict(zip(data["m40_ids"].tolist(), data["m40_type"].tolist(), strict=True))
    pred_class = np.array([type_of[i] for i in pairs.pred_id.tolist()])
    found = class_quality(pairs, true_class, pred_class, 6)
    for quality, expected in zip(found, values["class_dq_sq_pq"], strict=True):
        expected = [np.nan if v is None else v for v in expected]
        np.testing.assert_allclose([quality.dq, quality.sq, quality.pq], expected, rtol=1e-12)
    assert np.nanmean([q.pq for q in found]) == pytest.approx(values["mPQ_image"], rel=1e-12)


def squares(*boxes: tuple[int, int, int, int]) -> np.ndarray[Any, Any]:
    """Label map (20, 30) with boxes xyxy labelled 1.. in order."""
    labels = np.zeros((20, 30), np.int32)
    for label, (x0, y0, x1, y1) in enumerate(boxes, 1):
        labels[y0:y1, x0:x1] = label
    return labels


def test_iou_of_exactly_one_half_is_no_match() -> None:
    true = squares((0, 0, 4, 2))
    half, more = squares((0, 0, 2, 2)), squares((0, 0, 3, 2))
    assert overlaps(true, half).iou.tolist() == [0.5]
    assert panoptic_quality(overlaps(true, half)).tp == 0
    assert panoptic_quality(overlaps(true, more)).tp == 1


def test_quality_by_hand() -> None:
    # One pair of IoU 6/8, one missed, two invented: DQ = 1 / (1 + .5 * 2 + .5 * 1).
    true = squares((0, 0, 4, 2), (10, 10, 14, 14))
    pred = squares((0, 0, 3, 2), (20, 0, 22, 2), (25, 0, 27, 2))
    quality = panoptic_quality(overlaps(true, pred), dq_epsilon=0)
    assert (quality.tp, quality.fp, quality.fn) == (1, 2, 1)
    assert quality.dq == pytest.approx(0.4, rel=1e-12)
    assert quality.sq == pytest.approx(0.75 / (1 + 1e-6), rel=1e-12)
    assert quality.pq == pytest.approx(0.3, rel=2e-6)


def test_image_without_truth_is_undefined_and_without_prediction_zero() -> None:
    empty, one = squares(), squares((0, 0, 4, 2))
    invented, missed = panoptic_quality(overlaps(empty, one)), panoptic_quality(overlaps(one, empty))
    assert np.isnan(invented.pq) and (invented.tp, invented.fp, invented.fn) == (0, 1, 0)
    assert (missed.dq, missed.sq, missed.pq, missed.fn) == (0.0, 0.0, 0.0, 1)
    assert aji(overlaps(one, empty)) == aji_plus(overlaps(empty, one)) == dice(overlaps(one, empty)) == 0.0
    assert all(np.isnan(score(overlaps(empty, empty))) for score in (aji, aji_plus, dice))


def test_label_numbers_do_not_matter() -> None:
    true = discs((60, 90), [(10, 10), (40, 30), (70, 40)], 8)
    pred = discs((60, 90), [(12, 10), (40, 33), (70, 40)], 8)
    renumbered = np.array([0, 2_000_000_000, 7, 31], np.int32)[pred]
    for score in (aji, aji_plus, dice, dice_ensemble):
        assert score(overlaps(true, pred)) == score(overlaps(true, renumbered))
    assert panoptic_quality(overlaps(true, pred)) == panoptic_quality(overlaps(true, renumbered))


def test_maps_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        overlaps(np.zeros((4, 5), int), np.zeros((5, 4), int))


def noisy_maps(seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, (90, 60), (25, 2))
    moved = centres + rng.normal(0, 3, centres.shape)
    true = discs((60, 90), [tuple(c) for c in centres], 6)
    return true, discs((60, 90), [tuple(c) for c in moved[3:]], 7)


@pytest.mark.parametrize("seed", range(3))
def test_sparse_counts_equal_masks(seed: int) -> None:
    true, pred = noisy_maps(seed)
    pairs = overlaps(true, pred)
    counted = {
        (int(pairs.true_id[t]), int(pairs.pred_id[p])): int(n)
        for t, p, n in zip(pairs.true_index, pairs.pred_index, pairs.inter, strict=True)
    }
    by_masks = {(t, p): int(((true == t) & (pred == p)).sum()) for t in range(1, 26) for p in range(1, 26)}
    assert counted == {k: v for k, v in by_masks.items() if v}
    assert pairs.true_area.tolist() == [int((true == t).sum()) for t in pairs.true_id]
    for t, p, iou in zip(pairs.true_id[pairs.true_index], pairs.pred_id[pairs.pred_index], pairs.iou, strict=True):
        assert iou == ((true == t) & (pred == p)).sum() / ((true == t) | (pred == p)).sum()


@pytest.mark.parametrize("seed", range(3))
def test_aji_equals_its_definition(seed: int) -> None:
    true, pred = noisy_maps(seed)
    inter = union = 0
    used = set()
    for t in np.unique(true[true > 0]):
        best = max(
            (((true == t) & (pred == p)).sum() / ((true == t) | (pred == p)).sum(), -int(p))
            for p in np.unique(pred[pred > 0])
        )
        if best[0] == 0:
            union += (true == t).sum()
            continue
        p = -best[1]
        used.add(p)
        inter, union = inter + ((true == t) & (pred == p)).sum(), union + ((true == t) | (pred == p)).sum()
    union += sum((pred == p).sum() for p in np.unique(pred[pred > 0]) if p not in used)
    assert aji(overlaps(true, pred)) == pytest.approx(inter / union, rel=1e-12)


def test_aji_may_use_a_prediction_twice_and_aji_plus_may_not() -> None:
    true, pred = squares((0, 0, 4, 4), (4, 0, 8, 4)), squares((0, 0, 8, 4))
    pairs = overlaps(true, pred)
    assert aji(pairs) == pytest.approx(32 / 64)
    assert aji_plus(pairs) == pytest.approx(16 / (32 + 16))


def test_restricting_to_a_class_equals_restricted_maps() -> None:
    true, pred = noisy_maps(5)
    pairs = overlaps(true, pred)
    kept = pairs.keep(pairs.true_id % 2 == 0, pairs.pred_id % 3 == 0)
    direct = overlaps(np.where(true % 2 == 0, true, 0), np.where(pred % 3 == 0, pred, 0))
    for name in Overlaps.__slots__:
        np.testing.assert_array_equal(getattr(kept, name), getattr(direct, name))


@pytest.mark.parametrize("seed", range(20))
def test_assignment_has_the_greatest_gain(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = [(i, j) for i in range(5) for j in range(4) if rng.random() < 0.5]
    gain = rng.random(len(edges)) + 0.01
    left, right = (np.array([e[k] for e in edges]) for k in (0, 1))
    chosen = assign(left, right, gain)
    assert len(set(left[chosen])) == len(set(right[chosen])) == len(chosen)
    best = max(
        sum(gain[list(some)])
        for n in range(5)
        for some in itertools.combinations(range(len(edges)), n)
        if len({edges[k][0] for k in some}) == len({edges[k][1] for k in some}) == n
    )
    assert gain[chosen].sum() == pytest.approx(best, rel=1e-12)


def test_assignment_of_nothing() -> None:
    none = np.zeros(0, int)
    assert len(assign(none, none, np.zeros(0))) == 0
