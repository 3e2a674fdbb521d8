"""How sure the label of a cell is, after NuClass: 0.6 purity + 0.4 margin; and which nuclei of two sets are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from cellslide.types import Bool, Float64, Int64

PURITY_SHARE, MARGIN_SHARE = 0.6, 0.4


class Confidence(NamedTuple):
    """Of N cells float64 (N,): purity 0..1, margin in units of log expression, confidence 0..1; NaN without a label."""

    purity: Float64
    margin: Float64
    confidence: Float64


class Pairs(NamedTuple):
    """Rows of two sets of nuclei that are the same ones, int64 (P,) each, and how far apart (µm) they lie."""

    seen: Int64
    xenium: Int64
    distance_um: Float64


def rate_labels(
    pca: Float64, log: sp.csr_matrix, label: Int64, classes: Sequence[str], markers: Mapping[str, Sequence[str]],
    genes: Sequence[str], neighbours: int,
) -> Confidence:  # fmt: skip
    """Rate the labels (N,) of cells, indices into `classes`, -1 for none.

    purity      share of a cell's nearest in the space of components that have its label, itself left out.
    margin      mean log expression of its own markers less that of the best other class.
    """
    own = label >= 0
    k = min(neighbours, len(label))
    near = cKDTree(pca).query(pca, k=k, workers=1)[1].reshape(len(label), -1)
    same = (label[near] == label[:, None]).sum(axis=1)
    purity = np.where(own, (same - 1) / max(k - 1, 1), np.nan)
    margin = np.full(len(label), np.nan)
    margin[own] = _margins(log, label, classes, markers, genes)[own]
    return Confidence(purity, margin, PURITY_SHARE * purity + MARGIN_SHARE * scale_margins(margin, own))


def _margins(
    log: sp.csr_matrix, label: Int64, classes: Sequence[str], markers: Mapping[str, Sequence[str]], genes: Sequence[str]
) -> Float64:
    place = {gene: k for k, gene in enumerate(genes)}
    mean = np.stack([np.asarray(log[:, [place[g] for g in markers[c]]].mean(axis=1)).ravel() for c in classes], axis=1)
    rows = np.arange(len(label))
    mine = mean[rows, label]
    if len(classes) == 1:
        return np.asarray(mine, np.float64)
    mean[rows, label] = -np.inf
    return np.asarray(mine - mean.max(axis=1), np.float64)


def scale_margins(margin: Float64, own: Bool) -> Float64:
    """Return margins as 0..1: 0.5 at the median, 0 and 1 at 3 MAD; where the MAD is 0 at 2 IQR, then at 3 SD."""
    if not own.any():
        return np.full(len(margin), np.nan)
    values = margin[own]
    middle = float(np.median(values))
    low, high = np.percentile(values, (25, 75))
    widths = (3 * float(np.median(np.abs(values - middle))), 2 * float(high - low), 3 * float(values.std()), 1.0)
    width = next(w for w in widths if w > 0)
    return np.asarray(np.clip(0.5 + 0.5 * (margin - middle) / width, 0, 1), np.float64)


def match_nuclei(seen_um: Float64, xenium_um: Float64, most_um: float) -> Pairs:
    """Pair nuclei one to one, the nearest first, none farther apart than `most_um`; (N, 2) and (M, 2) in µm."""
    none = np.empty(0, np.int64)
    if not len(seen_um) or not len(xenium_um):
        return Pairs(none, none, np.empty(0))
    near = cKDTree(seen_um).sparse_distance_matrix(cKDTree(xenium_um), most_um, output_type="ndarray")
    near = near[np.lexsort((near["j"], near["i"], near["v"]))]
    free_seen, free_xenium = np.ones(len(seen_um), np.bool_), np.ones(len(xenium_um), np.bool_)
    kept = []
    for at, (i, j) in enumerate(zip(near["i"].tolist(), near["j"].tolist(), strict=True)):
        if free_seen[i] and free_xenium[j]:
            free_seen[i] = free_xenium[j] = False
            kept.append(at)
    found = near[kept]
    return Pairs(found["i"].astype(np.int64), found["j"].astype(np.int64), found["v"])
