"""What the nuclei of a finished table look like as a whole: one pass, bounded memory, counts only.

Counts of whole numbers: the sums are the same in whatever order the cells come.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cellslide.plausibility.histogram import Histogram
from cellslide.plausibility.seams import SeamCheck, SeamVerdict
from cellslide.store.cell_table import BLOCK_ROWS, CellTable
from cellslide.types import Bool, Float32, Float64, Int64, RunRecord

MOST_DIAMETER_UM, STEP_UM = 40.0, 0.1
CROWD_UM = 64.0
# Parts of the slide that are compared with each other, along each axis.
BANDS = 8
# Nuclei of fewer than this say little of a part's median or mix of classes.
LEAST_CELLS = 200


@dataclass(slots=True)
class CellSums:
    """Sums over the nuclei of a slide (N of them); rejected objects count in `rejected` alone.

    counts    int64 (K,) by decided class; `abstained` and `untyped` have none.
    diameter  histogram (µm) of the circle of a nucleus' area, by most probable class; empty where nuclei are points.
    bands_x, bands_y  the same histogram in BANDS equal parts of the slide's width and height.
    mix       int64 (BANDS * BANDS, K) classes in equal parts of the slide.
    crowd     int64 (rows, columns) nuclei in squares of CROWD_UM over the slide, which is `size_um` wide and high.
    """

    classes: tuple[str, ...]
    n: int = 0
    rejected: int = 0
    abstained: int = 0
    untyped: int = 0
    in_artefact: int = 0
    counts: Int64 = field(init=False)
    mix: Int64 = field(init=False)
    diameter: Histogram = field(init=False)
    bands_x: Histogram = field(init=False)
    bands_y: Histogram = field(init=False)
    size_um: tuple[float, float] = (0.0, 0.0)
    crowd: Int64 = field(init=False)
    seams: SeamVerdict | None = None

    def __post_init__(self) -> None:
        k = len(self.classes)
        steps = round(MOST_DIAMETER_UM / STEP_UM)
        self.counts = np.zeros(k, np.int64)
        self.mix = np.zeros((BANDS * BANDS, k), np.int64)
        self.crowd = np.zeros([int(length // CROWD_UM) + 1 for length in reversed(self.size_um)], np.int64)
        self.diameter = Histogram(0.0, MOST_DIAMETER_UM, steps, k)
        self.bands_x, self.bands_y = (Histogram(0.0, MOST_DIAMETER_UM, steps, BANDS) for _ in range(2))

    @property
    def crowding(self) -> float:
        """Nuclei per mm² around a nucleus, the mean over nuclei; 0 where there are none."""
        return float((self.crowd**2).sum() / max(int(self.crowd.sum()), 1) / (CROWD_UM / 1e3) ** 2)

    def add(self, um: Float64, band_xy: Int64, area_um2: Float32, top: Int64, said: Bool) -> None:
        """Count nuclei: places (N, 2) in µm, bands along x and y (N, 2), most probable class, whether it is said."""
        self.n += len(um)
        rows, cols = self.crowd.shape
        col, row = np.clip((um / CROWD_UM).astype(np.int64), 0, (cols - 1, rows - 1)).T
        self.crowd += np.bincount(row * cols + col, minlength=rows * cols).reshape(rows, cols)
        self.untyped += int((top < 0).sum())
        self.abstained += int((~said & (top >= 0)).sum())
        k = len(self.classes)
        self.counts += np.bincount(top[said], minlength=k)
        part = band_xy[said, 1] * BANDS + band_xy[said, 0]
        self.mix += np.bincount(part * k + top[said], minlength=self.mix.size).reshape(self.mix.shape)
        # A point has no size.
        diameter = np.where(area_um2 > 0, 2 * np.sqrt(np.maximum(area_um2, 0) / np.pi), np.nan)
        self.diameter.add(diameter, np.maximum(top, 0))
        self.bands_x.add(diameter, band_xy[:, 0])
        self.bands_y.add(diameter, band_xy[:, 1])


def sum_cells(table: CellTable, record: RunRecord) -> CellSums:
    """Read a table once and sum up its nuclei."""
    slide = table.slide
    sums = CellSums(table.class_names, size_um=(slide.width_px * slide.mpp_x, slide.height_px * slide.mpp_y))
    seams = SeamCheck.of(table.slide, record)
    for start in range(0, len(table), BLOCK_ROWS):
        _add_block(sums, table, start, min(start + BLOCK_ROWS, len(table)), seams)
    if seams is not None:
        sums.seams = seams.verdict()
    return sums


def _add_block(sums: CellSums, table: CellTable, start: int, stop: int, seams: SeamCheck | None) -> None:
    xy = np.stack([table.vector(name, start, stop) for name in "xy"], axis=1).astype(np.float64)
    area, tile, is_nucleus, in_artefact = (
        table.vector(name, start, stop) for name in ("area_um2", "tile_index", "is_nucleus", "in_artefact")
    )
    top, decided = table.codes("class_top", start, stop), table.codes("class", start, stop)
    said = (decided >= 0) & (decided < len(sums.classes))
    size = np.array([table.slide.width_px, table.slide.height_px], np.float64)
    band = np.clip((xy / size * BANDS).astype(np.int64), 0, BANDS - 1)
    rows = np.flatnonzero(is_nucleus)
    sums.rejected += len(xy) - len(rows)
    sums.in_artefact += int(in_artefact[rows].sum())
    um = xy[rows] * (table.slide.mpp_x, table.slide.mpp_y)
    sums.add(um, band[rows], area[rows].astype(np.float32), top[rows], said[rows])
    if seams is not None:
        seams.add(xy[rows], tile[rows].astype(np.int64))
