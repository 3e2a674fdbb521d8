"""How found nuclei are compared with points, data set by data set: radius, who chooses first, and how classes count.

Published scores of one data set differ by such rules, so each has a name here. Points are (x, y) in pixels of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Dataset, Sample
from cellslide.evaluate.detection import Pairs, Tally, pair_points
from cellslide.evaluate.layouts import conic
from cellslide.types import Bool, Float64, Int64

# MCSpatNet looks at so many neighbours, in a tree of one leaf; both decide which of two equally near points is first.
NEIGHBOURS, LEAF = 50, 2048


@dataclass(frozen=True, slots=True)
class Marks:
    """Points that are compared: xy float64 (N, 2) and score float64 (N,), or None where nothing is known of it."""

    xy: Float64
    score: Float64 | None = None

    def __len__(self) -> int:
        return len(self.xy)

    def take(self, rows: NDArray[Any]) -> Marks:
        """Return the rows given by a boolean mask or by indices, in that order."""
        return Marks(self.xy[rows], None if self.score is None else self.score[rows])


Pairing = Callable[[Marks, Marks, float], Pairs]


@dataclass(frozen=True, slots=True)
class Protocol:
    """One published rule, or ours.

    radius_px   farthest distance of a pair, on images of `mpp` µm/px; the same length on others.
    tolerance   a pixel size that differs from `mpp` by at most this share still means the published images.
    strict      a distance of exactly the radius is too far.
    pairing     who takes whom, given truth, predictions and radius.
    classes     "apart": each class is paired by itself. "weighted": pairs are made without classes, a wrong class
                weighs 2, a missed or invented nucleus 1 (HoVer-Net's F_c).
    dots        points at the same place are one point, as on a map of dots.
    per_image   F1 of a class is the mean over all images, 0 where it does not occur; otherwise counts are pooled.
    source      whose rule it is, in a few words.
    joined      classes that count as one, by the name that they count as; predicted names too.
    cut         makes of each image the images that are scored in its place.
    """

    name: str
    radius_px: float
    mpp: float
    strict: bool
    pairing: Pairing
    source: str
    classes: Literal["apart", "weighted"] = "apart"
    dots: bool = False
    per_image: bool = False
    tolerance: float = 0.05
    joined: Mapping[str, str] = field(default_factory=dict)
    cut: Callable[[Sample], list[Sample]] | None = None

    def class_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the classes that are scored of a data set that has `names`, sorted."""
        return tuple(sorted({self.joined.get(name, name) for name in names}))

    @property
    def radius_um(self) -> float:
        """The radius in µm at the pixel size that the rule was made for."""
        return round(self.radius_px * self.mpp, 6)

    def radius_at(self, mpp: float) -> float:
        """Return the radius in pixels of an image of `mpp` µm/px."""
        if abs(mpp / self.mpp - 1) <= self.tolerance:
            return self.radius_px
        return self.radius_px * self.mpp / mpp

    def pairs(self, true: Marks, pred: Marks, mpp: float) -> Pairs:
        """Pair points one to one in an image of `mpp` µm/px."""
        if not len(true) or not len(pred):
            return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        radius = self.radius_at(mpp)
        # Reaches up to what lies strictly below: one step of the number line more lets the circle itself in.
        return self.pairing(true, pred, radius if self.strict else float(np.nextafter(radius, np.inf)))

    def count(self, points: Marks) -> int:
        """Return how many points these are under the rule."""
        return len(np.unique(points.xy, axis=0)) if self.dots else len(points)

    def tally(self, true: Marks, pred: Marks, mpp: float) -> Tally:
        """Count what was found, invented and missed in an image of `mpp` µm/px."""
        found = len(self.pairs(true, pred, mpp))
        return Tally(found, self.count(pred) - found, self.count(true) - found)

    def class_tallies(
        self, true: Marks, true_class: Int64, pred: Marks, pred_class: Int64, n_classes: int, mpp: float
    ) -> tuple[Tally, ...]:
        """Count each class 0..n_classes-1; a nucleus of another class index belongs to none of them."""
        if self.classes == "weighted":
            pairs = self.pairs(true, pred, mpp)
            return tuple(weighted_tally(pairs, true_class, pred_class, k) for k in range(n_classes))
        each = ((true.take(true_class == k), pred.take(pred_class == k)) for k in range(n_classes))
        return tuple(self.tally(t, p, mpp) for t, p in each)


def weighted_tally(pairs: Pairs, true_class: Int64, pred_class: Int64, k: int) -> Tally:
    """Count class `k` as HoVer-Net weighs it (Graham et al. 2019, eq. 10): F1 of the sum of such counts is its F_c."""
    true, pred = true_class[pairs.true_index] == k, pred_class[pairs.pred_index] == k
    tp, wrong_pred, wrong_true = int((true & pred).sum()), int((~true & pred).sum()), int((true & ~pred).sum())
    invented = int((pred_class == k).sum()) - tp - wrong_pred
    missed = int((true_class == k).sum()) - tp - wrong_true
    return Tally(tp, 2 * wrong_pred + invented, 2 * wrong_true + missed)


def _by_optimum(true: Marks, pred: Marks, reach: float) -> Pairs:
    return pair_points(true.xy, pred.xy, reach)


def _by_row(true: Marks, pred: Marks, reach: float) -> Pairs:
    """True points from the top row down, left to right, each take the nearest prediction that is still free."""
    # Equal distances are frequent between whole pixels: the same tree over the same order chooses as the authors' does.
    true_rows, pred_rows = _row_major(true.xy), _row_major(pred.xy)
    tree = KDTree(pred.xy[pred_rows][:, ::-1], leafsize=LEAF)
    distance, near = tree.query(true.xy[true_rows][:, ::-1], k=NEIGHBOURS, distance_upper_bound=reach)
    chosen = _first_free(distance, near, len(pred_rows))
    return _pairs([(true_rows[t], pred_rows[p], d) for t, p, d in chosen])


def _row_major(xy: Float64) -> Int64:
    """Return one row of each place (x, y), from the top down, left to right."""
    return np.asarray(np.unique(xy[:, ::-1], axis=0, return_index=True)[1], np.int64)


def _by_score(true: Marks, pred: Marks, reach: float) -> Pairs:
    """Predictions by falling score, in their order where equal or unknown, each take the nearest free true point."""
    order = np.arange(len(pred)) if pred.score is None else np.argsort(-pred.score, kind="stable")
    distance, near = KDTree(true.xy).query(pred.xy[order], k=_neighbours(true), distance_upper_bound=reach)
    return _pairs([(t, order[p], d) for p, t, d in _first_free(distance, near, len(true))])


def _by_truth(true: Marks, pred: Marks, reach: float) -> Pairs:
    """True points in their order each take, of the free predictions in reach, the best score, then the nearest."""
    within = KDTree(pred.xy).query_ball_point(true.xy, reach)
    score = np.ones(len(pred)) if pred.score is None else pred.score
    free, found = np.ones(len(pred), np.bool_), []
    for t, rows in enumerate(within):
        near = np.array([row for row in sorted(rows) if free[row]], np.int64)
        distance = np.linalg.norm(pred.xy[near] - true.xy[t], axis=1)
        near, distance = near[distance < reach], distance[distance < reach]
        if len(near):
            best = np.lexsort((distance, -score[near]))[0]
            free[near[best]] = False
            found.append((t, near[best], distance[best]))
    return _pairs(found)


def _by_sum(true: Marks, pred: Marks, reach: float) -> Pairs:
    """All points at once for the least summed distance, near or far; pairs beyond reach are dropped afterwards."""
    cost = cdist(true.xy, pred.xy)
    t, p = linear_sum_assignment(cost)
    near = cost[t, p] < reach
    return Pairs(t[near].astype(np.int64), p[near].astype(np.int64), cost[t, p][near])


def _neighbours(points: Marks) -> int:
    # A list of neighbours keeps the answer two-dimensional, however few points there are.
    return max(2, min(NEIGHBOURS, len(points)))


def _first_free(distance: Float64, near: NDArray[Any], n: int) -> Iterator[tuple[int, int, float]]:
    """Yield (row, taken, distance): each row in turn takes the first of its neighbours (R, k) that nobody has yet."""
    free: Bool = np.ones(n + 1, np.bool_)
    free[n] = False  # A tree names point n where it found no further one.
    for row, candidates in enumerate(near):
        open_ = np.flatnonzero(free[candidates])
        if len(open_):
            taken = int(candidates[open_[0]])
            free[taken] = False
            yield row, taken, float(distance[row, open_[0]])


def _pairs(found: list[tuple[Any, Any, Any]]) -> Pairs:
    found = sorted(found)
    true, pred = (np.array([pair[i] for pair in found], np.int64) for i in (0, 1))
    return Pairs(true, pred, np.array([distance for _, _, distance in found], np.float64))


OPTIMAL = Protocol(
    "optimal", 12, 0.25, False, _by_optimum, "most pairs within 3 µm, no order (this package)", tolerance=0
)
BRCA_M2C = Protocol("brca-m2c", 6, 0.5, True, _by_row, "BRCA-M2C by MCSpatNet's authors", dots=True)
# Graham et al. 2019, section IV.A; the last three are the names that models here give.
CONSEP_CLASSES = {
    "healthy epithelial": "epithelial",
    "malignant epithelial": "epithelial",
    "fibroblast": "spindle-shaped",
    "muscle": "spindle-shaped",
    "endothelial": "spindle-shaped",
    "lymphocyte": "inflammatory",
    "tumor_epithelial": "epithelial",
    "stromal": "spindle-shaped",
}
# Track 1 of the challenge.
PUMA_CLASSES = {"lymphocyte": "tils", "plasma_cell": "tils"} | dict.fromkeys(
    ("histiocyte", "melanophage", "neutrophil", "stroma", "epithelium", "endothelium", "apoptosis"), "other"
)
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        OPTIMAL,
        BRCA_M2C,
        Protocol("promptnucseg", 12, 0.25, False, _by_score, "PromptNucSeg, DPA-P2PNet"),
        Protocol("ocelot", 15, 0.2, False, _by_score, "OCELOT 2023 challenge"),
        Protocol("puma", 15, 0.23, True, _by_truth, "PUMA challenge", per_image=True, joined=PUMA_CLASSES),
        Protocol("puma-10", 15, 0.23, True, _by_truth, "PUMA challenge, track 2", per_image=True),
        Protocol("pannuke", 12, 0.25, False, _by_sum, "HoVer-Net, CellViT, CellDETR on PanNuke", "weighted"),
        Protocol("consep", 12, 0.25, False, _by_sum, "HoVer-Net on CoNSeP", "weighted", joined=CONSEP_CLASSES),
        Protocol("conic", 6, 0.5, False, _by_sum, "HoVer-Net on Lizard", "weighted"),
        Protocol("conic-cellvta", 12, 0.25, False, _by_sum, "CellVTA on tiles of CoNIC", "weighted", cut=conic.cut),
        Protocol("monuseg", 12, 0.25, False, _by_sum, "HoVer-Net on MoNuSeg"),
        Protocol("nuinsseg", 12, 0.25, False, _by_sum, "HoVer-Net's rule on NuInsSeg"),
    )
}


def protocol_of(name: str | None, dataset: Dataset) -> Protocol:
    """Return the protocol `name`, or what suits a data set: BRCA-M2C's for points with classes and no masks, else ours.

    Raises UsageError for an unknown name.
    """
    if name is not None:
        if name not in PROTOCOLS:
            raise UsageError(f"--protocol {name}: must be among {', '.join(PROTOCOLS)}")
        return PROTOCOLS[name]
    points = [s for s in dataset.samples if s.mask_path is None and s.points_path is not None]
    typed = len(points) == len(dataset) and any(s.load_points().typed for s in points)
    return BRCA_M2C if typed else OPTIMAL
