"""Which nuclei of two tables are the same, and how far both agree: overall, class by class and in each region."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cellslide.evaluate.detection import Pairs, pair_points
from cellslide.store.cell_table import CellTable
from cellslide.types import Bool, Float32, Float64, Int64

REGION_UM = 250.0


@dataclass(frozen=True, slots=True)
class Nuclei:
    """The nuclei of one table, without what it rejected.

    row int64 (N,) in the table; xy float64 (N, 2) level-0 px; class_index int64 (N,) into `names`, -1 for none; area
    float32 (N,) µm², 0 for a point; score float32 (N,).
    """

    names: tuple[str, ...]
    row: Int64
    xy: Float64
    class_index: Int64
    area: Float32
    score: Float32

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Regions:
    """Counts in squares of REGION_UM, each (rows, cols): nuclei of either, pairs, and pairs of one class.

    A pair whose centres lie in two squares counts half in each.
    """

    edge_px: float
    first: Int64
    second: Int64
    both: Float64
    alike: Float64

    @property
    def agreement(self) -> Float64:
        """2 both / (first + second), float64 (rows, cols); NaN where neither found a nucleus."""
        total = self.first + self.second
        shares: Float64 = np.divide(2 * self.both, total, out=np.full(total.shape, np.nan), where=total > 0)
        return shares


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two tables of one slide agree, in numbers.

    first, second, both  nuclei of each, and pairs; distance_um between the centres of a pair, median; area_ratio
               second by first, median, None where either has no outlines.
    names      classes of either table; `confusion` int64 (K, K) counts pairs by class of the first (row) and second.
    """

    first: int
    second: int
    both: int
    distance_um: float | None
    area_ratio: float | None
    names: tuple[str, ...]
    confusion: Int64
    regions: Regions

    @property
    def f1(self) -> float | None:
        """2 both / (first + second), None where neither has a nucleus."""
        total = self.first + self.second
        return 2 * self.both / total if total else None

    @property
    def same_class(self) -> float | None:
        """Share of the pairs that have one class, None where nothing is typed."""
        n = int(self.confusion.sum())
        return float(np.trace(self.confusion)) / n if n and len(self.names) > 1 else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa of the classes of the pairs (1960), None where it is not defined."""
        n, same = int(self.confusion.sum()), self.same_class
        if same is None:
            return None
        by_chance = float(self.confusion.sum(axis=1) @ self.confusion.sum(axis=0)) / n**2
        return None if by_chance == 1 else (same - by_chance) / (1 - by_chance)


@dataclass(frozen=True, slots=True)
class Matched:
    """The nuclei of two tables of one slide, and which are the same: indices into both, one to one."""

    first: Nuclei
    second: Nuclei
    pairs: Pairs

    @property
    def only_first(self) -> Int64:
        """Indices of the nuclei that the second does not have."""
        return np.setdiff1d(np.arange(len(self.first)), self.pairs.true_index)

    @property
    def only_second(self) -> Int64:
        """Indices of the nuclei that the first does not have."""
        return np.setdiff1d(np.arange(len(self.second)), self.pairs.pred_index)


def match_nuclei(first: CellTable, second: CellTable, radius_um: float) -> Matched:
    """Pair the nuclei of two tables of one slide, one to one within `radius_um`, as many as can be."""
    a, b = read_nuclei(first), read_nuclei(second)
    return Matched(a, b, pair_points(a.xy, b.xy, radius_um / _mpp(first)))


def measure_agreement(matched: Matched, table: CellTable) -> Agreement:
    """Count where both agree; `table` is either, for the size of the slide."""
    a, b, pairs = matched.first, matched.second, matched.pairs
    names = tuple(dict.fromkeys((*a.names, *b.names)))
    of_a = _renumber(a, names)[pairs.true_index]
    of_b = _renumber(b, names)[pairs.pred_index]
    typed, k = (of_a >= 0) & (of_b >= 0), len(names)
    confusion = np.bincount(of_a[typed] * k + of_b[typed], minlength=k * k).reshape(k, k).astype(np.int64)
    area_a, area_b = a.area[pairs.true_index], b.area[pairs.pred_index]
    sized = (area_a > 0) & (area_b > 0)
    return Agreement(
        len(a),
        len(b),
        len(pairs),
        float(np.median(pairs.distance_px)) * _mpp(table) if len(pairs) else None,
        float(np.median(area_b[sized] / area_a[sized])) if sized.any() else None,
        names,
        confusion,
        _regions(matched, typed & (of_a == of_b), table),
    )


def _mpp(table: CellTable) -> float:
    return (table.slide.mpp_x + table.slide.mpp_y) / 2


def read_nuclei(table: CellTable) -> Nuclei:
    """Return the nuclei of a table with the classes that were decided."""
    index = table.codes("class")
    names = table.decisions if (index == len(table.class_names)).any() else table.class_names
    x, y, area, score = (table.vector(name) for name in ("x", "y", "area_um2", "score"))
    kept = np.flatnonzero(table.vector("is_nucleus"))
    return Nuclei(names, kept, np.stack([x, y], axis=1)[kept].astype(np.float64), index[kept], area[kept], score[kept])


def _renumber(nuclei: Nuclei, names: tuple[str, ...]) -> Int64:
    to = np.array([*(names.index(name) for name in nuclei.names), -1], np.int64)
    return to[nuclei.class_index]


def _regions(matched: Matched, alike: Bool, table: CellTable) -> Regions:
    edge = REGION_UM / _mpp(table)
    cols, rows = (max(1, int(np.ceil(length / edge))) for length in (table.slide.width_px, table.slide.height_px))

    def count(xy: Float64) -> Int64:
        col = np.clip((xy[:, 0] / edge).astype(np.int64), 0, cols - 1)
        row = np.clip((xy[:, 1] / edge).astype(np.int64), 0, rows - 1)
        return np.bincount(row * cols + col, minlength=rows * cols).reshape(rows, cols).astype(np.int64)

    here, there = matched.first.xy[matched.pairs.true_index], matched.second.xy[matched.pairs.pred_index]
    both = (count(here) + count(there)) / 2
    same = (count(here[alike]) + count(there[alike])) / 2
    return Regions(edge, count(matched.first.xy), count(matched.second.xy), both, same)
