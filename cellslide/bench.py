"""What `cellslide bench` times: synthetic inputs, the plain published decode as a baseline, and CPU clocks around both.

CPU time is reported because wall time on a shared machine says little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.merge import merge_stream, to_cells
from cellslide.tiles import TileGrid, tile_grid
from cellslide.types import (
    Bool,
    Cells,
    Float32,
    Float64,
    HoverDecode,
    HoverMaps,
    Instances,
    Int32,
    Int64,
    Level,
    Plane,
    SlideInfo,
    Tile,
)


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and least CPU milliseconds of one measured form, and what it produced."""

    name: str
    cpu_ms: float
    cpu_ms_min: float
    count: int


@dataclass(frozen=True, slots=True)
class RawMaps:
    """Probabilities as a network gives them: foreground (2, H, W), hv (2, H, W), types (K + 1, H, W), all float32.

    `truth` int32 (H, W) holds the nuclei that were drawn.
    """

    foreground: Float32
    hv: Float32
    types: Float32
    truth: Int32

    def hover_maps(self) -> HoverMaps:
        """Return the maps as the engines hand them to the decoder."""
        wins = (self.foreground[1] > self.foreground[0]).astype(np.uint8)
        return HoverMaps(wins, self.foreground[1].astype(np.float16), self.hv, self.types.astype(np.float16))


def synthetic_maps(
    n: int = 800, size_px: int = 1024, seed: int = 0, radius_px: tuple[float, float] = (7.5, 13.5), noise: float = 0.05
) -> RawMaps:
    """Draw about `n` ellipses, some of them touching, and the maps a good network would give for them, plus noise."""
    rng = np.random.default_rng(seed)
    truth = _draw_ellipses(rng, n, size_px, radius_px)
    hv = _distance_maps(truth) + rng.normal(0, noise, (2, size_px, size_px))
    inside = np.clip(np.where(truth > 0, 0.93, 0.06) + rng.normal(0, noise, truth.shape), 0, 1)
    kind = np.concatenate([[0], rng.integers(1, 6, int(truth.max()))])[truth]
    types = np.full((6, size_px, size_px), 0.04) + 0.05 * rng.random((6, size_px, size_px))
    np.put_along_axis(types, kind[None], 0.7, axis=0)
    types /= types.sum(axis=0)
    foreground = np.stack([1 - inside, inside])
    return RawMaps(foreground.astype(np.float32), hv.astype(np.float32), types.astype(np.float32), truth)


def _draw_ellipses(rng: np.random.Generator, n: int, size_px: int, radius_px: tuple[float, float]) -> Int32:
    """Return a label map of ellipses on a shaken grid; a later one takes only free pixels, so neighbours touch."""
    side = int(np.ceil(np.sqrt(n)))
    pitch = size_px / side
    places = rng.permutation(side * side)[:n]
    centres = (np.stack(np.divmod(places, side), axis=1) + 0.5 + rng.uniform(-0.3, 0.3, (n, 2))) * pitch
    labels = np.zeros((size_px, size_px), np.int32)
    reach = int(np.ceil(radius_px[1]))
    for label, (row, col) in enumerate(centres, start=1):
        a, b = rng.uniform(*radius_px, 2)
        turn = rng.uniform(0, np.pi)
        top, left = max(int(row) - reach, 0), max(int(col) - reach, 0)
        crop = labels[top : int(row) + reach + 1, left : int(col) + reach + 1]
        rows, cols = np.indices(crop.shape)
        y, x = rows + top + 0.5 - row, cols + left + 0.5 - col
        u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        crop[((u / a) ** 2 + (v / b) ** 2 <= 1) & (crop == 0)] = label
    return labels


def _distance_maps(labels: Int32) -> NDArray[Any]:
    """Return horizontal and vertical distances to each nucleus's centre, scaled to -1..1 on either side of it."""
    maps = np.zeros((2, *labels.shape))
    pixels = np.flatnonzero(labels)
    number = labels.ravel()[pixels]
    n = int(labels.max()) + 1
    count = np.maximum(np.bincount(number, minlength=n), 1)
    for axis, index in enumerate(np.divmod(pixels, labels.shape[1])[::-1]):
        offset = index - (np.bincount(number, weights=index, minlength=n) / count)[number]
        far = np.full((2, n), 1e-6)
        np.maximum.at(far[0], number, -offset)
        np.maximum.at(far[1], number, offset)
        maps[axis].ravel()[pixels] = offset / np.where(offset < 0, far[0][number], far[1][number])
    return maps


@dataclass(frozen=True, slots=True)
class PlainNucleus:
    """One nucleus of the plain form: bbox, centroid and contour in pixel indices, class and its pixel share."""

    bbox: tuple[int, int, int, int]
    centroid: tuple[float, float]
    contour: NDArray[Any]
    type_id: int
    type_prob: float


