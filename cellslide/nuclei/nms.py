"""Points that a detector found on one tile: of those that stand for one nucleus the best stays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from cellslide.types import Int64


def point_nms(xy: NDArray[Any], score: NDArray[Any], radius: float) -> Int64:
    """Return the rows of the points that stay, ascending: the best first, each drops all others within `radius`.

    xy (N, 2) and `radius` in one unit, any; a distance of exactly the radius is within. Of two equal scores the earlier
    row is the better. Classes do not matter. As in PromptNucSeg (12 px at 0.25 um/px, 3 um).
    """
    xy = np.asarray(xy, np.float64).reshape(-1, 2)
    score = np.asarray(score)
    if len(score) != len(xy):
        raise ValueError(f"{len(score)} scores for {len(xy)} points")
    order = np.argsort(-score, kind="stable")
    worse, start = _worse_neighbours(xy[order], radius)
    alive = np.ones(len(xy), np.bool_)
    for rank in np.flatnonzero(np.diff(start)):
        if alive[rank]:
            alive[worse[start[rank] : start[rank + 1]]] = False
    return np.sort(order[alive]).astype(np.int64)


def _worse_neighbours(ranked: NDArray[Any], radius: float) -> tuple[Int64, Int64]:
    """Return for points in falling order of score those after each within `radius`: rows, and where each's begin."""
    pairs = np.zeros((0, 2), np.int64)
    if len(ranked):
        pairs = cKDTree(ranked).query_pairs(radius, output_type="ndarray")
    # The tree gives each pair once, smaller row first.
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    start = np.searchsorted(pairs[:, 0], np.arange(len(ranked) + 1))
    return pairs[:, 1].astype(np.int64), start.astype(np.int64)
