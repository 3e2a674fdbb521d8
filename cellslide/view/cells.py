"""The cells of a box, out of a table of any length: places stay in memory, the rest is read by block and kept a while.

Frame: level-0 pixels; what goes to the page is relative to the box's corner, so that float32 is enough.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.store.cell_table import BLOCK_ROWS, Categorical, CellTable
from cellslide.types import Bool, Float32, Float64, Int64, take_rings
from cellslide.view.lru_cache import LruCache

Box = tuple[float, float, float, float]
CACHE_BYTES = 192 << 20
# More outlines than this are drawn as points; more points than this as how many there are.
MOST_OUTLINES, MOST_POINTS = 6_000, 20_000
# Below so many pixels on the screen a nucleus of this size has no outline worth drawing.
LEAST_SCREEN_PX, NUCLEUS_UM = 4.0, 8.0


class CellIndex:
    """Reads cells of a table by where they are; used from several threads."""

    def __init__(self, table: CellTable) -> None:
        self.table = table
        self.x, self.y, self.score = (table.vector(name).astype(np.float32) for name in ("x", "y", "score"))
        self.cache: LruCache[tuple[NDArray[Any], ...]] = LruCache(CACHE_BYTES, _size)
        self._lock = threading.Lock()
        self.mpp = (table.slide.mpp_x + table.slide.mpp_y) / 2

    def __len__(self) -> int:
        return len(self.x)

    def rows_in(self, box: Box, score: float = 0.0) -> Int64:
        """Return the rows, ascending, whose centroid lies in a half-open box and whose score is `score` at least."""
        x0, y0, x1, y1 = box
        # One axis first: most rows of a large slide end there.
        rows = np.flatnonzero((self.y >= y0) & (self.y < y1))
        x = self.x[rows]
        rows = rows[(x >= x0) & (x < x1)]
        return np.asarray(rows[self.scored(score)[rows]] if score > 0 else rows, np.int64)

    def scored(self, score: float) -> Bool:
        """Return bool (N,): the cells that are shown; one whose score is not known always is."""
        return ~(self.score < np.float32(score))

    def gather(self, name: str, rows: Int64) -> NDArray[Any]:
        """Return rows of `obsm[name]`, or of the column `name` (codes where it is categorical)."""
        blocks = rows // BLOCK_ROWS
        parts = [self._block(name, int(b))[rows[blocks == b] - b * BLOCK_ROWS] for b in np.unique(blocks)]
        return np.concatenate(parts) if parts else self._block(name, 0)[:0]

    def _block(self, name: str, block: int) -> NDArray[Any]:
        def read() -> tuple[NDArray[Any], ...]:
            start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(self))
            if name in self.table.matrices:
                return (self.table.matrix(name, start, stop),)
            column = self.table.column(name, start, stop)
            return (column.codes if isinstance(column, Categorical) else column,)

        with self._lock:
            return self.cache.get((name, block), read)[0]

    def rings(self, rows: Int64) -> tuple[Float64, Int64] | None:
        """Return the outlines of rows (ascending) as flat rings, or None where the table holds points."""
        if self.table.kind == "point" or self.table.shapes is None:
            return None
        first = self.table.shapes.first
        group = np.searchsorted(first, rows, side="right") - 1
        parts = [take_rings(*self._ring_block(int(g)), rows[group == g] - first[g]) for g in np.unique(group)]
        if not parts:
            return np.empty((0, 2)), np.zeros(1, np.int64)
        lengths = np.concatenate([np.diff(start) for _, start in parts])
        return np.concatenate([xy for xy, _ in parts]), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def _ring_block(self, group: int) -> tuple[Float64, Int64]:
        shapes = self.table.shapes
        assert shapes is not None
        with self._lock:
            xy, start = self.cache.get(
                ("rings", group), lambda: shapes.rings(*shapes.first[group : group + 2].tolist())
            )
        return xy, start

    def form(self, n: int, screen_scale: float) -> str:
        """Return how `n` cells are drawn at so many screen pixels per level-0 pixel: outlines, points or density."""
        if n > MOST_POINTS:
            return "density"
        large = screen_scale * NUCLEUS_UM / self.mpp >= LEAST_SCREEN_PX
        return "outlines" if large and n <= MOST_OUTLINES and self.table.kind != "point" else "points"


def _size(arrays: tuple[NDArray[Any], ...]) -> int:
    return sum(array.nbytes for array in arrays)


def relative(xy: NDArray[Any], box: Box) -> Float32:
    """Return points (N, 2) from the corner of a box, float32."""
    return (np.asarray(xy, np.float64) - (box[0], box[1])).astype(np.float32)


def density(
    x: Float32, y: Float32, marks: NDArray[Any], n_marks: int, box: Box, bin_px: float
) -> tuple[NDArray[np.uint32], int, int]:
    """Count points of a box by mark, 0..n_marks-1, on a grid of `bin_px`; (n_marks, rows, cols), rows and cols."""
    cols, rows = (max(1, int(np.ceil((high - low) / bin_px))) for low, high in ((box[0], box[2]), (box[1], box[3])))
    col = np.clip(((x - np.float32(box[0])) / bin_px).astype(np.int64), 0, cols - 1)
    row = np.clip(((y - np.float32(box[1])) / bin_px).astype(np.int64), 0, rows - 1)
    flat = (marks.astype(np.int64) * rows + row) * cols + col
    counts = np.bincount(flat, minlength=n_marks * rows * cols)
    return counts.reshape(n_marks, rows, cols).astype(np.uint32), rows, cols
