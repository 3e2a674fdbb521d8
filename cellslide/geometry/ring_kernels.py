"""Compiled loops over flat rings and boxes: for what numpy would read several times. Importing it needs numba.

Rings are pairs as in `outlines`: vertices (P, 2) and offsets (N + 1,). Whoever calls these has a form without them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cellslide.types import Float64, Int64, UInt8


@njit(cache=True, nogil=True)
def ring_bounds(xy: NDArray[Any], start: Int64) -> Float64:
    """Return the box xyxy (N, 4) of each ring; NaN for a ring without vertices."""
    n = len(start) - 1
    box = np.full((n, 4), np.nan)
    for i in range(n):
        if start[i + 1] == start[i]:
            continue
        x0, y0, x1, y1 = np.inf, np.inf, -np.inf, -np.inf
        for k in range(start[i], start[i + 1]):
            x, y = xy[k, 0], xy[k, 1]
            x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x), max(y1, y)
        box[i, 0], box[i, 1], box[i, 2], box[i, 3] = x0, y0, x1, y1
    return box


@njit(cache=True, nogil=True)
def ring_moments(xy: NDArray[Any], start: Int64, mpp_x: float, mpp_y: float) -> Float64:
    """Return (N, 7) of each ring, in µm: twice the signed area, the perimeter, and the sums of Green's theorem about
    its first vertex for x, y, xx, yy and xy."""
    n = len(start) - 1
    sums = np.zeros((n, 7))
    for i in range(n):
        begin, end = start[i], start[i + 1]
        if begin == end:
            continue
        x0, y0 = float(xy[begin, 0]), float(xy[begin, 1])
        s = sums[i]
        for k in range(begin, end):
            after = k + 1 if k + 1 < end else begin
            ax, ay = (xy[k, 0] - x0) * mpp_x, (xy[k, 1] - y0) * mpp_y
            bx, by = (xy[after, 0] - x0) * mpp_x, (xy[after, 1] - y0) * mpp_y
            cross = ax * by - bx * ay
            s[0] += cross
            s[1] += np.sqrt((bx - ax) * (bx - ax) + (by - ay) * (by - ay))
            s[2] += cross * (ax + bx)
            s[3] += cross * (ay + by)
            s[4] += cross * (ax * ax + ax * bx + bx * bx)
            s[5] += cross * (ay * ay + ay * by + by * by)
            s[6] += cross * (ax * by + 2 * ax * ay + 2 * bx * by + bx * ay)
    return sums


@njit(cache=True, nogil=True)
def copy_rings(xy: NDArray[Any], start: Int64, place: Int64, out: NDArray[Any]) -> None:
    """Copy ring i to `out` from vertex place[i] on; a negative place leaves it out."""
    for i in range(len(place)):
        to = place[i]
        if to < 0:
            continue
        for k in range(start[i], start[i + 1]):
            out[to, 0], out[to, 1] = xy[k, 0], xy[k, 1]
            to += 1


@njit(cache=True, nogil=True)
def meeting_boxes(box: Float64, group: NDArray[Any]) -> Int64:
    """Return pairs (M, 2), the lower first, of boxes xyxy (N, 4) of different groups that meet; edges count."""
    order = np.argsort(box[:, 0])
    pairs = np.empty((max(16, len(box)), 2), np.int64)
    found = 0
    for a in range(len(order)):
        i = order[a]
        for b in range(a + 1, len(order)):
            j = order[b]
            if box[j, 0] > box[i, 2]:
                break
            if group[i] == group[j] or box[j, 1] > box[i, 3] or box[i, 1] > box[j, 3]:
                continue
            if found == len(pairs):
                wider = np.empty((2 * found, 2), np.int64)
                wider[:found] = pairs
                pairs = wider
            pairs[found, 0], pairs[found, 1] = min(i, j), max(i, j)
            found += 1
    return pairs[:found].copy()


@njit(cache=True, nogil=True)
def seam_rows(box: Float64, tile: NDArray[Any], x_cuts: Float64, y_cuts: Float64) -> Int64:
    """Return the rows of boxes xyxy (N, 4) that lie no deeper in the own box of their tile than any reaches out of it.

    Own boxes are the cells between the cuts, row by row.
    """
    n, n_cols = len(box), len(x_cuts) - 1
    reach = np.empty(n)
    for i in range(n):
        row, col = tile[i] // n_cols, tile[i] % n_cols
        across = max(x_cuts[col] - box[i, 0], box[i, 2] - x_cuts[col + 1])
        reach[i] = max(across, y_cuts[row] - box[i, 1], box[i, 3] - y_cuts[row + 1])
    deepest = -max(0.0, reach.max())
    return np.flatnonzero(reach >= deepest)


@njit(cache=True, nogil=True)
def write_wkb(points: UInt8, start: Int64, header: UInt8, offsets: Int64) -> UInt8:
    """Return WKB polygons of open rings, ring i from byte offsets[i] on: `header`, number of points, points, the first
    again.

    points   the bytes of the vertices, 16 each, of which `start` (N + 1,) counts vertices.
    """
    data = np.empty(offsets[-1], np.uint8)
    for i in range(len(start) - 1):
        at, first, last = offsets[i], 16 * start[i], 16 * start[i + 1]
        data[at : at + len(header)] = header
        at += len(header)
        count = start[i + 1] - start[i] + 1
        for k in range(4):
            data[at + k] = (count >> (8 * k)) & 255
        at += 4
        data[at : at + last - first] = points[first:last]
        at += last - first
        data[at : at + 16] = points[first : first + 16]
    return data


@njit(cache=True, nogil=True)
def read_wkb(data: UInt8, offsets: NDArray[np.int32], header: UInt8, start: Int64) -> UInt8:
    """Return the bytes of the open rings of WKB polygons, empty where one is not `header`, number of points, points.

    start (N + 1,) says how many vertices each ring has by its length in bytes.
    """
    points = np.empty(16 * start[-1], np.uint8)
    for i in range(len(start) - 1):
        at, first, last = offsets[i], 16 * start[i], 16 * start[i + 1]
        for k in range(len(header)):
            if data[at + k] != header[k]:
                return points[:0]
        at += len(header)
        count = start[i + 1] - start[i] + 1
        for k in range(4):
            if data[at + k] != (count >> (8 * k)) & 255:
                return points[:0]
        at += 4
        points[first:last] = data[at : at + last - first]
    return points


@njit(cache=True, nogil=True)
def plain_rings(points: Int64, start: Int64, least_area: float, most_turns: float) -> NDArray[np.bool_]:
    """Return (N,) whether a ring on a grid is beyond doubt a valid polygon: seen whole from the middle of its vertices.

    A ring whose area is below `least_area` is in doubt, and so is one whose squared length is more than `most_turns`
    times that of its box.
    """
    n = len(start) - 1
    sure = np.zeros(n, np.bool_)
    for i in range(n):
        begin, end = start[i], start[i + 1]
        if end - begin < 3:
            continue
        x0, y0, x1, y1 = points[begin, 0], points[begin, 1], points[begin, 0], points[begin, 1]
        sum_x, sum_y = 0, 0
        for k in range(begin, end):
            x, y = points[k, 0], points[k, 1]
            x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x), max(y1, y)
            sum_x += x
            sum_y += y
        mid_x, mid_y = sum_x // (end - begin), sum_y // (end - begin)
        sure[i] = _winds_once(points[begin:end], mid_x, mid_y, least_area, most_turns * (x1 - x0) * (y1 - y0))
    return sure


@njit(cache=True, nogil=True)
def _winds_once(ring: Int64, mid_x: int, mid_y: int, least_area: float, most_length2: float) -> bool:
    """Tell whether a ring goes round a point once, always turning the same way, so that it cannot meet itself."""
    area, length, rounds, sign = 0, 0.0, 0, 0
    ax, ay = ring[-1, 0] - mid_x, ring[-1, 1] - mid_y
    for k in range(len(ring)):
        bx, by = ring[k, 0] - mid_x, ring[k, 1] - mid_y
        cross = ax * by - bx * ay
        turn = 1 if cross > 0 else -1
        if cross == 0 or (k and turn != sign):
            return False
        sign = turn
        rounds += (ay < 0) != (by < 0)
        area += abs(cross)
        length += np.sqrt(float((bx - ax) * (bx - ax) + (by - ay) * (by - ay)))
        ax, ay = bx, by
    return rounds == 2 and area >= 2 * least_area and length * length <= most_length2
