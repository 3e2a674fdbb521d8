"""Blocks of a file become nuclei of a slide: placed, checked, counted, put in order with each outline moved once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.formats.importers.records import MARK, NUCLEUS, REGION, Block, NucleiReport
from cellslide.geometry.outlines import is_tangled, ring_areas, to_polygons, valid_rings
from cellslide.store.uuids import pack_places
from cellslide.types import Bool, Float64, Int64, SlideInfo, take_rings

# Larger than any nucleus: an annotation of this size is a region.
REGION_UM2 = 10_000.0
# Where points stand among outlines, they get one of this radius.
POINT_RADIUS_UM = 3.0


@dataclass(slots=True)
class Placed:
    """Nuclei of one block in level-0 pixels; columns as in `Block`, outlines open and valid."""

    source_id: NDArray[Any]
    uuid: NDArray[Any]
    centroid: Float64
    kind: NDArray[np.int8]
    class_code: NDArray[np.int16]
    score: NDArray[np.float32]
    area_um2: NDArray[np.float32]
    contour_xy: Float64
    contour_start: Int64

    def __len__(self) -> int:
        return len(self.source_id)

    def take(self, rows: NDArray[Any]) -> Placed:
        """Return the rows of a boolean mask or of indices."""
        rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        xy, start = take_rings(self.contour_xy, self.contour_start, rows)
        columns = {f.name: getattr(self, f.name)[rows] for f in fields(self)[:-2]}
        return Placed(**columns, contour_xy=xy, contour_start=start)


def place(block: Block, info: SlideInfo, report: NucleiReport) -> Placed:
    """Return what of a block lies on the slide with a usable shape, in level-0 pixels; counts the rest in `report`."""
    report.read += len(block.source_id)
    moved = _open(to_slide(block.contour_xy, block.to_level0), block.contour_start)
    placed = Placed(
        block.source_id, block.uuid, to_slide(block.centroid, block.to_level0), block.kind, block.class_code,
        block.score, block.area_um2, *moved,
    )  # fmt: skip
    placed = _finite(placed, report)
    placed = _shaped(placed, info, report)
    inside: Bool = (placed.centroid >= 0) & (placed.centroid < (info.width_px, info.height_px))
    on_slide = inside[:, 0] & inside[:, 1]
    report.outside += int((~on_slide).sum())
    return placed if on_slide.all() else placed.take(on_slide)


def to_slide(xy: Float64, matrix: Float64) -> Float64:
    """Apply a 3x3 affine matrix to points (N, 2)."""
    moved: Float64 = xy * matrix.diagonal()[:2] + matrix[:2, 2]
    if matrix[0, 1] or matrix[1, 0]:
        moved = moved + xy[:, ::-1] * (matrix[0, 1], matrix[1, 0])
    return moved


def _open(xy: Float64, start: Int64) -> tuple[Float64, Int64]:
    """Drop the last vertex of rings that repeat their first."""
    length = np.diff(start)
    rows = np.flatnonzero(length > 1)
    last = start[1:][rows] - 1
    closed = (xy[last] == xy[start[:-1][rows]]).all(axis=1)
    keep = np.ones(len(xy), np.bool_)
    keep[last[closed]] = False
    length[rows[closed]] -= 1
    return xy[keep], np.concatenate([[0], np.cumsum(length)]).astype(np.int64)


def _finite(placed: Placed, report: NucleiReport) -> Placed:
    """Drop nuclei with a vertex, or without outline a centroid, that is no number."""
    length = np.diff(placed.contour_start)
    bad_vertex = np.zeros(len(placed), np.bool_)
    if len(placed.contour_xy):
        owner = np.repeat(np.arange(len(placed)), length)
        bad_vertex[owner[~np.isfinite(placed.contour_xy).all(axis=1)]] = True
    nowhere = ~np.isfinite(placed.centroid).all(axis=1)
    bad = bad_vertex | ((length == 0) & nowhere)
    report.not_finite += int(bad.sum())
    return placed.take(~bad) if bad.any() else placed


def _shaped(placed: Placed, info: SlideInfo, report: NucleiReport) -> Placed:
    """Mend outlines that cross themselves, drop those without area, and fill centroid and area from the outlines."""
    import shapely

    outlined = np.diff(placed.contour_start) > 0
    polygons = to_polygons(placed.contour_xy, placed.contour_start)
    polygons[is_tangled(polygons)] = shapely.Polygon()  # before it takes minutes to find it invalid
    bad = outlined & ~(shapely.is_valid(polygons) & (shapely.area(polygons) > 0))
    if bad.any():
        placed, dead = _mend(placed, bad)
        report.invalid += int(dead.sum())
        report.repaired += int(bad.sum() - dead.sum())
        placed, outlined = placed.take(~dead), outlined[~dead]
        polygons = to_polygons(placed.contour_xy, placed.contour_start)
    unset = outlined & ~np.isfinite(placed.centroid).all(axis=1)
    centroid = placed.centroid.copy()
    centroid[unset] = shapely.get_coordinates(shapely.centroid(polygons[unset]))
    area = ring_areas(placed.contour_xy, placed.contour_start) * info.mpp_x * info.mpp_y
    area = np.where(outlined, area, np.nan_to_num(placed.area_um2.astype(np.float64)))
    return replace(placed, centroid=centroid, area_um2=area.astype(np.float32))


def _mend(placed: Placed, bad: Bool) -> tuple[Placed, Bool]:
    """Return `placed` with the outlines `bad` made valid, and which of all had none left."""
    rows = np.flatnonzero(bad)
    mended_xy, mended_start, alive = valid_rings(*take_rings(placed.contour_xy, placed.contour_start, rows))
    dead = np.zeros(len(placed), np.bool_)
    dead[rows[~alive]] = True
    n = len(placed)
    joined_xy = np.concatenate([placed.contour_xy, mended_xy])
    joined_start = np.concatenate([placed.contour_start, mended_start[1:] + placed.contour_start[-1]])
    source = np.arange(n)
    source[rows] = n + np.arange(len(rows))
    xy, start = take_rings(joined_xy, joined_start, source)
    return replace(placed, contour_xy=xy, contour_start=start), dead


def chosen(kind: NDArray[np.int8], area_um2: NDArray[np.float32]) -> Bool:
    """Return which objects are nuclei: those of the highest kind that occurs, annotations only of a nucleus' size."""
    best = max(int(kind.max(initial=REGION)), MARK)
    keep: Bool = kind == best
    return keep & (area_um2 <= REGION_UM2) if best < NUCLEUS else keep


