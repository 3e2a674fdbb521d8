"""Whether tiles left a trace: nuclei lost or counted twice where two tiles meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cellslide.slides.tiles import TileGrid, fitting_grid
from cellslide.types import Bool, Float64, Int64, Plane, RunRecord, SlideInfo

# Nuclei this near a seam are compared with those beside them; both bands lie in the tiles' overlap.
NEAR_UM, BESIDE_UM = 3.0, 12.0
TWIN_UM = 1.5
# A sign of a fault is a difference that chance does not make and an eye would see.
LEAST_Z, LEAST_CHANGE = 4.0, 0.25


@dataclass(frozen=True, slots=True)
class SeamVerdict:
    """Nuclei near seams, how many there would be at the density beside them, and pairs that may be one nucleus."""

    near: int
    expected: float
    twins: int

    @property
    def odd(self) -> bool:
        """Whether nuclei are lost or doubled along seams."""
        change = self.near - self.expected
        return bool(abs(change) > max(LEAST_Z * np.sqrt(max(self.expected, 1.0)), LEAST_CHANGE * self.expected))


class SeamCheck:
    """Counts nuclei along the borders of own boxes while the table goes by."""

    def __init__(self, grid: TileGrid) -> None:
        self.plane = grid.plane
        self.x = np.array([grid.tile(k).own_xyxy[0] for k in range(1, grid.n_cols)], np.float64)
        self.y = np.array([grid.tile(k * grid.n_cols).own_xyxy[1] for k in range(1, grid.n_rows)], np.float64)
        self.near = self.beside = 0
        self._xy: list[Float64] = []
        self._tile: list[Int64] = []

    @classmethod
    def of(cls, info: SlideInfo, record: RunRecord) -> SeamCheck | None:
        """Return the check for how a slide was searched, None where its cells come from elsewhere or from one tile."""
        spec, tiles = record.config.get("spec"), record.config.get("tiles")
        if not spec or not tiles or tiles.get("overlap_px") is None:
            return None
        grid = _grid(info, spec, tiles, record.engine)
        return cls(grid) if len(grid) > 1 else None

    def add(self, xy: Float64, tile: Int64) -> None:
        """Look at the next block: level-0 points (N, 2) and the tiles that found them."""
        distance = self._distance_um(self.plane.from_level0(xy))
        near = distance <= NEAR_UM
        self.near += int(near.sum())
        self.beside += int(((distance > NEAR_UM) & (distance <= BESIDE_UM)).sum())
        self._xy.append(xy[near])
        self._tile.append(tile[near])

    def _distance_um(self, xy: Float64) -> Float64:
        """Return how far from the nearest seam points (N, 2) of the plane lie."""
        across = (_to_nearest(xy[:, axis], cuts) for axis, cuts in ((0, self.x), (1, self.y)))
        return np.minimum(*across) * self.plane.mpp

    def verdict(self) -> SeamVerdict:
        """Return what was found in all blocks."""
        expected = self.beside * NEAR_UM / (BESIDE_UM - NEAR_UM)
        return SeamVerdict(self.near, expected, self._twins())

    def _twins(self) -> int:
        from scipy.spatial import KDTree

        xy, tile = np.concatenate([np.empty((0, 2)), *self._xy]), np.concatenate([np.empty(0, np.int64), *self._tile])
        if len(xy) < 2:
            return 0
        pairs = KDTree(self.plane.from_level0(xy) * self.plane.mpp).query_pairs(TWIN_UM, output_type="ndarray")
        apart: Bool = tile[pairs[:, 0]] != tile[pairs[:, 1]]
        return int(apart.sum())


def _grid(info: SlideInfo, spec: dict[str, Any], tiles: dict[str, Any], engine: str) -> TileGrid:
    plane = Plane.of(info, float(spec["mpp"]))
    step = None if engine == "onnx" else int(spec["multiple_px"])
    return fitting_grid(plane, int(tiles["size_px"] or spec["tile_px"]), int(tiles["overlap_px"]), step)


def _to_nearest(values: Float64, cuts: Float64) -> Float64:
    """Return how far each value is from the nearest of the sorted cuts, infinity where there is none."""
    if not len(cuts):
        return np.full(len(values), np.inf)
    at = np.searchsorted(cuts, values)
    below = np.where(at > 0, values - cuts[np.maximum(at - 1, 0)], np.inf)
    above = np.where(at < len(cuts), cuts[np.minimum(at, len(cuts) - 1)] - values, np.inf)
    return np.minimum(below, above)
