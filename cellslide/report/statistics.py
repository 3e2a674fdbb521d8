"""Everything a report says of the cells themselves, from one pass over the table in bounded memory.

Frames: `Frame` is the level-0 box that the pictures show; grids [row, col] lie over it in square bins.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cellslide.plausibility.histogram import Histogram
from cellslide.report.gallery import CellBlock, Gallery
from cellslide.store.cell_table import BLOCK_ROWS, CellTable
from cellslide.types import Float32, Float64, Int64, SlideInfo

MOST_DOTS = 20_000
GRID_BINS = 160
LEAST_BIN_UM = 10.0
SHAPES = {
    "area_um2": (0.0, 1000.0, 1000),
    "major_axis_um": (0.0, 80.0, 320),
    "eccentricity": (0.0, 1.0, 100),
    "circularity": (0.0, 1.2, 120),
}


@dataclass(frozen=True, slots=True)
class Frame:
    """What the pictures show: a level-0 box (x0, y0, x1, y1), and square bins of `bin_px` level-0 pixels over it."""

    box: tuple[float, float, float, float]
    bin_px: float
    mpp: float

    @classmethod
    def of(cls, info: SlideInfo, box: tuple[float, float, float, float]) -> Frame:
        """Return the frame of a box of a slide."""
        mpp = (info.mpp_x + info.mpp_y) / 2
        edge = max(box[2] - box[0], box[3] - box[1])
        return cls(box, edge / min(GRID_BINS, max(1, int(edge * mpp / LEAST_BIN_UM))), mpp)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        x0, y0, x1, y1 = self.box
        return max(1, int(np.ceil((y1 - y0) / self.bin_px))), max(1, int(np.ceil((x1 - x0) / self.bin_px)))

    @property
    def bin_um(self) -> float:
        """Edge of a bin in µm."""
        return self.bin_px * self.mpp

    @property
    def bin_mm2(self) -> float:
        """Area of a bin."""
        return (self.bin_um / 1e3) ** 2

    def bins(self, xy: Float64) -> Int64:
        """Return the flat bin of each point (N, 2); points beyond the box count in the bin at its edge."""
        rows, cols = self.shape
        col = np.clip(((xy[:, 0] - self.box[0]) / self.bin_px).astype(np.int64), 0, cols - 1)
        row = np.clip(((xy[:, 1] - self.box[1]) / self.bin_px).astype(np.int64), 0, rows - 1)
        return row * cols + col


@dataclass(slots=True)
class CellStatistics:
    """The cells of a slide, summed up.

    counts       int64 (K,) cells of which the class was said; `abstained` (K,) those whose class was not, by the most
                 probable one; `untyped` cells have none, and `rejected` ones are no nucleus: nothing else counts them.
    density      int32 (K, rows, cols) said cells per bin; `where_both`, `where_differ` (rows, cols) cells that both
                 paths typed, and those of which they say different classes.
    agreement    int64 (K, K) cells by local class (row) and global class (column); None where one path alone ran.
    dots_xy, dots_class  the cells that the picture shows, all or a sample; class K is "no class said".
    confidence   groups 0 said, 1 abstained; `area` by class; `score`, `gate` and the shapes of all.
    """

    classes: tuple[str, ...]
    typed: bool
    frame: Frame
    n: int
    counts: Int64
    abstained: Int64
    untyped: int
    rejected: int
    density: NDArray[np.int32]
    where_both: NDArray[np.int32]
    where_differ: NDArray[np.int32]
    agreement: Int64 | None
    confidence: Histogram
    score: Histogram
    gate: Histogram
    area: Histogram
    shapes: dict[str, Histogram]
    picks: Gallery
    dots_xy: list[Float32] = field(default_factory=list)
    dots_class: list[NDArray[np.uint8]] = field(default_factory=list)

    @property
    def n_dots(self) -> int:
        """Cells that the picture shows."""
        return sum(map(len, self.dots_class))


def tally_cells(table: CellTable, frame: Frame) -> CellStatistics:
    """Read a table once and sum it up."""
    tally = _empty(table, frame)
    chosen = _dots(len(table))
    for start in range(0, len(table), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(table))
        block = read_block(table, start, stop)
        tally.n += len(block)
        tally.rejected += stop - start - len(block)
        _add(tally, block)
        tally.picks.add(block)
        _keep_dots(tally, block, np.flatnonzero(np.isin(block.rows, chosen)))
    return tally


def _dots(n: int) -> Int64:
    """Return the sorted rows that are drawn: all, or a sample that a rerun repeats."""
    if n <= MOST_DOTS:
        return np.arange(n, dtype=np.int64)
    return np.unique((np.random.default_rng(0).random(MOST_DOTS) * n).astype(np.int64))


def _empty(table: CellTable, frame: Frame) -> CellStatistics:
    k = len(table.class_names)
    has_prob = "prob_local" in table.matrices and "prob_global" in table.matrices
    shapes = {name: Histogram(*SHAPES[name]) for name in SHAPES if name in table.features and name != "area_um2"}
    return CellStatistics(
        classes=table.class_names,
        typed=is_typed(table),
        frame=frame,
        n=0,
        counts=np.zeros(k, np.int64),
        abstained=np.zeros(k, np.int64),
        untyped=0,
        rejected=0,
        density=np.zeros((k, *frame.shape), np.int32),
        where_both=np.zeros(frame.shape, np.int32),
        where_differ=np.zeros(frame.shape, np.int32),
        agreement=np.zeros((k, k), np.int64) if has_prob else None,
        confidence=Histogram(0.0, 1.0, 40, 2),
        score=Histogram(0.0, 1.0, 100),
        gate=Histogram(0.0, 1.0, 40),
        area=Histogram(*SHAPES["area_um2"], groups=k),
        shapes=shapes,
        picks=Gallery(k),
    )


def is_typed(table: CellTable) -> bool:
    """Tell whether the cells have classes of their own: from a model that types, or from a classifier."""
    return "prob" in table.matrices or "gate" in table.columns or len(table.class_names) > 1


def read_block(table: CellTable, start: int, stop: int) -> CellBlock:
    """Read the columns that a report needs of the nuclei among rows [start, stop)."""
    n = stop - start
    x, y, prob, score, area, tile = (
        table.vector(name, start, stop) for name in ("x", "y", "class_prob", "score", "area_um2", "tile_index")
    )
    index, decision = table.codes("class_top", start, stop), table.codes("class", start, stop)
    gate = table.vector("gate", start, stop) if "gate" in table.columns else np.full(n, np.nan, np.float32)
    local, global_, sure = _paths(table, start, stop)
    features = table.matrix("X", start, stop) if table.features else np.empty((n, 0), np.float32)
    shapes = {name: features[:, k] for k, name in enumerate(table.features) if name in SHAPES}
    xy = np.stack([x, y], axis=1).astype(np.float64)
    said = (decision >= 0) & (decision < len(table.class_names))
    block = CellBlock(
        np.arange(start, stop), xy, index, said, prob, score, gate, local, global_, sure, area, tile.astype(np.int64),
        shapes,
    )  # fmt: skip
    return block.take(np.flatnonzero(table.vector("is_nucleus", start, stop)))


def _paths(table: CellTable, start: int, stop: int) -> tuple[Int64, Int64, Float32]:
    nothing = np.full(stop - start, -1, np.int64)
    never = np.full(stop - start, np.nan, np.float32)
    if not {"prob_local", "prob_global"} <= set(table.matrices):
        return nothing, nothing, never
    tops = []
    for name in ("prob_local", "prob_global"):
        prob = table.matrix(name, start, stop)
        ran = np.isfinite(prob).all(axis=1)
        top = np.where(ran, np.nan_to_num(prob).argmax(axis=1), -1).astype(np.int64)
        tops.append((top, np.where(ran, prob.max(axis=1), np.nan).astype(np.float32)))
    (local, p_local), (global_, p_global) = tops
    differ = (local >= 0) & (global_ >= 0) & (local != global_)
    return local, global_, np.where(differ, np.minimum(p_local, p_global), never).astype(np.float32)


def _add(tally: CellStatistics, block: CellBlock) -> None:
    k, shape = len(tally.classes), tally.frame.shape
    index, said = block.class_index, block.said
    tally.counts += np.bincount(index[said], minlength=k)
    tally.abstained += np.bincount(index[~said & (index >= 0)], minlength=k)
    tally.untyped += int((index < 0).sum())
    bins, size = tally.frame.bins(block.xy), shape[0] * shape[1]
    flat = np.bincount(index[said] * size + bins[said], minlength=k * size)
    tally.density += flat.reshape(tally.density.shape).astype(np.int32)
    both = (block.local >= 0) & (block.global_ >= 0)
    if tally.agreement is not None and both.any():
        pairs = np.bincount(block.local[both] * k + block.global_[both], minlength=k * k)
        tally.agreement += pairs.reshape(k, k)
        differ = both & (block.local != block.global_)
        for grid, rows in ((tally.where_both, both), (tally.where_differ, differ)):
            grid += np.bincount(bins[rows], minlength=size).reshape(shape).astype(np.int32)
    _add_histograms(tally, block)


def _add_histograms(tally: CellStatistics, block: CellBlock) -> None:
    known = np.where(block.class_index >= 0, np.where(block.said, 0, 1), -1)
    tally.confidence.add(block.prob, known)
    tally.score.add(block.score)
    tally.gate.add(block.gate)
    # A point has no size.
    tally.area.add(np.where(block.area > 0, block.area, np.nan), np.maximum(block.class_index, 0))
    for name, histogram in tally.shapes.items():
        histogram.add(np.where(block.area > 0, block.shapes[name], np.nan))


def _keep_dots(tally: CellStatistics, block: CellBlock, rows: Int64) -> None:
    tally.dots_xy.append(block.xy[rows].astype(np.float32))
    named = np.where(block.said[rows], block.class_index[rows], len(tally.classes))
    tally.dots_class.append(named.astype(np.uint8))