def first_of_place(xy: Float64) -> Bool:
    """Return which points (N, 2), to 0.01 px, are the first at their place."""
    _, first = np.unique(pack_places(xy[:, 0], xy[:, 1]), return_index=True)
    keep = np.zeros(len(xy), np.bool_)
    keep[first] = True
    return keep


def gather_rings(parts: list[Placed], rank: Int64, centroid: Float64, radius_px: Float64) -> tuple[Float64, Int64]:
    """Return all outlines in the order of `rank` (over the rows of all parts, -1 is left out); empties `parts`.

    Each outline is moved once and each part given free behind, so that memory is that of the outlines and one part.
    A point, at `centroid` (of the kept, in final order), gets an octagon of `radius_px` (x, y).
    """
    lengths = np.concatenate([np.diff(part.contour_start) for part in parts])
    n = int((rank >= 0).sum())
    final = np.empty(n, np.int64)
    final[rank[rank >= 0]] = lengths[rank >= 0]
    is_point = final == 0
    final[is_point] = len(_OCTAGON)
    start = np.concatenate([[0], np.cumsum(final)]).astype(np.int64)
    out = np.empty((int(start[-1]), 2))
    row = 0
    for k, part in enumerate(parts):
        ranks = rank[row : row + len(part)]
        row += len(part)
        kept = np.flatnonzero((ranks >= 0) & (np.diff(part.contour_start) > 0))
        xy, ring_start = take_rings(part.contour_xy, part.contour_start, kept)
        target = np.repeat(start[ranks[kept]] - ring_start[:-1], np.diff(ring_start)) + np.arange(len(xy))
        out[target] = xy
        parts[k] = part.take(np.empty(0, np.int64))
    for i in np.flatnonzero(is_point):
        out[start[i] : start[i + 1]] = centroid[i] + _OCTAGON * radius_px
    return out, start


_ANGLES = np.arange(8) * np.pi / 4
_OCTAGON: Float64 = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
