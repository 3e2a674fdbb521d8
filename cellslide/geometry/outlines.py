"""Outlines as flat rings: trace them from a label map, measure, repair and fill them, with no Python loop over nuclei.

A set of N rings is a pair: `xy` (P, 2) vertices and `start` int64 (N + 1,) offsets. Ring i is
xy[start[i]:start[i + 1]], open (the first vertex is not repeated). Coordinates are continuous: pixel i covers
[i, i + 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.geometry import kernels
from cellslide.types import Bool, Float32, Float64, Int32, Int64

SHAPE_FEATURES = ("area_um2", "perimeter_um", "major_axis_um", "minor_axis_um", "eccentricity", "circularity")
GRID_PX = 0.01
MOST_CROSSINGS = 200_000

# Sides of a pixel in clockwise order (y points down): top, right, bottom, left, walked with the region on the right.
# For each: the pixel ahead, the pixel ahead on the left, (row, col); and the middle of the side as (x, y).
_AHEAD = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
_AHEAD_LEFT = np.array([(-1, 1), (1, 1), (1, -1), (-1, -1)])
_SIDE_MIDDLE = np.array([(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)])


def trace_outlines(labels: NDArray[Any], n: int) -> tuple[Float32, Int64]:
    """Return the outline of each label 1..n of a map (H, W) as rings in the map's pixels; an absent label has no
    vertex.

    The ring joins the middles of the pixel sides that bound the region (marching squares at 0.5), so its area is the
    mask's less half a pixel and it never touches itself, bridges one pixel wide and diagonal contacts included. Holes
    are filled; of several 4-connected pieces the largest is taken.
    """
    if kernels.available():
        from cellslide.geometry.label_kernels import trace

        xy, start = trace(np.require(labels, np.int32, ("C", "W")), n)
        return xy, start
    return _trace_plain(labels, n)


def _trace_plain(labels: NDArray[Any], n: int) -> tuple[Float32, Int64]:
    width = labels.shape[1] + 2
    padded = np.zeros((labels.shape[0] + 2, width), np.int32)
    padded[1:-1, 1:-1] = labels
    pixel, side, follow = _boundary_sides(padded)
    if len(pixel) == 0:
        return np.zeros((0, 2), np.float32), np.zeros(n + 1, np.int64)
    order, loop_start = _walk_loops(follow)
    pixel, side = pixel[order], side[order]
    row, col = np.divmod(pixel, width)
    xy = np.stack([col - 1, row - 1], axis=1) + _SIDE_MIDDLE[side]
    owner = padded.ravel()[pixel[loop_start[:-1]]]
    return _largest_loops(xy, loop_start, owner, n)


def _boundary_sides(padded: Int32) -> tuple[Int64, Int64, Int32]:
    """Return pixel, side and index of the following side for every pixel side between a label and anything else."""
    width = padded.shape[1]
    flat = padded.ravel()
    ahead, ahead_left = _AHEAD @ (width, 1), _AHEAD_LEFT @ (width, 1)
    inside = np.flatnonzero(flat != 0)
    label = flat.take(inside)
    # The outward neighbour of a side lies ahead of the side before it: the top's is what is ahead of the left side.
    bounds = [inside[flat.take(inside + ahead[side - 1]) != label] for side in range(4)]
    pixel = np.concatenate(bounds)
    side = np.repeat(np.arange(4), [len(part) for part in bounds])
    own = flat[pixel]
    is_ahead = flat[pixel + ahead[side]] == own
    is_left = is_ahead & (flat[pixel + ahead_left[side]] == own)
    # Turning right where the pixel ahead is foreign keeps diagonal contacts apart (4-connected regions).
    next_pixel = pixel + np.where(is_left, ahead_left[side], np.where(is_ahead, ahead[side], 0))
    next_side = (side + np.where(is_left, 3, np.where(is_ahead, 0, 1))) % 4
    place = np.empty(4 * flat.size, np.int32)  # only entries written here are read back
    place[pixel * 4 + side] = np.arange(len(pixel), dtype=np.int32)
    return pixel, side, place.take(next_pixel * 4 + next_side)


def _walk_loops(follow: Int32) -> tuple[Int64, Int64]:
    """Order the elements of a permutation loop by loop; returns (order, offsets of the loops). Pointer doubling, O(n
    log n)."""
    n = len(follow)
    own = np.arange(n, dtype=np.int32)
    head, jump = own, follow
    while True:  # after k rounds `head` is the least index among the next 2^k elements
        lower = np.minimum(head, head.take(jump))
        if np.array_equal(lower, head):
            break
        head, jump = lower, jump.take(jump)
    last = follow == head
    jump = np.where(last, own, follow)
    left = (~last).astype(np.int32)  # steps to the end of the loop
    while True:
        further = left.take(jump)
        if not further.any():
            break
        left, jump = left + further, jump.take(jump)
    is_head = head == own
    start = _offsets(left[is_head] + 1)
    loop_end = start[np.cumsum(is_head)]
    order = np.empty(n, np.int64)
    order[loop_end[head] - 1 - left] = own
    return order, start


def _largest_loops(xy: Float64, start: Int64, owner: Int32, n: int) -> tuple[Float32, Int64]:
    """Pick for each owner 1..n its loop of largest area (holes run the other way round) and drop vertices on straight
    lines."""
    area = _signed_areas(xy, start)
    rank = np.lexsort((-area, owner))
    first = np.ones(len(rank), np.bool_)
    first[1:] = owner[rank][1:] != owner[rank][:-1]
    chosen = rank[first]
    loop_of = np.full(n + 1, -1, np.int64)
    loop_of[owner[chosen]] = chosen
    loop_of = loop_of[1:]
    lengths = np.where(loop_of >= 0, (start[1:] - start[:-1])[loop_of], 0)
    ring_start = _offsets(lengths)
    gather = np.repeat(start[:-1][loop_of] - ring_start[:-1], lengths) + np.arange(ring_start[-1])
    return _drop_straight(xy[gather], ring_start)


def _drop_straight(xy: Float64, start: Int64) -> tuple[Float32, Int64]:
    after, before = neighbours(start)
    incoming, outgoing = xy - xy[before], xy[after] - xy
    corner = incoming[:, 0] * outgoing[:, 1] != incoming[:, 1] * outgoing[:, 0]
    counted = np.concatenate([[0], np.cumsum(corner)])
    return xy[corner].astype(np.float32), counted[start].astype(np.int64)


def _offsets(lengths: NDArray[Any]) -> Int64:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def neighbours(start: Int64) -> tuple[Int64, Int64]:
    """Return for each vertex the index of the next and of the previous vertex of its ring."""
    index = np.arange(start[-1])
    after, before = index + 1, index - 1
    filled = start[1:] > start[:-1]
    first, last = start[:-1][filled], start[1:][filled] - 1
    after[last], before[first] = first, last
    return after, before


def ring_of_vertex(start: Int64) -> Int64:
    """Return for each vertex the number of its ring."""
    return np.repeat(np.arange(len(start) - 1), start[1:] - start[:-1])


def _sum_rings(values: Float64, start: Int64) -> Float64:
    if len(start) == 1:
        return np.zeros(0)
    filled = start[1:] > start[:-1]
    total = np.zeros(len(start) - 1)
    if filled.any():
        total[filled] = np.add.reduceat(values, start[:-1][filled])
    return total


def _local(xy: NDArray[Any], start: Int64) -> Float64:
    """Return vertices relative to their ring's first, so that products of slide coordinates keep their digits."""
    first = np.repeat(start[:-1], start[1:] - start[:-1])
    points = np.asarray(xy, np.float64)
    return points - points[first]