def plain_hover(raw: RawMaps, kernel_px: int = 21, min_marker_px: int = 10) -> tuple[Int32, list[PlainNucleus]]:
    """Run the published post-processing step by step, with a mask of the whole tile for every nucleus (the
    baseline)."""
    labels = _plain_labels(raw, kernel_px, min_marker_px)
    type_map = np.argmax(raw.types, axis=0)
    return labels, [_plain_nucleus(labels == i, type_map) for i in np.unique(labels)[1:]]


def _plain_labels(raw: RawMaps, kernel_px: int, min_marker_px: int) -> Int32:
    import cv2
    from scipy import ndimage
    from skimage.segmentation import watershed

    def stretch(image: NDArray[Any]) -> NDArray[Any]:
        out = np.empty(image.shape, np.float32)
        return np.asarray(cv2.normalize(image, out, alpha=0, beta=1, norm_type=cv2.NORM_MINMAX, dtype=cv2.CV_32F))

    blob = (_without_small(ndimage.label(np.argmax(raw.foreground, axis=0))[0], 10) > 0).astype(np.int32)
    across = 1 - stretch(cv2.Sobel(stretch(raw.hv[0]), cv2.CV_64F, 1, 0, ksize=kernel_px))
    down = 1 - stretch(cv2.Sobel(stretch(raw.hv[1]), cv2.CV_64F, 0, 1, ksize=kernel_px))
    energy = np.maximum(np.maximum(across, down) - (1 - blob), 0)
    dist = -cv2.GaussianBlur((1.0 - energy) * blob, (3, 3), 0)
    calm = np.maximum(blob - (energy >= 0.4), 0)
    filled = ndimage.binary_fill_holes(calm).astype(np.uint8)
    opened = cv2.morphologyEx(filled, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    markers = _without_small(ndimage.label(opened)[0], min_marker_px)
    return np.asarray(watershed(dist, markers=markers, mask=blob), np.int32)


def _without_small(labels: NDArray[Any], min_px: int) -> NDArray[Any]:
    size = np.bincount(labels.ravel())
    return np.where((size < min_px)[labels], 0, labels)


def _plain_nucleus(mask: Bool, type_map: NDArray[Any]) -> PlainNucleus:
    import cv2

    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1
    crop = mask[top:bottom, left:right].astype(np.uint8)
    moments = cv2.moments(crop)
    contours, _ = cv2.findContours(crop, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    kinds, votes = np.unique(type_map[top:bottom, left:right][crop > 0], return_counts=True)
    order = np.argsort(-votes, kind="stable")
    best = order[1] if kinds[order[0]] == 0 and len(order) > 1 else order[0]
    return PlainNucleus(
        bbox=(top, left, bottom, right),
        centroid=(moments["m10"] / moments["m00"] + left, moments["m01"] / moments["m00"] + top),
        contour=contours[0].reshape(-1, 2) + (left, top),
        type_id=int(kinds[best]),
        type_prob=float(votes[best] / (crop.sum() + 1.0e-6)),
    )


def cpu_ms(call: Callable[[], Any], rounds: int) -> list[float]:
    """Return CPU milliseconds of each of `rounds` calls."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        call()
        times.append((time.process_time() - begin) * 1e3)
    return times


def timing(name: str, call: Callable[[], int], rounds: int) -> Timing:
    """Measure one form that returns how many nuclei it gave; a first call, not counted, loads what it needs."""
    count = call()
    times = cpu_ms(call, rounds)
    return Timing(name, float(np.median(times)), min(times), count)


def bench_decode(n: int = 800, size_px: int = 1024, rounds: int = 5, seed: int = 0) -> list[Timing]:
    """Time the plain published form, then both modes of ours with outlines and class probabilities, on one tile."""
    import cv2

    from cellslide.decode import decode_hover

    cv2.setNumThreads(1)
    raw = synthetic_maps(n, size_px, seed)
    maps = raw.hover_maps()
    published, fixed = HoverDecode(mode="published"), HoverDecode(mode="fixed")
    return [
        timing("published, plain form", lambda: len(plain_hover(raw)[1]), rounds),
        timing("published, cellslide", lambda: len(decode_hover(maps, published)), rounds),
        timing("fixed, cellslide", lambda: len(decode_hover(maps, fixed)), rounds),
    ]


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


def bench_merge(n: int = 1_000_000, tile_px: int = 1024, overlap_px: int = 128, rounds: int = 1) -> list[Timing]:
    """Time the merge of `n` nuclei at 5,000 per mm2 (0.25 µm/px), outlines of 24 vertices carried along."""
    size_px = int(np.sqrt(n / 5000) * 4000)
    info = square_slide(size_px)
    grid = tile_grid(Plane.of(info, 0.25), tile_px, overlap_px)
    parts = list(detect_cells(FakeDetector.over(size_px, n, jitter_px=0.6, miss=0.005), grid, info))

    def merge() -> int:
        return sum(len(block) for block in merge_stream(parts, grid))

    return [timing(f"merge of {sum(map(len, parts)):,} reports", merge, rounds)]
