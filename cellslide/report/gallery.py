"""Which cells a gallery shows: of each class the surest, the least sure, and those that the paths dispute most."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cellslide.types import Bool, Float32, Float64, Int64

Kind = Literal["sure", "unsure", "disputed", "small", "large"]
MOST_EACH = 8


@dataclass(frozen=True, slots=True)
class CellBlock:
    """N nuclei as the report needs them; `rows` int64 (N,) are theirs in the table.

    class_index  int64 (N,), -1 where a cell is not typed; `said` bool (N,), a class was said (typed, not abstained).
    local, global_  the paths' most probable classes int64 (N,), -1 where a path did not run; `sure` float32 (N,) how
                 sure both are of different classes, NaN where they agree.
    """

    rows: Int64
    xy: Float64
    class_index: Int64
    said: Bool
    prob: Float32
    score: Float32
    gate: Float32
    local: Int64
    global_: Int64
    sure: Float32
    area: Float32
    tile: Int64
    shapes: dict[str, Float32]

    def __len__(self) -> int:
        return len(self.xy)

    def take(self, chosen: Int64) -> CellBlock:
        """Return the nuclei `chosen`, indices into this block."""
        columns = {f.name: getattr(self, f.name)[chosen] for f in fields(self) if f.name != "shapes"}
        return CellBlock(**columns, shapes={name: values[chosen] for name, values in self.shapes.items()})


@dataclass(frozen=True, slots=True)
class GalleryCell:
    """A cell to show: its row, where it lies (level-0 pixels), its class, whether that was said, and its numbers.

    value  what it was chosen by: probability, score, or area in µm². local, global_ are classes, -1 where unknown.
    """

    row: int
    xy: tuple[float, float]
    class_index: int
    said: bool
    value: float
    local: int
    global_: int


class Gallery:
    """Keeps the best cells of each class and kind while blocks go by; ties by row, so that a rerun shows the same."""

    def __init__(self, n_classes: int) -> None:
        self.n_classes = n_classes
        self.kept: dict[tuple[int, Kind], list[tuple[float, GalleryCell]]] = {}

    def add(self, block: CellBlock) -> None:
        """Look at the next block of cells."""
        for kind, (rank, value) in _ranks(block).items():
            for k in range(self.n_classes):
                rows = np.flatnonzero((np.maximum(block.class_index, 0) == k) & np.isfinite(rank))
                if len(rows):
                    self._offer((k, kind), block, rows[_best(rank[rows], MOST_EACH)], rank, value)

    def _offer(
        self, key: tuple[int, Kind], block: CellBlock, rows: Int64, rank: NDArray[Any], value: NDArray[Any]
    ) -> None:
        offered = self.kept.setdefault(key, [])
        for i in rows.tolist():
            pick = GalleryCell(
                int(block.rows[i]), (float(block.xy[i, 0]), float(block.xy[i, 1])), key[0], bool(block.said[i]),
                float(value[i]), int(block.local[i]), int(block.global_[i]),
            )  # fmt: skip
            offered.append((float(rank[i]), pick))
        offered.sort(key=lambda pair: (-pair[0], pair[1].row))
        del offered[MOST_EACH:]

    def of(self, k: int, kind: Kind, n: int) -> list[GalleryCell]:
        """Return the `n` best of a class and kind, best first."""
        return [pick for _, pick in self.kept.get((k, kind), [])[:n]]


def _best(rank: NDArray[Any], n: int) -> Int64:
    """Return the indices of the `n` greatest, ties by place."""
    return np.lexsort((np.arange(len(rank)), -rank))[:n].astype(np.int64)


def _ranks(block: CellBlock) -> dict[Kind, tuple[Float64, Float64]]:
    """Return for each kind what cells are ranked by (the greater the better) and the number that is told of them."""
    prob = block.prob.astype(np.float64)
    if np.isfinite(prob).any():
        sure = block.sure.astype(np.float64)
        return {"sure": (prob, prob), "unsure": (-prob, prob), "disputed": (sure, sure)}
    score, area = block.score.astype(np.float64), block.area.astype(np.float64)
    sized = np.where(area > 0, area, np.nan)
    return {"sure": (score, score), "unsure": (-score, score), "small": (-sized, sized), "large": (sized, sized)}
