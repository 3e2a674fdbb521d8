"""Scores of classes and probabilities with answers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cellslide.evaluate.classification import (
    accuracy,
    brier_score,
    class_tallies,
    confusion,
    expected_calibration_error,
    mean_f1,
)
from cellslide.evaluate.detection import Tally

TRUE = np.array([0, 0, 0, 1, 1, 2])
PRED = np.array([0, 0, 1, 1, 1, 0])


def test_accuracy_and_confusion() -> None:
    assert accuracy(TRUE, PRED) == pytest.approx(4 / 6)
    assert confusion(TRUE, PRED, 3).tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert confusion(np.array([0, 5]), np.array([-1, 0]), 2).sum() == 0


def test_tallies_agree_with_the_confusion() -> None:
    found = class_tallies(TRUE, PRED, 3)
    assert found == [Tally(2, 1, 1), Tally(2, 1, 0), Tally(0, 0, 1)]
    assert mean_f1(found) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)


def test_mean_f1_leaves_out_classes_without_truth() -> None:
    assert mean_f1([Tally(1, 0, 0), Tally(0, 9, 0)]) == 1.0
    assert mean_f1([Tally(0, 9, 0)]) is None


def test_calibration_error_by_hand() -> None:
    # Two bins of ten: |.5 - .95| for two nuclei, |1 - .65| for one.
    confidence, correct = np.array([0.95, 0.95, 0.65]), np.array([True, False, True])
    assert expected_calibration_error(confidence, correct, 10) == pytest.approx((2 * 0.45 + 0.35) / 3)


def test_perfectly_calibrated_and_perfectly_sure() -> None:
    assert expected_calibration_error(np.full(4, 0.75), np.array([1, 1, 1, 0], bool)) == pytest.approx(0)
    assert expected_calibration_error(np.ones(3), np.ones(3, bool)) == 0.0
    assert expected_calibration_error(np.ones(2), np.zeros(2, bool)) == 1.0
    assert expected_calibration_error(np.zeros(2), np.zeros(2, bool)) == 0.0


def test_brier_by_hand() -> None:
    prob = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    assert brier_score(prob, np.array([0, 0])) == pytest.approx((0.09 + 0.04 + 0.01) / 2)
    assert brier_score(prob[1:], np.array([1])) == 2.0
    assert brier_score(prob[1:], np.array([7])) == 2.0  # A class that the model cannot name.


def test_nothing_to_score() -> None:
    none = np.zeros(0, int)
    assert accuracy(none, none) is None and brier_score(np.zeros((0, 3)), none) is None
    assert expected_calibration_error(none, none) is None


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        accuracy(np.zeros(3), np.zeros(2))
