"""What a report takes from the slide itself: the picture, and crops of chosen nuclei."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Crop:
    """A nucleus to show: uint8 (CROP_PX, CROP_PX, 3), and its outline (P, 2) in the crop's pixels or None."""

    pick: GalleryCell
    image: UInt8
    outline_xy: Float64 | None


def read_picture(slide: Slide, frame: Frame) -> UInt8:
    """Return the frame as uint8 (h, w, 3), its longer edge at most PICTURE_PX; raises TileError on a damaged file."""
    x0, y0, x1, y1 = frame.box
    factor = max(1.0, max(x1 - x0, y1 - y0) / PICTURE_PX)
    info = slide.info
    plane = Plane(info.mpp_x * factor, factor, factor, int(info.width_px / factor), int(info.height_px / factor))
    left, top = int(x0 / factor), int(y0 / factor)
    width, height = (max(1, round((b - a) / factor)) for a, b in ((x0, x1), (y0, y1)))
    return slide.read_plane(plane, (left, top, left + width, top + height))


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
