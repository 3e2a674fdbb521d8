"""Scores of class probabilities on nuclei of known class: accuracy, F1 and its interval, ECE, Brier score, AUROC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from cellslide.evaluate.detection import Tally
from cellslide.types import Bool, Float64, Int64

ECE_BINS = 15
BOOTSTRAPS = 1000
# Share of the nuclei that counts as hard.
HARD_SHARE = 0.2


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
    bins = reliability_bins(confidence, correct, n_bins)
    if not bins.n.sum():
        return None
    return float(np.abs(bins.n_right - bins.confidence_sum).sum() / bins.n.sum())


@dataclass(frozen=True, slots=True)
class ReliabilityBins:
    """Bins of equal width over (0, 1]: nuclei in each, how many of them are right, and their summed confidence."""

    n: Int64
    n_right: Int64
    confidence_sum: Float64

    @property
    def accuracy(self) -> Float64:
        """Share that is right in each bin, NaN in an empty one."""
        return np.where(self.n > 0, self.n_right / np.maximum(self.n, 1), np.nan)

    @property
    def confidence(self) -> Float64:
        """Mean confidence in each bin, NaN in an empty one."""
        return np.where(self.n > 0, self.confidence_sum / np.maximum(self.n, 1), np.nan)


def reliability_bins(confidence: NDArray[Any], correct: NDArray[Any], n_bins: int = ECE_BINS) -> ReliabilityBins:
    """Sort nuclei into bins by confidence (N,) and count those that are `correct`, bool (N,)."""
    _same_length(confidence, correct)
    sure = np.asarray(confidence, np.float64)
    # Bins are closed on the right, so that a confidence of exactly 1 has its place in the last one.
    place = np.clip(np.ceil(sure * n_bins).astype(np.int64) - 1, 0, n_bins - 1)
    right = place[np.asarray(correct, np.bool_)]
    return ReliabilityBins(
        np.bincount(place, minlength=n_bins).astype(np.int64),
        np.bincount(right, minlength=n_bins).astype(np.int64),
        np.asarray(np.bincount(place, sure, n_bins), np.float64),
    )


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


def auroc(prob: NDArray[Any], true_class: NDArray[Any]) -> list[float | None]:
    """Return for each class k the chance that a nucleus of it has a higher p_k than one of another; a tie is a half.

    `prob` (N, K), `true_class` (N,). None for a class that all nuclei have, or none has. Mann and Whitney 1947.
    """
    _same_length(prob, true_class)
    areas: list[float | None] = []
    for k in range(prob.shape[1]):
        true = np.asarray(true_class == k)
        n_true = int(true.sum())
        if n_true in (0, len(true)):
            areas.append(None)
            continue
        ranks = rankdata(prob[:, k])[true].sum()
        areas.append(float((ranks - n_true * (n_true + 1) / 2) / (n_true * (len(true) - n_true))))
    return areas


@dataclass(frozen=True, slots=True)
class Intervals:
    """Bounds of 95 % of the resampled scores, (low, high), None where there is nothing to resample."""

    accuracy: tuple[float, float] | None
    macro_f1: tuple[float, float] | None


def bootstrap(counts: NDArray[np.int64], seed: int = 0, n_samples: int = BOOTSTRAPS) -> Intervals:
    """Return percentile intervals of accuracy and macro F1 by drawing units with replacement.

    counts  confusion counts (U, C, C + 1) of each unit, rows truth, the last column "no scored class". One unit per
            image draws whole images; a single unit (1, C, C + 1) draws its nuclei one by one, which is the multinomial.
    """
    total = int(counts.sum())
    if total == 0:
        return Intervals(None, None)
    rng = np.random.default_rng(seed)
    if len(counts) == 1:
        drawn = rng.multinomial(total, counts.ravel() / total, n_samples).reshape(n_samples, *counts.shape[1:])
    else:
        times = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), n_samples)
        drawn = np.tensordot(times, counts, axes=1)
    filled = drawn[drawn.sum(axis=(1, 2)) > 0]
    right = np.diagonal(filled, axis1=1, axis2=2)
    return Intervals(_middle(right.sum(axis=1) / filled.sum(axis=(1, 2))), _middle(_macro_f1(filled)))


def _macro_f1(counts: NDArray[np.int64]) -> Float64:
    """Return the mean F1 over classes with truth, of each of the confusion counts (B, C, C + 1)."""
    right = np.diagonal(counts, axis1=1, axis2=2)
    support = counts.sum(axis=2)
    named = counts.sum(axis=1)[:, :-1]
    f1 = 2 * right / np.maximum(support + named, 1)
    return np.asarray((f1 * (support > 0)).sum(axis=1) / (support > 0).sum(axis=1), np.float64)


def _middle(values: NDArray[Any]) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def entropy(prob: NDArray[Any]) -> Float64:
    """Return the Shannon entropy of rows (N, K) over ln K, (N,), from 0 to 1; 0 where there is one class."""
    p = np.asarray(prob, np.float64)
    logs = np.log(np.where(p > 0, p, 1.0))
    return np.asarray(-(p * logs).sum(axis=1) / max(np.log(p.shape[1]), np.finfo(float).tiny), np.float64)


def hardest(value: NDArray[Any], share: float = HARD_SHARE) -> Bool:
    """Return bool (N,): the `share` of nuclei of highest value, at least one; equal values go by order."""
    chosen = np.zeros(len(value), np.bool_)
    n = max(1, round(share * len(value))) if len(value) else 0
    chosen[np.argsort(-np.asarray(value, np.float64), kind="stable")[:n]] = True
    return chosen


def _same_length(left: NDArray[Any], right: NDArray[Any]) -> None:
    if len(left) != len(right):
        raise ValueError(f"{len(left)} and {len(right)} nuclei cannot be compared")