def _signed_areas(xy: NDArray[Any], start: Int64) -> Float64:
    points = _local(xy, start)
    x, y = points[:, 0], points[:, 1]
    after, _ = neighbours(start)
    return _sum_rings(x * y[after] - x[after] * y, start) / 2


def ring_areas(xy: NDArray[Any], start: Int64) -> Float64:
    """Return the area of each ring (N,) in squared units of `xy`."""
    return np.abs(_signed_areas(xy, start))


def ring_bounds(xy: NDArray[Any], start: Int64) -> Float64:
    """Return the box xyxy (N, 4) of each ring; NaN for a ring without vertices."""
    if kernels.available():
        from cellslide.geometry.ring_kernels import ring_bounds as compiled

        return np.asarray(compiled(xy, start))
    bounds = np.full((len(start) - 1, 4), np.nan)
    filled = start[1:] > start[:-1]
    if filled.any():
        for axis in (0, 1):  # reduceat is several times faster on one column than on rows
            column = np.ascontiguousarray(xy[:, axis])
            bounds[filled, axis] = np.minimum.reduceat(column, start[:-1][filled])
            bounds[filled, axis + 2] = np.maximum.reduceat(column, start[:-1][filled])
    return bounds


def ring_features(contour_xy: NDArray[Any], start: Int64, mpp_x: float, mpp_y: float) -> Float32:
    """Measure rings given in level-0 pixels of `mpp_x`, `mpp_y` µm; returns (N, len(SHAPE_FEATURES)).

    Axes are those of the ellipse with the same second moments (Green's theorem); circularity is 4 pi area /
    perimeter^2. A ring without area gives zeros.
    """
    cross, perimeter, x, y, xx, yy, mixed = _ring_moments(contour_xy, start, mpp_x, mpp_y).T
    signed = cross / 2
    divisor = np.where(signed == 0, 1.0, signed)
    mean_x, mean_y = x / (6 * divisor), y / (6 * divisor)
    xx, yy = xx / (12 * divisor), yy / (12 * divisor)
    xy_moment = mixed / (24 * divisor) - mean_x * mean_y
    major, minor = _ellipse_axes(xx - mean_x**2, yy - mean_y**2, xy_moment)
    area = np.abs(signed)
    ratio = np.divide(minor, major, out=np.zeros_like(minor), where=major > 0)
    eccentricity = np.where(major > 0, np.sqrt(np.maximum(1 - ratio**2, 0)), 0.0)
    circularity = np.divide(4 * np.pi * area, perimeter**2, out=np.zeros_like(area), where=perimeter > 0)
    table = np.stack([area, perimeter, major, minor, eccentricity, circularity], axis=1)
    return np.where(area[:, None] > 0, table, 0.0).astype(np.float32)


