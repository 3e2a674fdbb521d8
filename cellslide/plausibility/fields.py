"""Fields: squares of the plane as the network saw them, each measured once, from the pixels of its tile.

Fields stand in a lattice over the whole plane. A field belongs to the tile whose own box holds its centre, so that each
is measured once whatever the tile size; what of it lies beyond the read box is the edge repeated.
"""

from __future__ import annotations

import cv2
import numpy as np

from cellslide.types import FIELD_MEASURES, Bool, Fields, Float32, Float64, Int32, Plane, Tile, UInt8

FIELD_UM = 64.0
# Focus is judged at this pixel size or at the slide's, whichever is coarser; colour on pixels of 2 µm.
FOCUS_MPP, COLOR_MPP = 0.5, 2.0
GLASS = 245.0
STAINED = 0.12
# Of the stained pixels those with most and with least red absorbed stand for haematoxylin and eosin.
EXTREME = 0.1
RED_OF_NUCLEI = 0.35
EOSIN_GREEN, EOSIN_RED = 0.5, 0.3
BLUR_PX = 11
JPEG_PX, LEAST_PERIOD = 8, 4.0


def edge_px(plane: Plane) -> int:
    """Return the edge of a field in plane pixels."""
    return max(8, round(FIELD_UM / plane.mpp))


def centres(place: Int32, plane: Plane) -> Float64:
    """Return the centres (N, 2) of fields in level-0 pixels."""
    return plane.to_level0((place + 0.5) * edge_px(plane))


def measure_fields(image: UInt8, tile: Tile, plane: Plane, slide_mpp: float, block_px: float) -> Fields:
    """Measure the fields that a tile owns, from the pixels of its read box, uint8 (H, W, 3).

    slide_mpp  pixel size of level 0.
    block_px   edge of a JPEG block of the level that was read, in plane pixels.
    """
    edge = edge_px(plane)
    (first_col, n_cols), (first_row, n_rows) = (
        _owned(tile.own_xyxy[axis], tile.own_xyxy[axis + 2], edge) for axis in (0, 1)
    )
    if not n_cols or not n_rows:
        return Fields.of([])
    corner = first_col * edge, first_row * edge
    area = _cut(image, corner[0] - tile.read_xyxy[0], corner[1] - tile.read_xyxy[1], n_cols * edge, n_rows * edge)
    grid = n_rows, n_cols
    grey = np.asarray(cv2.cvtColor(area, cv2.COLOR_RGB2GRAY), np.uint8)
    blocks = _blockiness(grey, corner, block_px)
    values = np.column_stack([_colours(area, grid), np.full(n_rows * n_cols, blocks, np.float32)])
    blur = _blur(grey, grid, edge, max(FOCUS_MPP, slide_mpp) / plane.mpp)
    named = dict(zip((*COLOURS, "blocks"), values.T, strict=True)) | {"blur": blur}
    row, col = np.divmod(np.arange(n_rows * n_cols), n_cols)
    place = np.column_stack([col + first_col, row + first_row]).astype(np.int32)
    return Fields(place, np.column_stack([named[name] for name in FIELD_MEASURES]).astype(np.float32))


def _owned(low: int, high: int, edge: int) -> tuple[int, int]:
    """Return the first field whose centre lies from `low` to `high` along an axis, and how many there are."""
    first, last = (int(np.ceil(at / edge - 0.5)) for at in (low, high))
    return first, max(last - first, 0)


def _cut(image: UInt8, x: int, y: int, width: int, height: int) -> UInt8:
    """Return a box of an image; what lies beyond its edge is the edge repeated."""
    rows, cols = image.shape[:2]
    inside = image[max(y, 0) : max(min(y + height, rows), 1), max(x, 0) : max(min(x + width, cols), 1)]
    top, left = max(-y, 0), max(-x, 0)
    bottom, right = height - top - inside.shape[0], width - left - inside.shape[1]
    if not (top or left or bottom or right):
        return inside
    return np.asarray(cv2.copyMakeBorder(inside, top, bottom, left, right, cv2.BORDER_REPLICATE), np.uint8)


COLOURS = tuple(name for name in FIELD_MEASURES if name not in ("blur", "blocks"))


