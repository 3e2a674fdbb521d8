"""Detection scores: one-to-one pairs of points within a radius, for all nuclei together and class by class.

Points are (x, y) in pixels of one frame. The radius is given in µm by the caller's protocol and in pixels here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from cellslide.evaluate.matching import assign
from cellslide.types import Float64, Int32, Int64

RADIUS_UM = 3.0
# Radii such as 3 / 0.4991 are rounded in binary; a point on the circle counts as inside.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Pairs:
    """One-to-one pairs: true_index, pred_index int64 (M,), ascending by truth; distance_px float64 (M,)."""

    true_index: Int64
    pred_index: Int64
    distance_px: Float64

    def __len__(self) -> int:
        return len(self.true_index)


@dataclass(frozen=True, slots=True)
class Tally:
    """True positives, false positives and false negatives; tallies of images add up to that of the data set."""

    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def support(self) -> int:
        """Number of true objects."""
        return self.tp + self.fn

    @property
    def precision(self) -> float | None:
        """TP / (TP + FP), None if nothing was predicted."""
        return self.tp / (self.tp + self.fp) if self.tp + self.fp else None

    @property
    def recall(self) -> float | None:
        """TP / (TP + FN), None if there is nothing to find."""
        return self.tp / self.support if self.support else None

    @property
    def f1(self) -> float | None:
        """2 TP / (2 TP + FP + FN), None if there is nothing to find and nothing was predicted."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else None


@dataclass(frozen=True, slots=True)
class TypeScore:
    """F1, precision and recall of one class as HoVer-Net weighs them."""

    f1: float
    precision: float
    recall: float


def pair_points(true_xy: NDArray[Any], pred_xy: NDArray[Any], radius_px: float) -> Pairs:
    """Pair points (T, 2) and (P, 2) one to one at a distance of at most `radius_px`.

    As many pairs as possible, and among those choices the one with the least summed distance: no order of the points,
    and no far pair, can cost a near one. Raises ValueError on a radius that is not positive.
    """
    if not radius_px > 0:
        raise ValueError(f"radius must be positive, not {radius_px} px")
    if len(true_xy) == 0 or len(pred_xy) == 0:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    reach = radius_px * (1 + ROUNDING)
    near = KDTree(true_xy).sparse_distance_matrix(KDTree(pred_xy), reach, output_type="ndarray")
    true_index, pred_index, distance = near["i"], near["j"], near["v"]
    # One more pair must outweigh any change of distances: they sum to less than this gain.
    gain = reach * (min(len(true_xy), len(pred_xy)) + 1) - distance
    chosen = assign(true_index, pred_index, gain)
    chosen = chosen[np.argsort(true_index[chosen], kind="stable")]
    return Pairs(true_index[chosen].astype(np.int64), pred_index[chosen].astype(np.int64), distance[chosen])


def tally(pairs: Pairs, n_true: int, n_pred: int) -> Tally:
    """Count what was found, invented and missed."""
    return Tally(len(pairs), n_pred - len(pairs), n_true - len(pairs))


def class_tallies(
    true_xy: NDArray[Any],
    true_class: NDArray[Any],
    pred_xy: NDArray[Any],
    pred_class: NDArray[Any],
    n_classes: int,
    radius_px: float,
) -> list[Tally]:
    """Pair the points of each class 0..n_classes-1 apart (the rule of BRCA-M2C's authors) and count.

    A nucleus found but typed wrongly is a false negative of its class and a false positive of the other.
    """
    tallies = []
    for k in range(n_classes):
        true, pred = true_xy[true_class == k], pred_xy[pred_class == k]
        tallies.append(tally(pair_points(true, pred, radius_px), len(true), len(pred)))
    return tallies


def hover_type_score(
    pairs: Pairs, true_class: NDArray[Any], pred_class: NDArray[Any], class_index: int
) -> TypeScore | None:
    """Return HoVer-Net's F_c: pairs made without classes, wrong types weigh 2, missed and invented nuclei 1.

    Graham et al. 2019, eq. 10, and CellViT's `cell_type_detection_scores`. None if the class occurs nowhere.
    """
    true, pred = true_class[pairs.true_index], pred_class[pairs.pred_index]
    tp = int(((true == class_index) & (pred == class_index)).sum())
    wrong_pred = int(((true != class_index) & (pred == class_index)).sum())
    wrong_true = int(((true == class_index) & (pred != class_index)).sum())
    invented = int((pred_class == class_index).sum()) - tp - wrong_pred
    missed = int((true_class == class_index).sum()) - tp - wrong_true
    fp, fn = 2 * wrong_pred + invented, 2 * wrong_true + missed
    if tp + fp + fn == 0:
        return None
    return TypeScore(2 * tp / (2 * tp + fp + fn), tp / max(tp + fp, 1), tp / max(tp + fn, 1))


def centroids(labels: Int32) -> tuple[Int64, Float64]:
    """Return the labels (N,) of a map, ascending, and their centroids (N, 2) as (x, y); pixel centres are at + 0.5."""
    ids, inverse, area = np.unique(labels, return_inverse=True, return_counts=True)
    flat = inverse.ravel()
    cols = np.tile(np.arange(labels.shape[1]), labels.shape[0])
    rows = np.repeat(np.arange(labels.shape[0]), labels.shape[1])
    xy = np.column_stack([np.bincount(flat, at, len(ids)) for at in (cols, rows)]) / area[:, None] + 0.5
    nuclei = ids != 0
    return ids[nuclei].astype(np.int64), xy[nuclei]