def _ring_moments(contour_xy: NDArray[Any], start: Int64, mpp_x: float, mpp_y: float) -> Float64:
    """Return (N, 7) of each ring, in µm: twice the signed area, the perimeter, and the sums of Green's theorem about
    the first vertex for x, y, xx, yy and xy."""
    if kernels.available():
        from cellslide.geometry.ring_kernels import ring_moments

        return np.asarray(ring_moments(contour_xy, start, mpp_x, mpp_y))
    points = _local(contour_xy, start) * (mpp_x, mpp_y)
    after, _ = neighbours(start)
    x, y = points[:, 0], points[:, 1]
    to_x, to_y = x[after], y[after]
    cross = x * to_y - to_x * y
    terms = [cross, np.hypot(to_x - x, to_y - y), cross * (x + to_x), cross * (y + to_y)]
    terms += [cross * (v * v + v * to + to * to) for v, to in ((x, to_x), (y, to_y))]
    terms += [cross * (x * to_y + 2 * x * y + 2 * to_x * to_y + to_x * y)]
    return np.stack([_sum_rings(term, start) for term in terms], axis=1)


def _ellipse_axes(xx: Float64, yy: Float64, xy: Float64) -> tuple[Float64, Float64]:
    centre, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    return 4 * np.sqrt(np.maximum(centre + spread, 0)), 4 * np.sqrt(np.maximum(centre - spread, 0))


def to_polygons(xy: NDArray[Any], start: Int64) -> NDArray[Any]:
    """Return shapely polygons (N,), empty ones for rings with fewer than three vertices."""
    import shapely

    polygons = np.full(len(start) - 1, shapely.Polygon(), dtype=object)
    usable = start[1:] - start[:-1] >= 3
    keep = np.repeat(usable, start[1:] - start[:-1])
    if usable.any():
        ring = np.repeat(np.arange(int(usable.sum())), (start[1:] - start[:-1])[usable])
        polygons[usable] = shapely.polygons(shapely.linearrings(np.asarray(xy, np.float64)[keep], indices=ring))
    return polygons


def sure_rings(cents: Int64, start: Int64, least_px2: float) -> Bool:
    """Tell (N,) which rings, in hundredths of a pixel, need no look from `valid_rings`; without numba none."""
    if not kernels.available():
        return np.zeros(len(start) - 1, np.bool_)
    from cellslide.geometry.ring_kernels import plain_rings

    return np.asarray(plain_rings(cents, start, least_px2 / GRID_PX**2, MOST_CROSSINGS * np.pi))


