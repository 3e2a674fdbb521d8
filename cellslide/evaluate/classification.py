"""Scores of class probabilities on nuclei whose true class is known: accuracy, precision, recall, F1, ECE, Brier."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.evaluate.detection import Tally

ECE_BINS = 15


def accuracy(true_class: NDArray[Any], pred_class: NDArray[Any]) -> float | None:
    """Return the share of nuclei (N,) with the right class, None if there is none."""
    _same_length(true_class, pred_class)
    return float(np.mean(true_class == pred_class)) if len(true_class) else None


def confusion(true_class: NDArray[Any], pred_class: NDArray[Any], n_classes: int) -> NDArray[np.int64]:
    """Return counts (n_classes, n_classes), rows truth, columns prediction; classes outside the range are left out."""
    _same_length(true_class, pred_class)
    true, pred = np.asarray(true_class, np.int64), np.asarray(pred_class, np.int64)
    known = (true >= 0) & (true < n_classes) & (pred >= 0) & (pred < n_classes)
    counts = np.bincount(true[known] * n_classes + pred[known], minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


def class_tallies(true_class: NDArray[Any], pred_class: NDArray[Any], n_classes: int) -> list[Tally]:
    """Return TP, FP and FN of each class 0..n_classes-1 over the same nuclei."""
    _same_length(true_class, pred_class)
    true = [true_class == k for k in range(n_classes)]
    pred = [pred_class == k for k in range(n_classes)]
    return [
        Tally(int((t & p).sum()), int((~t & p).sum()), int((t & ~p).sum())) for t, p in zip(true, pred, strict=True)
    ]


def mean_f1(tallies: list[Tally]) -> float | None:
    """Return the unweighted mean of F1 over the classes that occur in the truth, None if none does."""
    scores = [t.f1 for t in tallies if t.support and t.f1 is not None]
    return float(np.mean(scores)) if scores else None


def expected_calibration_error(confidence: NDArray[Any], correct: NDArray[Any], n_bins: int = ECE_BINS) -> float | None:
    """Return the ECE: |accuracy - mean confidence| over equal-width bins of (0, 1], weighted by their nuclei.

    `confidence` (N,) probability of the class that was named; `correct` bool (N,). None if there is none.
    Guo et al. 2017, eq. 3.
    """
    _same_length(confidence, correct)
    if len(confidence) == 0:
        return None
    # Bins are closed on the right, so that a confidence of exactly 1 has its place in the last one.
    bins = np.clip(np.ceil(np.asarray(confidence, np.float64) * n_bins).astype(np.int64) - 1, 0, n_bins - 1)
    gap = np.bincount(bins, np.asarray(correct, np.float64) - np.asarray(confidence, np.float64), n_bins)
    return float(np.abs(gap).sum() / len(confidence))


def brier_score(prob: NDArray[Any], true_class: NDArray[Any]) -> float | None:
    """Return the mean over nuclei of sum_k (p_k - [k is true])^2, from 0 to 2; None if there is none.

    `prob` (N, K); `true_class` (N,), where a class outside 0..K-1 is one that the model cannot name: it has p = 0.
    """
    _same_length(prob, true_class)
    if len(prob) == 0:
        return None
    p = np.asarray(prob, np.float64)
    known = (true_class >= 0) & (true_class < p.shape[1])
    p_true = np.where(known, p[np.arange(len(p)), np.where(known, true_class, 0)], 0.0)
    return float(np.mean((p * p).sum(axis=1) - 2 * p_true + 1))


def _same_length(left: NDArray[Any], right: NDArray[Any]) -> None:
    if len(left) != len(right):
        raise ValueError(f"{len(left)} and {len(right)} nuclei cannot be compared")
