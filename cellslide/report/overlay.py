"""Outlines of a cell table drawn over the slide: the picture to look at before believing any number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cellslide.errors import UsageError
from cellslide.slides.slide import Slide
from cellslide.store.atomic import beside
from cellslide.store.cell_table import CellChunk, open_table
from cellslide.types import Bool, Float64, Int32, Plane, SlideInfo, UInt8

ROWS_AT_ONCE = 50_000
# cv2 takes vertices as integers of 1/16 px, and its pixel centres lie on whole numbers where ours lie on halves.
_SHIFT = 4
_HALF_PX = 0.5
# A point is a dot with a white rim, since colours of classes are lost on dark nuclei; 2 µm wide, but never a speck.
POINT_RADIUS_UM, POINT_RADIUS_PX, RIM_PX = 1.0, (2.0, 4.0), 1.0
WHITE = (255, 255, 255)
HATCH_PX = 4

Colors = tuple[tuple[int, int, int], ...]


def render_overlay(
    slide: Slide,
    table_path: Path,
    out_png: Path,
    region: tuple[int, int, int, int] | None = None,
    max_px: int = 2000,
) -> Path:
    """Draw the outlines of the cells of `cells.zarr` over a region of the slide and write a PNG.

    `region` is a level-0 xyxy box, the whole slide if None; the picture's longer edge is at most `max_px` pixels and it
    never enlarges the slide. Cells are coloured by class, grey where they have none or abstain, and hatched where they
    are no nucleus (points: white, with a stroke). Returns `out_png`; raises UsageError for an empty region.
    """
    box = region or (0, 0, slide.info.width_px, slide.info.height_px)
    picture = draw_overlay(slide, table_path, box, max_px)
    with beside(out_png) as scratch:
        Image.fromarray(picture).save(scratch, format="PNG")
    return out_png


def draw_overlay(slide: Slide, table_path: Path, box: tuple[int, int, int, int], max_px: int) -> UInt8:
    """Return the picture that `render_overlay` writes, uint8 (h, w, 3)."""
    if box[2] <= box[0] or box[3] <= box[1]:
        raise UsageError(f"region {box}: must be x0,y0,x1,y1 with x1 > x0 and y1 > y0, in level-0 pixels")
    plane, corner, picture = _background(slide, box, max_px)
    with open_table(table_path) as table:
        # The last colour is also for cells that were not typed (-1).
        for chunk in table.iter_chunks(ROWS_AT_ONCE, obs=("is_nucleus",)):
            _draw_chunk(picture, chunk, table.decision_colors, plane, corner)
    return picture


def densest_region(info: SlideInfo, table_path: Path, size_px: int) -> tuple[int, int, int, int]:
    """Return a level-0 box with edges of `size_px`, inside the slide, about where most cells lie."""
    step = max(1, size_px // 4)
    counts = np.zeros((info.height_px // step + 1, info.width_px // step + 1), np.float32)
    with open_table(table_path) as table:
        for chunk in table.iter_chunks(ROWS_AT_ONCE, outlines=False):
            col, row = np.clip(chunk.cells.centroid_xy.T // step, 0, None).astype(int)
            np.add.at(counts, (np.minimum(row, counts.shape[0] - 1), np.minimum(col, counts.shape[1] - 1)), 1)
    row, col = np.unravel_index(np.argmax(cv2.blur(counts, (3, 3), borderType=cv2.BORDER_CONSTANT)), counts.shape)
    width, height = min(size_px, info.width_px), min(size_px, info.height_px)
    x0 = int(np.clip((col + 0.5) * step - width / 2, 0, info.width_px - width))
    y0 = int(np.clip((row + 0.5) * step - height / 2, 0, info.height_px - height))
    return x0, y0, x0 + width, y0 + height


def _background(slide: Slide, box: tuple[int, int, int, int], max_px: int) -> tuple[Plane, tuple[int, int], UInt8]:
    """Return the plane drawn in, the corner of the region in it, and the region's pixels."""
    long_edge = max(box[2] - box[0], box[3] - box[1])
    plane = Plane.of(slide.info, slide.info.mpp_x * max(1.0, long_edge / max_px))
    corners = plane.from_level0(np.array(box, np.float64).reshape(2, 2))
    x0, y0 = (int(v) for v in np.floor(corners[0]))
    x1, y1 = (int(v) for v in np.ceil(corners[1] - 1e-6))
    pixels = slide.read_plane(plane, (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
    return plane, (x0, y0), np.ascontiguousarray(pixels)


def _draw_chunk(picture: UInt8, chunk: CellChunk, colors: Colors, plane: Plane, corner: tuple[int, int]) -> None:
    """Draw those cells of a chunk whose centre lies in the picture or near it."""
    height, width = picture.shape[:2]
    centre = plane.from_level0(chunk.cells.centroid_xy) - corner
    near = np.flatnonzero(((centre > -64) & (centre < (width + 64, height + 64))).all(axis=1))
    cells = chunk.cells.take(near)
    class_index = chunk.class_index[near].astype(np.int64) % len(colors)
    rejected = ~np.asarray(chunk.columns.obs["is_nucleus"], np.bool_)[near]
    if cells.contour_xy is None or cells.contour_start is None:
        _draw_points(picture, centre[near], class_index, rejected, colors, plane.mpp)
        return
    vertices = _fixed_point(plane.from_level0(cells.contour_xy) - corner)
    rings = np.split(vertices, cells.contour_start[1:-1]) if len(cells) else []
    for k in np.unique(class_index):
        chosen = [rings[i] for i in np.flatnonzero(class_index == k)]
        cv2.polylines(picture, chosen, True, colors[int(k)], 2, cv2.LINE_AA, _SHIFT)
    for i in np.flatnonzero(rejected):
        _hatch(picture, rings[i], colors[int(class_index[i])])


def _hatch(picture: UInt8, ring: Int32, color: tuple[int, int, int]) -> None:
    """Fill an outline with slanting lines."""
    (x0, y0), (x1, y1) = ring.min(axis=0) >> _SHIFT, (ring.max(axis=0) >> _SHIFT) + 2
    x0, y0, x1, y1 = max(int(x0), 0), max(int(y0), 0), min(int(x1), picture.shape[1]), min(int(y1), picture.shape[0])
    if x1 <= x0 or y1 <= y0:
        return
    inside = np.zeros((y1 - y0, x1 - x0), np.uint8)
    cv2.fillPoly(inside, [ring - np.array([x0, y0], np.int32) * (1 << _SHIFT)], 1, cv2.LINE_8, _SHIFT)
    y, x = np.mgrid[y0:y1, x0:x1]
    picture[y0:y1, x0:x1][(inside > 0) & ((x + y) % HATCH_PX == 0)] = color


def _draw_points(
    picture: UInt8, xy: Float64, class_index: NDArray[Any], rejected: Bool, colors: Colors, mpp: float
) -> None:
    """Draw dots; what is no nucleus is white with a slanting line."""
    radius = float(np.clip(POINT_RADIUS_UM / mpp, *POINT_RADIUS_PX))
    inner, outer = (round(r * (1 << _SHIFT)) for r in (radius, radius + RIM_PX))
    for (x, y), k, odd in zip(_fixed_point(xy).tolist(), class_index.tolist(), rejected.tolist(), strict=True):
        cv2.circle(picture, (x, y), outer, WHITE, cv2.FILLED, cv2.LINE_AA, _SHIFT)
        if odd:
            ends = (x - inner, y + inner), (x + inner, y - inner)
            cv2.line(picture, *ends, colors[k], 1, cv2.LINE_AA, _SHIFT)
        else:
            cv2.circle(picture, (x, y), inner, colors[k], cv2.FILLED, cv2.LINE_AA, _SHIFT)


def _fixed_point(xy: Float64) -> Int32:
    return np.rint((xy - _HALF_PX) * (1 << _SHIFT)).astype(np.int32)