def valid_rings(xy: NDArray[Any], start: Int64, grid_px: float = GRID_PX) -> tuple[Float64, Int64, Bool]:
    """Put rings on a grid of `grid_px` and make them valid simple polygons, as strict readers of GeoJSON (QuPath)
    demand.

    Only rings that are not valid on the grid are rebuilt: the largest part of the repaired polygon, without its holes.
    Returns the rings and (N,) whether each survived; a ring that vanished on the grid has no vertex.
    """
    import shapely

    snapped = np.round(np.asarray(xy, np.float64) / grid_px) * grid_px
    # n * 0.01 is not the nearest double of the decimal; rounding to the digits makes equal places equal numbers.
    snapped = np.round(snapped, max(0, round(-np.log10(grid_px))))
    polygons = to_polygons(snapped, start)
    polygons[is_tangled(polygons)] = shapely.Polygon()
    good = shapely.is_valid(polygons) & ~shapely.is_empty(polygons) & (shapely.area(polygons) > 0)
    if good.all():
        return snapped, start, good
    broken = np.flatnonzero(~good)
    repaired = [_repair(polygons[i], grid_px) for i in broken]
    rings = np.split(snapped, start[1:-1])
    for i, ring in zip(broken, repaired, strict=True):
        rings[i] = ring
    lengths = np.array([len(ring) for ring in rings])
    return np.concatenate(rings), _offsets(lengths), lengths > 0


def _repair(polygon: Any, grid_px: float) -> Float64:
    """Return the open outer ring of the largest part of a broken polygon, (0, 2) where nothing is left on the grid."""
    import shapely

    snapped = polygon
    for _ in range(2):  # taking one part or dropping holes can leave something for the second round to mend
        mended = shapely.make_valid(snapped, method="structure", keep_collapsed=False)
        snapped = _largest_part(shapely.set_precision(_largest_part(mended), grid_px))
    if snapped.is_empty or not snapped.is_valid:
        return np.zeros((0, 2))
    return np.asarray(shapely.get_coordinates(snapped.exterior)[:-1], np.float64)


def is_tangled(geometries: Any) -> Bool:
    """Tell (N,) whether lines as long as those of geometries cross too often, thrown at random, to be mended.

    The line around a nucleus is far from it, whatever its length; a scribble of as many vertices fills the memory, and
    takes minutes only to be found invalid.
    """
    import shapely

    x0, y0, x1, y1 = np.atleast_2d(shapely.bounds(geometries)).T
    area = (x1 - x0) * (y1 - y0)
    return np.asarray(np.atleast_1d(shapely.length(geometries)) ** 2 > MOST_CROSSINGS * np.pi * area)


def _largest_part(geometry: Any) -> Any:
    import shapely

    parts = [p for p in shapely.get_parts(geometry) if p.geom_type == "Polygon" and not p.is_empty]
    return shapely.Polygon(max(parts, key=lambda p: p.area).exterior) if parts else shapely.Polygon()


def rasterise(contour_xy: NDArray[Any], start: Int64, shape: tuple[int, int]) -> Int32:
    """Fill rings into a label map: pixel (row, col) gets i + 1 when its centre lies in ring i (even-odd); later rings
    win.

    Parts outside `shape` are cut off. Filling the outline of a mask without holes gives the mask back.
    """
    points = np.asarray(contour_xy, np.float64)
    after, _ = neighbours(start)
    ring, row, x = _row_crossings(points, points[after], ring_of_vertex(start), shape[0])
    order = np.lexsort((x, row, ring))
    ring, row, x = ring[order], row[order], x[order]
    column = np.clip(np.ceil(x - 0.5), 0, shape[1]).astype(np.int64)
    begin, end = column[0::2], column[1::2]
    length = end - begin
    base = np.repeat(row[0::2] * shape[1] + begin - _offsets(length)[:-1], length)
    labels = np.zeros(shape, np.int32)
    labels.ravel()[base + np.arange(len(base))] = np.repeat(ring[0::2] + 1, length)
    return labels


def _row_crossings(tail: Float64, tip: Float64, ring: Int64, height: int) -> tuple[Int64, Int64, Float64]:
    """Return (ring, row, x) wherever an edge crosses the line through the pixel centres of a row of the image."""
    low, high = np.minimum(tail[:, 1], tip[:, 1]), np.maximum(tail[:, 1], tip[:, 1])
    first = np.clip(np.ceil(low - 0.5), 0, height).astype(np.int64)
    count = np.clip(np.ceil(high - 0.5), 0, height).astype(np.int64) - first
    edge = np.repeat(np.arange(len(count)), count)
    row = np.repeat(first - _offsets(count)[:-1], count) + np.arange(len(edge))
    rise = (tip[:, 1] - tail[:, 1])[edge]
    x = tail[edge, 0] + (row + 0.5 - tail[edge, 1]) * (tip[:, 0] - tail[:, 0])[edge] / rise
    return ring[edge], row, x
