"""Compiled steps from HoVer maps to a label map: runs of pixels, holes, watershed. Importing it needs numba.

An image is held as its horizontal runs of pixels, row by row: `row`, `begin`, `end` (half-open columns) and `group`,
the 4-connected component, numbered from 0 by first pixel. Runs of a row are consecutive, from `row_start[row]` on. What
is said "of foreground pixels" is flat, in the order of the runs. Nothing checks that shapes agree: callers do.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cellslide.types import Bool, Float32, Float64, Int32, Int64, UInt8

ZERO, ONE, SEVEN_BYTES, EACH = np.uint64(0), np.uint64(1), np.uint64(56), np.uint64(0x0101010101010101)
# Pixels of a component that wait for a label.
FREE = -1
# What a turn in a heap holds of a row, and of a column: no tile has more of them.
ROW_BITS, COLUMN = 16, 2**16 - 1
# The turn of the first pixel that a flood reaches; those below are seeds', and with the second they wait.
FIRST_REACHED, WAITS = 2**32, 2**62


class Runs(NamedTuple):
    """Runs of pixels (R,) all int32, and where each row's begin (H + 1,)."""

    row_start: Int32
    row: Int32
    begin: Int32
    end: Int32
    group: Int32


@njit(cache=True, nogil=True)
def _root(parent: Int32, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
def _changes(words: NDArray[np.uint64], out: Int32) -> int:
    """Write the places of the ones among bytes 0 and 1, eight to a word, to `out`; returns how many there are."""
    n = 0
    for w in range(len(words)):
        word = words[w]
        while word != ZERO:
            rest = word & (word - ONE)
            lowest = word ^ rest
            # Below the lowest one lie as many bytes of 255 in `lowest - 1` as the place has; their ones are added up.
            out[n] = 8 * w + np.int32((((lowest - ONE) & EACH) * EACH) >> SEVEN_BYTES)
            n += 1
            word = rest
    return n


@njit(cache=True, nogil=True)
def _find_runs(mask: UInt8, value: int) -> Runs:
    """Return the runs of pixels of an image (H, W) that equal `value`, each a group of its own."""
    height, width = mask.shape
    most = height * ((width + 1) // 2)
    row, begin, end = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.int32)
    row_start, places = np.empty(height + 1, np.int32), np.empty(width + 1, np.int32)
    change = np.zeros((width + 7) // 8 * 8, np.uint8)
    n = 0
    for y in range(height):
        row_start[y] = n
        line = mask[y]
        change[0] = line[0] == value
        for x in range(1, width):
            change[x] = (line[x] == value) != (line[x - 1] == value)
        found = _changes(change.view(np.uint64), places)
        places[found] = width
        for i in range(0, found, 2):
            row[n], begin[n], end[n] = y, places[i], places[i + 1]
            n += 1
    row_start[height] = n
    return Runs(row_start, row[:n], begin[:n], end[:n], np.arange(n, dtype=np.int32))


@njit(cache=True, nogil=True)
def _join_runs(runs: Runs) -> None:
    """Give runs that touch across rows the same group: the number of its first run."""
    parent = runs.group
    for y in range(1, len(runs.row_start) - 1):
        above, below = runs.row_start[y - 1], runs.row_start[y]
        while above < runs.row_start[y] and below < runs.row_start[y + 1]:
            if runs.begin[above] < runs.end[below] and runs.begin[below] < runs.end[above]:
                a, b = _root(parent, above), _root(parent, below)
                parent[max(a, b)] = min(a, b)
            if runs.end[above] < runs.end[below]:
                above += 1
            else:
                below += 1
    for i in range(len(parent)):  # a parent comes before its child, so it is a root already
        parent[i] = parent[parent[i]]


@njit(cache=True, nogil=True)
def components(mask: UInt8, value: int, min_px: int) -> tuple[Runs, int]:
    """Return the 4-connected components of pixels equal to `value` in an image (H, W) that have `min_px` pixels.

    Also returns how many numbers were given, which the small ones that were dropped had too.
    """
    runs = _find_runs(mask, value)
    _join_runs(runs)
    group = runs.group
    number, size = np.empty(len(group), np.int32), np.zeros(len(group), np.int64)
    n = 0
    for i in range(len(group)):
        if group[i] == i:
            number[i] = n
            n += 1
        size[group[i]] += runs.end[i] - runs.begin[i]
    kept = 0
    for y in range(len(runs.row_start) - 1):
        first, last = runs.row_start[y], runs.row_start[y + 1]
        runs.row_start[y] = kept
        for i in range(first, last):
            root = group[i]
            if size[root] >= min_px:
                runs.row[kept], runs.begin[kept], runs.end[kept] = y, runs.begin[i], runs.end[i]
                group[kept] = root  # runs move to the front, so that no root is overwritten before it was read
                kept += 1
    runs.row_start[-1] = kept
    for i in range(kept):
        group[i] = number[group[i]]
    return Runs(runs.row_start, runs.row[:kept], runs.begin[:kept], runs.end[:kept], group[:kept]), n


@njit(cache=True, nogil=True)
def lay_out(runs: Runs, energy: Float32, threshold: float, shape: tuple[int, int]) -> tuple[Float32, UInt8, UInt8]:
    """Return the energy of foreground pixels as a map (H, W) with nothing meant elsewhere, the foreground, and the calm
    part of it, whose energy is below `threshold`; both 0/1."""
    level = np.empty(shape, np.float32)
    blob, calm = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    at = 0
    for i in range(len(runs.row)):
        y = runs.row[i]
        for x in range(runs.begin[i], runs.end[i]):
            value = energy[at]
            level[y, x] = value
            blob[y, x] = 1
            calm[y, x] = 1 if value < threshold else 0
            at += 1
    return level, blob, calm


@njit(cache=True, nogil=True)
def fill_holes(mask: UInt8, zeros: Runs, n: int) -> None:
    """Set the zeros of a 0/1 image (H, W), `n` components of them, that have no 4-connected way to its edge."""
    height, width = mask.shape
    outside = np.zeros(n, np.bool_)
    for i in range(len(zeros.row)):
        y = zeros.row[i]
        if zeros.begin[i] == 0 or zeros.end[i] == width or y == 0 or y == height - 1:
            outside[zeros.group[i]] = True
    for i in range(len(zeros.row)):
        if not outside[zeros.group[i]]:
            mask[zeros.row[i], zeros.begin[i] : zeros.end[i]] = 1


@njit(cache=True, nogil=True)
def _name_groups(runs: Runs, n: int, markers: Runs) -> tuple[Int32, Bool]:
    """Return the label of the last marker in each component (n,), 0 for none, and whether it has several."""
    label, shared = np.zeros(n, np.int32), np.zeros(n, np.bool_)
    for y in range(len(runs.row_start) - 1):
        i, m = runs.row_start[y], markers.row_start[y]
        while i < runs.row_start[y + 1] and m < markers.row_start[y + 1]:
            if runs.begin[i] < markers.end[m] and markers.begin[m] < runs.end[i]:
                group, number = runs.group[i], markers.group[m] + 1
                shared[group] |= label[group] != 0 and label[group] != number
                label[group] = number
            if runs.end[i] < markers.end[m]:
                i += 1
            else:
                m += 1
    return label, shared


@njit(cache=True, nogil=True)
def _height(level: Float32, blob: UInt8, y: int, x: int) -> float:
    return 1.0 - level[y, x] if blob[y, x] else 0.0


@njit(cache=True, nogil=True)
def _mirrored(i: int, n: int) -> int:
    """Return the index that a place just outside 0..n - 1 mirrors; the edge is not repeated."""
    if n == 1:
        return 0
    if i < 0:
        return 1
    return n - 2 if i == n else i


@njit(cache=True, nogil=True)
def _distance(level: Float32, blob: UInt8, y: int, x: int) -> float:
    """Return the flooded value of a pixel: minus 1 - energy, smoothed by a 3 x 3 Gaussian, summed as OpenCV does."""
    height, width = level.shape
    left, right = _mirrored(x - 1, width), _mirrored(x + 1, width)
    total = 0.0
    for step in (-1, 1, 0):
        row = _mirrored(y + step, height)
        sides = _height(level, blob, row, left) + _height(level, blob, row, right)
        smooth = _height(level, blob, row, x) * 0.5 + sides * 0.25
        if step == 0:
            return -(total * 0.25 + smooth * 0.5)
        total += smooth
    return total


@njit(cache=True, nogil=True)
def _push(value: Float64, turn: Int64, n: int, v: float, t: int) -> None:
    """Put (v, t) into a heap of `n` items that is ordered by value, then turn."""
    while n > 0:
        up = (n - 1) // 2
        if value[up] < v or (value[up] == v and turn[up] < t):
            break
        value[n], turn[n] = value[up], turn[up]
        n = up
    value[n], turn[n] = v, t


@njit(cache=True, nogil=True)
def _drop_first(value: Float64, turn: Int64, n: int) -> None:
    """Take the first item off a heap of `n`."""
    n -= 1
    v, t = value[n], turn[n]
    i, down = 0, 1
    while down < n:
        other = down + 1
        if other < n and (value[other] < value[down] or (value[other] == value[down] and turn[other] < turn[down])):
            down = other
        if v < value[down] or (v == value[down] and t < turn[down]):
            break
        value[i], turn[i] = value[down], turn[down]
        i, down = down, 2 * down + 1
    value[i], turn[i] = v, t


@njit(cache=True, nogil=True)
def _has_free(labels: Int32, y: int, x: int) -> bool:
    """Tell whether a neighbour of a pixel waits for a label."""
    height, width = labels.shape
    return (
        (y > 0 and labels[y - 1, x] == FREE)
        or (x > 0 and labels[y, x - 1] == FREE)
        or (x + 1 < width and labels[y, x + 1] == FREE)
        or (y + 1 < height and labels[y + 1, x] == FREE)
    )


@njit(cache=True, nogil=True)
def _seed(labels: Int32, blob: UInt8, level: Float32, runs: Runs, own: Int32, heap: tuple[Float64, Int64]) -> int:
    """Put the rims of the markers of one component into the heap and return its length; `own` are its runs."""
    value, turn = heap
    n = 0
    for i in own:
        y = np.int64(runs.row[i])
        for x in range(runs.begin[i], runs.end[i]):
            if labels[y, x] > 0 and _has_free(labels, y, x):
                _push(value, turn, n, _distance(level, blob, y, x), (y << ROW_BITS) | x)
                n += 1
    return n


@njit(cache=True, nogil=True)
def _put_off(value: Float64, turn: Int64, n: int, v: float) -> bool:
    """Let seeds of value `v` wait for all pixels of that value, in the order of their places; tell whether there was
    one."""
    found = False
    while n > 0 and value[0] == v and turn[0] < FIRST_REACHED:
        later = turn[0] | WAITS
        _drop_first(value, turn, n)
        _push(value, turn, n - 1, v, later)
        found = True
    return found


@njit(cache=True, nogil=True)
def _flood_group(
    labels: Int32, blob: UInt8, level: Float32, n: int, heap: tuple[Float64, Int64], break_ties: bool
) -> bool:
    """Let the `n` seeds in the heap flood their component: lowest pixel first, then the one that was reached first.

    A turn holds when a pixel was reached, 0 for seeds, then its row and its column. Returns False as soon as two seeds
    tie, unless `break_ties` lets the first in place go first.
    """
    value, turn = heap
    height, width = labels.shape
    reached = 0
    while n > 0:
        lowest, now = value[0], turn[0]
        _drop_first(value, turn, n)
        n -= 1
        if now < FIRST_REACHED and _put_off(value, turn, n, lowest) and not break_ties:
            return False
        y, x = (now >> ROW_BITS) & COLUMN, now & COLUMN
        label = labels[y, x]
        for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
            row, col = y + dy, x + dx
            if row < 0 or col < 0 or row >= height or col >= width or labels[row, col] != FREE:
                continue
            labels[row, col] = label
            reached += 1
            if _has_free(labels, row, col):
                later = (reached * FIRST_REACHED) | (row << ROW_BITS) | col
                _push(value, turn, n, _distance(level, blob, row, col), later)
                n += 1
    return True


@njit(cache=True, nogil=True)
def _by_group(runs: Runs, n: int) -> tuple[Int32, Int32, int]:
    """Return the runs sorted by group, where each group's begin (n + 1,), and the most pixels of one group."""
    start, size = np.zeros(n + 1, np.int32), np.zeros(n, np.int64)
    most = 0
    for i in range(len(runs.group)):
        group = runs.group[i]
        start[group + 1] += 1
        size[group] += runs.end[i] - runs.begin[i]
        most = max(most, size[group])
    for g in range(n):
        start[g + 1] += start[g]
    free, order = start.copy(), np.empty(len(runs.group), np.int32)
    for i in range(len(runs.group)):
        order[free[runs.group[i]]] = i
        free[runs.group[i]] += 1
    return order, start, most


@njit(cache=True, nogil=True)
def flood(runs: Runs, n: int, markers: Runs, level: Float32, blob: UInt8, break_ties: bool) -> tuple[Int32, bool]:
    """Return the label map int32 (H, W): each of `n` components has its marker's label, or is shared out by a
    watershed.

    Also returns whether it is whole: not so where markers tie and `break_ties` is not given, which leaves it to the
    caller to do it as the published form does.
    """
    label, shared = _name_groups(runs, n, markers)
    labels = np.zeros(blob.shape, np.int32)
    for i in range(len(runs.row)):
        group = runs.group[i]
        labels[runs.row[i], runs.begin[i] : runs.end[i]] = FREE if shared[group] else label[group]
    for m in range(len(markers.row)):
        y = markers.row[m]
        for x in range(markers.begin[m], markers.end[m]):
            if labels[y, x] == FREE:
                labels[y, x] = markers.group[m] + 1
    order, start, most = _by_group(runs, n)
    heap = (np.empty(most, np.float64), np.empty(most, np.int64))
    for group in range(n):
        if not shared[group]:
            continue
        seeds = _seed(labels, blob, level, runs, order[start[group] : start[group + 1]], heap)
        if not _flood_group(labels, blob, level, seeds, heap, break_ties):
            return labels, False
    return labels, True