def _colours(area: UInt8, grid: tuple[int, int]) -> Float32:
    """Return the measures of colour (N, len(COLOURS)) of fields that lie in a grid (rows, columns)."""
    n_rows, n_cols = grid
    edge = round(FIELD_UM / COLOR_MPP)
    small = np.asarray(cv2.resize(area, (n_cols * edge, n_rows * edge), interpolation=cv2.INTER_AREA), np.uint8)
    pixels = small.reshape(n_rows, edge, n_cols, edge, 3).swapaxes(1, 2).reshape(n_rows * n_cols, edge * edge, 3)
    density = -np.log((pixels.astype(np.float32) + 1) / GLASS)
    whole = density.mean(axis=2)
    stained = whole > STAINED
    n = np.maximum(stained.sum(axis=1), 1)
    mean = (whole * stained).sum(axis=1) / n
    contrast = np.sqrt(np.maximum(((whole - mean[:, None]) ** 2 * stained).sum(axis=1) / n, 0))
    haematoxylin, eosin, depth = _stains(density, whole, stained)
    nuclei = (density[..., 0] > RED_OF_NUCLEI).mean(axis=1)
    dense = ((density[..., 1] > EOSIN_GREEN) & (density[..., 0] < EOSIN_RED)).mean(axis=1)
    ink, dark = _marks(pixels)
    return np.column_stack(
        [stained.mean(axis=1), mean, contrast, haematoxylin, eosin, depth, ink, dark, nuclei, dense]
    ).astype(np.float32)


def _stains(density: Float32, whole: Float32, stained: Bool) -> tuple[Float32, Float32, Float32]:
    """Return unit vectors (N, 3) of the stained pixels of N fields that absorb red most and least, beside the rest.

    The third is the log of the density of the first pixels over that of the second, 0 where nothing is stained.
    """
    share = np.where(stained, density[..., 0] / np.maximum(3 * whole, 1e-6), np.inf)
    order = np.argsort(share, axis=1)
    rank, n = np.arange(share.shape[1])[None], stained.sum(axis=1)[:, None]
    ranked = np.take_along_axis(density, order[..., None], axis=1)
    found, sums = [], []
    for chosen in ((rank >= (1 - EXTREME) * n) & (rank < n), rank < EXTREME * n):
        total = (ranked * chosen[..., None]).sum(axis=1)
        found.append(total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-6))
        sums.append(total.sum(axis=1) / np.maximum(chosen.sum(axis=1), 1))
    depth = np.log(np.maximum(sums[0], 1e-6) / np.maximum(sums[1], 1e-6))
    return found[0], found[1], depth.astype(np.float32)


def _marks(pixels: UInt8) -> tuple[Float32, Float32]:
    """Return the share of pixels (N, P, 3) of a pen's colour, and of black ones; H&E is never blue without red."""
    red, green, blue = (pixels[..., k].astype(np.int16) for k in range(3))
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    ink = ((blue - red > 40) & (red < green + 4)) | ((green - red > 20) & (green > blue - 12))
    dark = (high < 80) & (high - low < 32)
    return ink.mean(axis=1, dtype=np.float32), dark.mean(axis=1, dtype=np.float32)


def _blur(grey: UInt8, grid: tuple[int, int], edge: int, ratio: float) -> Float32:
    """Return Crete's measure of blur (N,) of fields in a grid, after pixels were made `ratio` times as large.

    Crete et al. (2007): what another blur takes from steps between neighbours is little where there was blur.
    """
    n_rows, n_cols = grid
    size = max(16, round(edge / ratio))
    scaled = cv2.resize(grey, (n_cols * size, n_rows * size), interpolation=cv2.INTER_AREA).astype(np.float32)
    worst = np.zeros(n_rows * n_cols, np.float32)
    for dx, dy in ((1, 0), (0, 1)):
        steps = np.abs(cv2.Sobel(scaled, cv2.CV_32F, dx, dy))
        smooth = cv2.blur(scaled, (BLUR_PX, 1) if dx else (1, BLUR_PX))
        lost = np.maximum(steps - np.abs(cv2.Sobel(smooth, cv2.CV_32F, dx, dy)), 0)
        before, gone = (cv2.resize(a, (n_cols, n_rows), interpolation=cv2.INTER_AREA).ravel() for a in (steps, lost))
        worst = np.maximum(worst, np.where(before > 1, 1 - gone / np.maximum(before, 1e-6), np.nan))
    return worst.astype(np.float32)


def _blockiness(grey: UInt8, corner: tuple[int, int], period: float) -> float:
    """Return the mean step at the borders of JPEG blocks over that elsewhere, along both axes."""
    if period < LEAST_PERIOD:
        return float("nan")
    ratios = []
    for axis, at in ((1, corner[0]), (0, corner[1])):
        steps = np.abs(np.diff(grey.astype(np.int16), axis=axis)).mean(axis=1 - axis)
        border = (
            np.rint(np.arange(np.ceil((at + 1) / period), (at + len(steps)) / period) * period).astype(int) - at - 1
        )
        chosen = np.zeros(len(steps), np.bool_)
        chosen[border[(border >= 0) & (border < len(steps))]] = True
        ratios.append(steps[chosen].mean() / max(steps[~chosen].mean(), 1e-6))
    return float(np.mean(ratios))
