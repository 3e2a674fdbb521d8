"""Nuclei that exist only as numbers, a detector that sees them tile by tile, and an engine that finds drawn ones: what
merge, writers and the flow are fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellslide.nuclei.merge import to_cells
from cellslide.slides.tiles import TileGrid
from cellslide.types import Cells, Float64, HoverMaps, Instances, Int64, Level, ModelSpec, SlideInfo, Tile, UInt8

if TYPE_CHECKING:
    from cellslide.inference.torch_engine import Engine, TileOutput


def scattered(n: int, size_px: int, seed: int, radius_px: tuple[float, float] = (5.0, 16.0)) -> tuple[Float64, Float64]:
    """Return centres (N, 2) and radii (N,) of about `n` nuclei on a shaken grid over a square plane; few of them
    overlap."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(n)))
    pitch = size_px / side
    rows, cols = np.divmod(np.arange(side * side), side)
    shaken = np.stack([cols, rows], axis=1) + 0.5 + rng.uniform(-0.25, 0.25, (side * side, 2))
    return shaken * pitch, np.minimum(rng.uniform(*radius_px, side * side), pitch * 0.45)


@dataclass(frozen=True, slots=True)
class FakeDetector:
    """Sees discs, each tile on its own: `jitter_px` moves them (sd), `miss` of them are not seen; clipped at the read
    box.

    centre (N, 2) and radius (N,) are in plane pixels, sorted by y.
    """

    centre: Float64
    radius: Float64
    jitter_px: float = 0.0
    miss: float = 0.0
    seed: int = 0

    @classmethod
    def over(cls, size_px: int, n: int, jitter_px: float = 0.0, miss: float = 0.0, seed: int = 0) -> FakeDetector:
        """Return a detector of about `n` discs scattered over a square plane."""
        centre, radius = scattered(n, size_px, seed)
        order = np.argsort(centre[:, 1], kind="stable")
        return cls(centre[order], radius[order], jitter_px, miss, seed)

    def seen(self, tile: Tile) -> Int64:
        """Return the nuclei that this tile reports."""
        x0, y0, x1, y1 = tile.read_xyxy
        reach = float(self.radius.max())
        first, last = np.searchsorted(self.centre[:, 1], [y0 - reach, y1 + reach])
        near = np.arange(first, last)
        x, y, r = self.centre[near, 0], self.centre[near, 1], self.radius[near]
        near = near[(x + r > x0 + 1) & (x - r < x1 - 1) & (y + r > y0 + 1) & (y - r < y1 - 1)]
        rng = np.random.default_rng((self.seed, tile.index))
        return np.asarray(near[rng.random(len(near)) >= self.miss])

    def detect(self, tile: Tile) -> Instances:
        """Return the tile's nuclei with outlines of 24 vertices, in tile pixels."""
        seen = self.seen(tile)
        rng = np.random.default_rng((self.seed, tile.index, 1))
        centre = self.centre[seen] - tile.read_xyxy[:2] + rng.normal(0, 1, (len(seen), 2)) * self.jitter_px
        turn = np.arange(24) * (np.pi / 12)
        circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        ring = centre[:, None] + self.radius[seen, None, None] * circle
        clipped = np.clip(ring, 0, tile.size_px)
        cut = (ring != clipped).any(axis=(1, 2))
        # A clipped disc's centroid moves inwards, as that of a clipped mask does.
        centroid = np.where(cut[:, None], clipped.mean(axis=1), centre)
        return Instances(
            centroid_xy=centroid,
            score=np.ones(len(seen), np.float32),
            area_px=(np.pi * self.radius[seen] ** 2).astype(np.float32),
            cut=cut,
            contour_xy=clipped.reshape(-1, 2).astype(np.float32),
            contour_start=np.arange(len(seen) + 1, dtype=np.int64) * 24,
        )


def square_slide(size_px: int, mpp: float = 0.25) -> SlideInfo:
    """Describe a slide that exists only as numbers."""
    level = Level(size_px, size_px, 1.0)
    return SlideInfo("synthetic", Path("synthetic.tif"), "synthetic", size_px, size_px, mpp, mpp, "flag", (level,))


def detect_cells(detector: FakeDetector, grid: TileGrid, info: SlideInfo) -> Iterator[Cells]:
    """Yield each tile's cells, in tile order, as the pipeline stores them."""
    for tile in grid.tiles():
        yield to_cells(detector.detect(tile), tile, grid.plane, info)


class DrawnMaps:
    """An engine whose every tile comes out as the same drawn maps; `network`, where there is one, runs all the same."""

    name, precision, device, batch_size = "drawn", "fp32", "cpu", 1

    def __init__(self, spec: ModelSpec, maps: HoverMaps, network: Engine | None = None) -> None:
        self.spec, self._maps, self._network = spec, maps, network
        if network is not None:
            self.precision, self.device, self.batch_size = network.precision, network.device, network.batch_size

    def launch(self, images: UInt8) -> Callable[[], list[TileOutput]]:
        """Take tiles (B, H, W, 3)."""
        wait = (lambda: None) if self._network is None else self._network.launch(images)

        def fetch() -> list[TileOutput]:
            wait()
            return [self._maps for _ in images]

        return fetch

    def peak_device_bytes(self) -> int:
        """Return what the network holds."""
        return 0 if self._network is None else self._network.peak_device_bytes()


def picture(size_px: int, n: int = 1) -> UInt8:
    """Return tiles uint8 (n, H, W, 3) of noise: what a network costs does not depend on what it sees."""
    return np.random.default_rng(0).integers(0, 256, (n, size_px, size_px, 3), np.uint8)


def covered_mm2(spec: ModelSpec) -> float:
    """Return the area of the slide that one tile adds."""
    return ((spec.tile_px - spec.overlap_px) * spec.mpp / 1000) ** 2
