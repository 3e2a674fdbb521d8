"""Calibration: parity of the safe gate's search, temperatures that are known, thresholds by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellslide.classify.decision import DecisionConfig, decide, mix, temper
from cellslide.errors import UsageError
from cellslide.evaluate.calibration import (
    FitConfig,
    accuracy_threshold,
    class_labels,
    f1_threshold,
    fit,
    fit_safe_gate,
    fit_temperature,
    fit_unseen,
    measure,
)
from cellslide.evaluate.classification import expected_calibration_error
from cellslide.types import Calibration, Float32, PathProbs


def drawn(n: int, seed: int, sharp: float = 1.0) -> tuple[Float32, np.ndarray]:
    """Probabilities of three classes whose labels are drawn from them, then made `sharp` times too sure."""
    rng = np.random.default_rng(seed)
    prob = rng.dirichlet((0.6, 0.6, 0.6), n)
    labels = np.array([rng.choice(3, p=p) for p in prob])
    return temper(prob.astype(np.float32), 1 / sharp), labels


@pytest.fixture(scope="module")
def published(shared: Path) -> tuple[PathProbs, np.ndarray, dict[str, object]]:
    with np.load(shared / "parity" / "nuclass_safe_gate.npz") as arrays:
        probs = PathProbs(arrays["p_local"], arrays["p_global"], arrays["gate"])
        labels = arrays["labels"]
    policy = json.loads((shared / "parity" / "nuclass_safe_gate.json").read_text())["config"]["calibration"]
    return probs, labels, policy


def test_search_of_the_safe_gate_is_the_published_one(
    published: tuple[PathProbs, np.ndarray, dict[str, object]], shared: Path
) -> None:
    probs, labels, policy = published
    found = fit(probs, labels, 16)
    assert (found.tau, found.gamma, found.safe_accepts) == (policy["tau"], policy["gamma"], True)
    rel = (np.array(r, np.float32) for r in (found.reliability_local, found.reliability_global))
    search = fit_safe_gate(probs, labels, *rel)
    assert (search.accuracy, search.baseline) == (policy["acc_safe"], policy["acc_base"])
    assert search.best_single == policy["best_single"]
    plain = Calibration(
        reliability_local=found.reliability_local,
        reliability_global=found.reliability_global,
        tau=found.tau,
        gamma=found.gamma,
    )
    with np.load(shared / "parity" / "nuclass_safe_gate.npz") as arrays:
        np.testing.assert_array_equal(
            decide(probs, DecisionConfig("safe"), plain).prob, arrays["safe_calibrated"].astype(np.float32)
        )


def test_thresholds_that_do_not_help_are_refused() -> None:
    """The gate points at the wrong path each time: the baseline alone is left."""
    local = np.array([[0.9, 0.1], [0.1, 0.9]] * 10, np.float32)
    global_ = np.array([[0.05, 0.95], [0.95, 0.05]] * 10, np.float32)
    labels = np.array([0, 1] * 10)
    rel = np.array([1.0, 1.0], np.float32), np.array([0.5, 0.5], np.float32)
    found = fit_safe_gate(PathProbs(local, global_, np.ones(20, np.float32)), labels, *rel)
    assert not found.accepts and found.accuracy == found.baseline == 1.0 == found.best_single


@pytest.mark.parametrize("sharp", [0.5, 1.0, 2.5])
def test_temperature_is_found_again(sharp: float) -> None:
    prob, labels = drawn(4000, 1, sharp)
    assert fit_temperature(prob, labels) == pytest.approx(sharp, rel=0.06)


def test_calibration_lowers_the_error_on_other_cells() -> None:
    prob, labels = drawn(3000, 2, 3.0)
    other, true = drawn(3000, 3, 3.0)
    tempered = temper(other, fit_temperature(prob, labels))

    def error(p: Float32) -> float:
        ece = expected_calibration_error(p.max(axis=1), p.argmax(axis=1) == true)
        assert ece is not None
        return ece

    assert error(other) > 0.1 and error(tempered) < 0.03


def test_every_path_has_its_own_temperature() -> None:
    local, labels = drawn(3000, 4, 2.0)
    global_ = temper(local, 4.0)
    calibration = fit(PathProbs(local, global_, np.zeros(3000, np.float32)), labels, 3)
    assert calibration.temperature_local == pytest.approx(2.0, rel=0.06)
    assert calibration.temperature_global == pytest.approx(calibration.temperature_local / 4, rel=0.02)
    assert calibration.temperature_mix == pytest.approx(calibration.temperature_local, rel=1e-3)
    assert calibration.thresholds is not None and len(calibration.thresholds) == 3


def test_cells_without_class_or_global_path_are_left_out() -> None:
    local, labels = drawn(600, 5)
    global_, gate = temper(local, 2.0), np.full(600, 0.5, np.float32)
    whole = fit(PathProbs(local, global_, gate), labels, 3)
    more = PathProbs(
        np.concatenate([local, local[:5]]), np.concatenate([global_, global_[:5]]), np.append(gate, [1] * 5)
    )
    assert fit(more, np.append(labels, [-1, 3, 7, -1, -1]), 3) == whole
    global_, gate = global_.copy(), gate.copy()
    global_[::2], gate[::2] = np.nan, np.nan
    half = fit(PathProbs(local, global_, gate), labels, 3)
    part = fit(PathProbs(local[1::2], global_[1::2], gate[1::2]), labels[1::2], 3)
    assert half.temperature_global == part.temperature_global and half.temperature_mix == part.temperature_mix
    assert half.reliability_local == part.reliability_local
    assert half.temperature_local == whole.temperature_local
    none = fit(PathProbs(local, np.full_like(local, np.nan), np.full(600, np.nan, np.float32)), labels, 3)
    assert none.reliability_global is None and none.temperature_mix == 1.0
    assert none.temperature_local == whole.temperature_local


def test_a_global_path_that_gains_nothing_is_not_run_by_default() -> None:
    local, labels = drawn(2000, 7)
    useless = fit(PathProbs(local, local, np.full(2000, 0.5, np.float32)), labels, 3)
    assert useless.paths == "local"
    sure = temper(np.eye(3, dtype=np.float32)[labels] * 0.8 + 0.1, 1.0)
    better = fit(PathProbs(local, sure / sure.sum(axis=1, keepdims=True), np.full(2000, 0.9, np.float32)), labels, 3)
    assert better.paths == "both"
    assert better.abstain is None, "of the mix, which is right everywhere"
    assert useless.abstain is not None


def test_nothing_to_fit_on() -> None:
    local, labels = drawn(5, 6)
    probs = PathProbs(local, local, np.ones(5, np.float32))
    with pytest.raises(UsageError, match="no labelled cell"):
        fit(probs, labels * 0 - 1, 3)
    with pytest.raises(ValueError, match="not of 4"):
        fit(probs, labels, 4)
    with pytest.raises(UsageError, match="--target 1.5"):
        FitConfig(target=1.5)


def test_accuracy_threshold_by_hand() -> None:
    sure = np.array([0.9, 0.8, 0.8, 0.7, 0.6])
    right = np.array([True, True, True, False, False])
    few = FitConfig(target=0.9, min_cells=1)
    assert accuracy_threshold(sure, right, few) == 0.8
    assert accuracy_threshold(sure, right, FitConfig(target=0.75, min_cells=1)) == 0.7
    assert accuracy_threshold(sure, right, FitConfig(target=0.6, min_cells=1)) is None
    # Cells of one confidence go together: .9 is above the target alone, both at .8 are not.
    tied = np.array([True, True, False, False, False])
    assert accuracy_threshold(sure, tied, few) == 0.9
    # Never reached with three cells: the nearest is taken.
    assert accuracy_threshold(sure, tied, FitConfig(target=0.9, min_cells=3)) == 0.8


def test_f1_threshold_by_hand() -> None:
    sure = np.array([0.9, 0.8, 0.5, 0.4])
    assert f1_threshold(sure, np.array([True, True, False, False]), 2) == 0.8
    assert f1_threshold(sure, np.array([True, True, True, False]), 3) == 0.5
    assert f1_threshold(sure, np.array([True, True, True, True]), 9) == 0.0
    assert f1_threshold(sure[:0], np.zeros(0, bool), 4) == 0.0
    assert f1_threshold(np.array([0.9, 0.5, 0.5]), np.array([False, True, False]), 1) == 0.0


def test_what_is_accepted_reaches_the_target() -> None:
    prob, labels = drawn(4000, 7, 2.0)
    probs = PathProbs(prob, prob, np.full(4000, 0.5, np.float32))
    calibration = fit(probs, labels, 3, FitConfig(target=0.85))
    assert calibration.abstain is not None
    decision = decide(probs, DecisionConfig(abstain=calibration.abstain), calibration)
    right = decision.class_index == labels
    assert right.mean() < 0.8 and right[~decision.abstained].mean() >= 0.85
    assert 0.2 < decision.abstained.mean() < 0.9
    by_hand = [[int(((labels == t) & (decision.class_index == p)).sum()) for p in range(3)] for t in range(3)]
    assert np.array_equal(calibration.confusion, by_hand), "of all, those that abstain too"


def test_gain_is_measured_on_other_images() -> None:
    prob, labels = drawn(2000, 8, 3.0)
    probs = PathProbs(prob, prob, np.full(2000, 0.5, np.float32))
    image = np.repeat(np.arange(10), 200)
    gain = measure(probs, labels, image, fit(probs, labels, 3))
    assert gain.before is not None and gain.after is not None and gain.crossed is not None
    assert gain.before > 0.1 > gain.crossed and gain.after < 0.05
    np.testing.assert_array_equal(mix(probs).argmax(axis=1), prob.argmax(axis=1))
    assert measure(probs, labels, image * 0, Calibration()).crossed is None, "one image has no other half"


def test_labels_in_the_classes_of_the_weights() -> None:
    names = ("lymphocyte", "stroma", "tumour")
    found = class_labels(np.array([0, 2, 1, 0]), names, np.array([2, 0, -1]))
    assert found.tolist() == [1, 0, -1, 1]
    with pytest.raises(UsageError, match="several classes of the weights are tumour"):
        class_labels(np.array([0]), names, np.array([2, 2, 0]))


def test_unseen_organs_abstain_until_the_target_is_reached_and_all_else_stays() -> None:
    rng = np.random.default_rng(5)
    prob = rng.dirichlet([1, 1, 1], 4000).astype(np.float32)
    truth = np.array([rng.choice(3, p=row) for row in prob.astype(np.float64) / prob.sum(1, dtype=np.float64)[:, None]])
    probs = PathProbs(prob, prob, np.full(len(prob), 0.5, np.float32))
    before = Calibration(temperature_mix=1.0, abstain=0.2)
    found = fit_unseen(before, probs, truth, FitConfig(target=0.8))
    assert replace(found, abstain_unseen=None, accuracy_unseen=None) == before
    assert found.abstain_unseen is not None and found.abstain_unseen > 0.5
    accepted = prob.max(1) >= found.abstain_unseen
    right = prob.argmax(1) == truth
    assert right[accepted].mean() >= 0.8 > right.mean() == pytest.approx(found.accuracy_unseen)
    assert fit_unseen(before, probs, prob.argmax(1), FitConfig(target=0.8)).abstain_unseen == 0
