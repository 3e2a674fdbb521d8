"""Scores of instance label maps: PQ with DQ and SQ, AJI, AJI+, Dice, F1 at IoU 0.5, from one sparse overlap count.

A label map is an integer array (H, W), 0 = background, any other value one nucleus; labels need not be contiguous.
`docs/metrics.md` names each definition and says which published code computes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cellslide.types import Bool, Float64, Int64

IOU_THRESHOLD = 0.5
# Published SQ divides by TP + 1e-6 everywhere; CellViT and CellVTA also add it to the denominator of DQ.
EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Overlaps:
    """How the nuclei of two label maps of one image overlap.

    true_id, pred_id      int64 (T,), (P,): the labels, ascending.
    true_area, pred_area  int64, pixels of each.
    true_index, pred_index, inter
                          int64 (E,): the pairs that share `inter` > 0 pixels, as rows of the columns above.
    """

    true_id: Int64
    pred_id: Int64
    true_area: Int64
    pred_area: Int64
    true_index: Int64
    pred_index: Int64
    inter: Int64

    @property
    def union(self) -> Int64:
        """Pixels in either nucleus of each pair, int64 (E,)."""
        return self.true_area[self.true_index] + self.pred_area[self.pred_index] - self.inter

    @property
    def iou(self) -> Float64:
        """Intersection over union of each pair, float64 (E,)."""
        return np.asarray(self.inter / self.union, np.float64)

    def matches(self) -> Int64:
        """Return the pairs (rows 0..E-1) with IoU above 0.5, strictly, which makes each nucleus part of one at most."""
        return np.flatnonzero(self.iou > IOU_THRESHOLD).astype(np.int64)

    def keep(self, true_keep: Bool, pred_keep: Bool) -> Overlaps:
        """Return the overlaps of only those nuclei where the masks (T,) and (P,) hold."""
        pair = true_keep[self.true_index] & pred_keep[self.pred_index]
        new_true, new_pred = np.cumsum(true_keep) - 1, np.cumsum(pred_keep) - 1
        return Overlaps(
            self.true_id[true_keep],
            self.pred_id[pred_keep],
            self.true_area[true_keep],
            self.pred_area[pred_keep],
            new_true[self.true_index[pair]],
            new_pred[self.pred_index[pair]],
            self.inter[pair],
        )


@dataclass(frozen=True, slots=True)
class Quality:
    """Detection, segmentation and panoptic quality of one image with their counts; NaN if it has no true nucleus."""

    dq: float
    sq: float
    pq: float
    tp: int
    fp: int
    fn: int


def overlaps(true: NDArray[Any], pred: NDArray[Any]) -> Overlaps:
    """Count the shared pixels of two label maps (H, W) of one shape; raises ValueError if the shapes differ."""
    if true.shape != pred.shape:
        raise ValueError(f"label maps have different shapes: {true.shape} and {pred.shape}")
    true_id, true_rank, true_area = _ranks(true)
    pred_id, pred_rank, pred_area = _ranks(pred)
    both = (true_rank >= 0) & (pred_rank >= 0)
    code, inter = np.unique(true_rank[both] * max(len(pred_id), 1) + pred_rank[both], return_counts=True)
    true_index, pred_index = np.divmod(code, max(len(pred_id), 1))
    return Overlaps(true_id, pred_id, true_area, pred_area, true_index, pred_index, inter.astype(np.int64))


def panoptic_quality(pairs: Overlaps, dq_epsilon: float = EPSILON) -> Quality:
    """Return DQ, SQ and PQ of one image.

    The default is CellViT's and CellVTA's form, DQ = TP / (TP + FP/2 + FN/2 + 1e-6); `dq_epsilon` 0 is that of
    HoVer-Net and PanNuke. SQ = sum of IoU / (TP + 1e-6) in all of them. Kirillov et al., Panoptic Segmentation, eq. 1.
    """
    matched = pairs.matches()
    tp = len(matched)
    fp, fn = len(pairs.pred_id) - tp, len(pairs.true_id) - tp
    if len(pairs.true_id) == 0:
        return Quality(np.nan, np.nan, np.nan, tp, fp, fn)
    dq = tp / (tp + 0.5 * fp + 0.5 * fn + dq_epsilon)
    sq = float(pairs.iou[matched].sum()) / (tp + EPSILON)
    return Quality(dq, sq, dq * sq, tp, fp, fn)


def pooled_pq(images: Iterable[Quality]) -> float:
    """Return the PQ of the counts of all images together (Graham et al., CoNIC, mPQ+), NaN without a true nucleus."""
    images = list(images)
    tp, fp, fn = sum(q.tp for q in images), sum(q.fp for q in images), sum(q.fn for q in images)
    if tp + fn == 0:
        return np.nan
    iou = float(sum(q.sq * (q.tp + EPSILON) for q in images if q.tp))
    return tp / (tp + 0.5 * fp + 0.5 * fn + EPSILON) * iou / (tp + EPSILON)


def class_quality(pairs: Overlaps, true_class: NDArray[Any], pred_class: NDArray[Any], n_classes: int) -> list[Quality]:
    """Return the quality of each class 0..n_classes-1, NaN for a class without true nuclei in the image.

    `true_class` (T,), `pred_class` (P,): class of each nucleus; one outside 0..n_classes-1 counts for no class.
    """
    return [panoptic_quality(pairs.keep(true_class == k, pred_class == k)) for k in range(n_classes)]


def aji(pairs: Overlaps) -> float:
    """Aggregated Jaccard Index: each true nucleus takes the prediction of highest IoU, which may serve several.

    Kumar et al. 2017 as computed by HoVer-Net; NaN if neither map has a nucleus.
    """
    best = _best_per_true(pairs)
    return _aggregate(pairs, best)


def aji_plus(pairs: Overlaps) -> float:
    """AJI with one-to-one pairs that maximise the summed IoU (HoVer-Net's AJI+); NaN if neither map has a nucleus."""
    return _aggregate(pairs, assign(pairs.true_index, pairs.pred_index, pairs.iou))


def dice(pairs: Overlaps) -> float:
    """Dice of the two foregrounds, 2 |A and B| / (|A| + |B|) (HoVer-Net's Dice 1); NaN if both are empty."""
    total = int(pairs.true_area.sum() + pairs.pred_area.sum())
    return 2.0 * int(pairs.inter.sum()) / total if total else float("nan")


def dice_ensemble(pairs: Overlaps) -> float:
    """Dice summed over all overlapping pairs (HoVer-Net's Dice 2), low for merges and splits; NaN without a pair."""
    total = int((pairs.true_area[pairs.true_index] + pairs.pred_area[pairs.pred_index]).sum())
    return 2.0 * int(pairs.inter.sum()) / total if total else float("nan")


def assign(left: NDArray[Any], right: NDArray[Any], gain: NDArray[Any]) -> Int64:
    """Return the rows (ascending) of a one-to-one choice among weighted edges that has the greatest summed gain.

    `left`, `right` int (E,): ends of each edge, each pair once; `gain` (E,) > 0. Solved for each connected component
    apart, so the cost follows the crowding and not the number of nuclei.
    """
    if len(gain) == 0:
        return np.zeros(0, np.int64)
    n_left, n_right = int(left.max()) + 1, int(right.max()) + 1
    graph = coo_matrix((np.ones(len(gain)), (left, right + n_left)), shape=(n_left + n_right,) * 2)
    component = connected_components(graph, directed=False)[1][left]
    order = np.argsort(component, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    chosen = [edges if len(edges) == 1 else edges[_assign_dense(left, right, gain, edges)] for edges in groups]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _assign_dense(left: NDArray[Any], right: NDArray[Any], gain: NDArray[Any], edges: NDArray[Any]) -> NDArray[Any]:
    """Return which of `edges` the Hungarian method keeps; a missing edge has gain 0 and is never kept."""
    rows, row = np.unique(left[edges], return_inverse=True)
    cols, col = np.unique(right[edges], return_inverse=True)
    matrix = np.zeros((len(rows), len(cols)))
    matrix[row, col] = gain[edges]
    edge_of = np.full(matrix.shape, -1)
    edge_of[row, col] = np.arange(len(edges))
    kept = edge_of[linear_sum_assignment(matrix, maximize=True)]
    return np.asarray(kept[kept >= 0])


def _ranks(labels: NDArray[Any]) -> tuple[Int64, Int64, Int64]:
    """Return the labels present, the rank of each pixel's label (-1 for background), and their areas."""
    flat = labels.ravel()
    nonzero = flat != 0
    ids, rank, area = np.unique(flat[nonzero], return_inverse=True, return_counts=True)
    ranks = np.full(flat.shape, -1, np.int64)
    ranks[nonzero] = rank.ravel()
    return ids.astype(np.int64), ranks, area.astype(np.int64)


def _best_per_true(pairs: Overlaps) -> Int64:
    # Highest IoU first within a true nucleus; of equals the first prediction, as numpy's argmax takes it.
    order = np.lexsort((pairs.pred_index, -pairs.iou, pairs.true_index))
    first = np.flatnonzero(np.diff(pairs.true_index[order], prepend=-1))
    return order[first].astype(np.int64)


def _aggregate(pairs: Overlaps, chosen: Int64) -> float:
    """Summed intersection over summed union of the chosen pairs, plus the areas of all nuclei that are in none."""
    lone_true = np.ones(len(pairs.true_id), bool)
    lone_pred = np.ones(len(pairs.pred_id), bool)
    lone_true[pairs.true_index[chosen]] = False
    lone_pred[pairs.pred_index[chosen]] = False
    union = pairs.union[chosen].sum() + pairs.true_area[lone_true].sum() + pairs.pred_area[lone_pred].sum()
    return float(pairs.inter[chosen].sum() / union) if union else float("nan")
