"""Compiled loops over a label map: what lies under each label, and the outlines. Importing it needs numba."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cellslide.types import Float32, Float64, Int32, Int64

Half = NDArray[np.uint16]


@njit(cache=True, nogil=True)
def _label_runs(labels: Int32) -> tuple[Int32, Int32, int]:
    """Return the horizontal runs of labels: (R, 4) row, first column, column behind the last, label; and the new number
    of each label, 1..n in the order of the labels (0 for those that do not occur), and n."""
    height, width = labels.shape
    runs = np.empty((height * width, 4), np.int32)  # only what is written takes memory
    n = 0
    for y in range(height):
        line = labels[y]
        label, begin = line[0], 0
        for x in range(1, width):
            if line[x] == label:
                continue
            if label:
                runs[n, 0], runs[n, 1], runs[n, 2], runs[n, 3] = y, begin, x, label
                n += 1
            label, begin = line[x], x
        if label:
            runs[n, 0], runs[n, 1], runs[n, 2], runs[n, 3] = y, begin, width, label
            n += 1
    most = 0
    for i in range(n):
        most = max(most, runs[i, 3])
    number = np.zeros(most + 1, np.int32)
    for i in range(n):
        number[runs[i, 3]] = 1
    present = 0
    for i in range(len(number)):
        present += number[i]
        number[i] *= present
    return runs[:n], number, present


@njit(cache=True, nogil=True)
def measure(labels: Int32, score: Half, classes: Half, halves: Float32) -> tuple[Int64, Float64, Float64]:
    """Add up what lies under each label that occurs in a map int32 (H, W), in their order; none is negative.

    score    float16 (H, W) and `classes` float16 (K, H, W), both as their 16 bits.
    halves   float32 (65536,), the value of each float16.
    Returns int64 (n, 4) label, pixels, sum of columns and of rows, float64 (n,) sum of `score` and (n, K) sums of
    `classes`. Probabilities in half precision add up exactly, so the order of sums does not matter.
    """
    runs, number, n = _label_runs(labels)
    counts = np.zeros((n, 4), np.int64)
    scores, sums = np.zeros(n, np.float64), np.zeros((n, len(classes)), np.float64)
    for r in range(len(runs)):
        y, begin, end, label = runs[r, 0], runs[r, 1], runs[r, 2], runs[r, 3]
        i = number[label] - 1
        counts[i, 0] = label
        counts[i, 1] += end - begin
        counts[i, 2] += (begin + end - 1) * (end - begin) // 2
        counts[i, 3] += y * (end - begin)
        total = 0.0
        for x in range(begin, end):
            total += halves[score[y, x]]
        scores[i] += total
        for k in range(len(classes)):
            total = 0.0
            for x in range(begin, end):
                total += halves[classes[k, y, x]]
            sums[i, k] += total
    return counts, scores, sums


@njit(cache=True, nogil=True)
def _walk(flat: Int32, width: int, start: int, seen: NDArray[np.uint8], out: Int32) -> tuple[int, int, int]:
    """Walk clockwise around a region, from the top side of a pixel back to it, and write the corners of the loop.

    flat   the map with a margin of one pixel, `width` wide with it.
    seen   as `flat`; the pixels whose top sides are passed are marked.
    out    (M, 2), the corners in half pixels from the start, (x, y).
    Returns eight times the loop's area, negative around a hole, and first and last place in `out` of its corners; the
    last is beyond M where there was no room. The loop joins the middles of pixel sides, of which 0 is top, 1 right, 2
    bottom, 3 left: straight on, right where the pixel ahead is foreign, which keeps diagonal contacts apart, or left
    where that on the left of it is not. It is written without branches, since none could be foreseen.
    """
    ahead = (1, width, -1, -width)
    step_x, step_y = (2, 1, 0, -1, -2, -1, 0, 1), (0, 1, 2, 1, 0, -1, -2, -1)
    label = flat[start]
    place, side, x, y = start, 0, 0, 0
    area = n = 0
    first = last = -1
    while True:
        seen[place] |= side == 0
        near = np.int64(flat[place + ahead[side]] == label)
        far = near & np.int64(flat[place + ahead[side] + ahead[(side + 3) & 3]] == label)
        place += near * ahead[side] + far * ahead[(side + 3) & 3]
        way = (2 * side + 1 - near - far) & 7  # of eight, clockwise from the right
        side = (side + 1 - near - far) & 3
        if n < len(out):
            out[n, 0], out[n, 1] = x, y
        n += way != last
        area += x * step_y[way] - y * step_x[way]
        x += step_x[way]
        y += step_y[way]
        first = way if first < 0 else first
        last = way
        if place == start and side == 0:
            return area, np.int64(first == last), n


@njit(cache=True, nogil=True)
def _with_margin(labels: Int32) -> Int32:
    height, width = labels.shape
    padded = np.empty((height + 2, width + 2), np.int32)
    padded[0], padded[-1] = 0, 0
    for y in range(height):
        padded[y + 1, 0] = padded[y + 1, -1] = 0
        for x in range(width):
            padded[y + 1, x + 1] = labels[y, x]
    return padded


@njit(cache=True, nogil=True)
def trace(labels: Int32, n: int) -> tuple[Float32, Int64]:
    """Return the outline of each label 1..n of a map int32 (H, W), as `outlines.trace_outlines` defines it.

    Raises ValueError for other labels.
    """
    width = labels.shape[1] + 2
    flat = _with_margin(labels).ravel()
    seen = np.zeros(len(flat), np.uint8)
    area, place = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    begin, end = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    corners = np.empty((64 * (n + 1), 2), np.int32)
    used = 0
    for start in range(width, len(flat) - width):
        label = flat[start]
        if label == 0 or flat[start - width] == label or seen[start]:
            continue
        if label < 0 or label > n:
            raise ValueError("a label is not one of 0 to n")
        found, first, last = _walk(flat, width, start, seen, corners[used:])
        while used + last > len(corners):
            wider = np.empty((2 * len(corners), 2), np.int32)
            wider[:used] = corners[:used]
            corners = wider
            found, first, last = _walk(flat, width, start, seen, corners[used:])
        if found > area[label]:  # of equals the first; a hole is below 0
            area[label], place[label], begin[label], end[label] = found, start, used + first, used + last
            used += last
    return _rings(corners, begin, end, place, width)


@njit(cache=True, nogil=True)
def _rings(corners: Int32, begin: Int64, end: Int64, place: Int64, width: int) -> tuple[Float32, Int64]:
    """Put the chosen corners of labels 1.. one after another, in pixels of the map: from the top side of `place` on."""
    start = np.zeros(len(begin), np.int64)
    for label in range(1, len(begin)):
        start[label] = start[label - 1] + end[label] - begin[label]
    xy = np.empty((start[-1], 2), np.float32)
    for label in range(1, len(begin)):
        x, y = place[label] % width - 1, place[label] // width - 1
        at = start[label - 1]
        for i in range(begin[label], end[label]):
            xy[at, 0], xy[at, 1] = x + 0.5 + corners[i, 0] / 2, y + corners[i, 1] / 2
            at += 1
    return xy, start
