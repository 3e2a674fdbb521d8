"""What a report takes from the slide itself: the picture, crops of chosen nuclei, and how sharp the tissue is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

from cellslide.errors import TileError
from cellslide.report.gallery import GalleryCell
from cellslide.report.statistics import Frame
from cellslide.slides.slide import Slide
from cellslide.store.cell_table import CellTable
from cellslide.store.shapes import polygons_from_wkb
from cellslide.types import Float64, Int64, Plane, UInt8

PICTURE_PX = 1100
CROP_PX, CROP_UM = 72, 36.0
# Blur is judged on fields of this size at this pixel size, wherever the slide was scanned finer.
FIELD_PX, FIELD_MPP, MOST_FIELDS = 256, 0.5, 48
# Crete's measure, 0 sharp to 1. Sharp fields of five scanners lie below 0.4, the same blurred by 1.5 µm above 0.53.
BLURRED = 0.5


@dataclass(frozen=True, slots=True)
class Crop:
    """A nucleus to show: uint8 (CROP_PX, CROP_PX, 3), and its outline (P, 2) in the crop's pixels or None."""

    pick: GalleryCell
    image: UInt8
    outline_xy: Float64 | None


@dataclass(frozen=True, slots=True)
class Sharpness:
    """Fields of tissue that were looked at: level-0 centres (N, 2), blur (N,) 0 to 1; `unread` could not be read."""

    xy: Float64
    blur: Float64
    unread: int

    @property
    def blurred(self) -> Float64:
        """Centres (M, 2) of the fields that are out of focus."""
        return self.xy[self.blur > BLURRED]


def read_picture(slide: Slide, frame: Frame) -> UInt8:
    """Return the frame as uint8 (h, w, 3), its longer edge at most PICTURE_PX; raises TileError on a damaged file."""
    x0, y0, x1, y1 = frame.box
    factor = max(1.0, max(x1 - x0, y1 - y0) / PICTURE_PX)
    info = slide.info
    plane = Plane(info.mpp_x * factor, factor, factor, int(info.width_px / factor), int(info.height_px / factor))
    left, top = int(x0 / factor), int(y0 / factor)
    width, height = (max(1, round((b - a) / factor)) for a, b in ((x0, x1), (y0, y1)))
    return slide.read_plane(plane, (left, top, left + width, top + height))


def measure_sharpness(slide: Slide, xy: Float64) -> Sharpness:
    """Measure blur on fields about cells, evenly spread over those given (N, 2) in the table's order."""
    from skimage.measure import blur_effect

    plane = Plane.of(slide.info, max(FIELD_MPP, slide.info.mpp_x))
    centres, blur, unread = [], [], 0
    for row in _apart(plane.from_level0(xy)).tolist():
        x, y = (int(v) - FIELD_PX // 2 for v in plane.from_level0(xy[row : row + 1])[0])
        try:
            grey = cv2.cvtColor(slide.read_plane(plane, _inside(x, y, plane)), cv2.COLOR_RGB2GRAY)
        except TileError:
            unread += 1
            continue
        # Of an even field nothing can be said, nor of a sliver.
        if min(grey.shape) >= FIELD_PX // 2 and grey.std() > 1:
            centres.append(xy[row])
            blur.append(float(blur_effect(grey)))
    return Sharpness(np.array(centres, np.float64).reshape(-1, 2), np.array(blur, np.float64), unread)


def _apart(xy: Float64) -> Int64:
    """Return the rows of at most MOST_FIELDS points (N, 2) of the plane, evenly spread, one for each half field."""
    _, first = np.unique(np.floor(xy * 2 / FIELD_PX), axis=0, return_index=True)
    rows = np.sort(first)
    return rows[np.unique(np.linspace(0, max(len(rows) - 1, 0), min(MOST_FIELDS, len(rows))).astype(np.int64))]


def _inside(x: int, y: int, plane: Plane) -> tuple[int, int, int, int]:
    """Return a field moved onto the slide, so that no edge of it is taken for detail."""
    x = max(0, min(x, plane.width_px - FIELD_PX))
    y = max(0, min(y, plane.height_px - FIELD_PX))
    return x, y, min(x + FIELD_PX, plane.width_px), min(y + FIELD_PX, plane.height_px)


def cut_crops(slide: Slide, table: CellTable, picks: Iterable[GalleryCell]) -> dict[int, Crop]:
    """Return a crop of CROP_UM about each cell, by its row; cells that cannot be read are left out."""
    plane = Plane.of(slide.info, CROP_UM / CROP_PX)
    unique = {pick.row: pick for pick in picks}
    outlines = read_outlines(table, np.array(sorted(unique), np.int64))
    crops: dict[int, Crop] = {}
    for row in sorted(unique):
        centre = plane.from_level0(np.array([unique[row].xy]))[0]
        x, y = (int(v) for v in np.rint(centre - CROP_PX / 2))
        try:
            image = slide.read_plane(plane, (x, y, x + CROP_PX, y + CROP_PX))
        except TileError:
            continue
        ring = outlines.get(row)
        outline = None if ring is None else plane.from_level0(ring) - (x, y)
        crops[row] = Crop(unique[row], image, outline)
    return crops


def read_outlines(table: CellTable, rows: Int64) -> dict[int, Float64]:
    """Return the outlines (P, 2) of sorted rows in level-0 pixels; each group of the file is read once."""
    found: dict[int, Float64] = {}
    if table.kind == "point" or table.shapes is None or not len(rows):
        return found
    first = table.shapes.first
    group = np.searchsorted(first, rows, side="right") - 1
    for k in np.unique(group).tolist():
        wanted = rows[group == k]
        column = table.shapes.columns(int(first[k]), int(first[k + 1])).column("geometry")
        xy, start = polygons_from_wkb(column.take(wanted - first[k]).combine_chunks())
        found |= {row: xy[start[i] : start[i + 1]] for i, row in enumerate(wanted.tolist())}
    return found
