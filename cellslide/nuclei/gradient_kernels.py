"""Compiled Sobel filters of any size, whose answer is wanted at the foreground only. Importing it needs numba."""

from __future__ import annotations

import numpy as np
from numba import njit

from cellslide.nuclei.watershed_kernels import Runs
from cellslide.types import Float32, Float64


@njit(cache=True, nogil=True)
def hv_steps(hv: Float32, limit: float, steps: float, out: Float32) -> None:
    """Round a map (H, W), held to -limit..limit, to whole steps, of which a unit has `steps`; float32 into `out`."""
    height, width = hv.shape
    low, high, scale = np.float32(-limit), np.float32(limit), np.float32(steps)
    for y in range(height):
        for x in range(width):
            value = hv[y, x]
            value = low if value < low else value
            value = high if value > high else value
            out[y, x] = np.rint(value * scale)


@njit(cache=True, nogil=True)
def _mirrored(i: int, n: int) -> int:
    """Return the index that a place outside 0..n - 1 mirrors, as often as it takes; the edge is not repeated."""
    while i < 0 or i >= n:
        if n == 1:
            return 0
        i = -i if i < 0 else 2 * n - 2 - i
    return i


@njit(cache=True, nogil=True)
def _filter_row(line: Float32, kernel: Float64, padded: Float64, out: Float64) -> None:
    width, reach = len(line), len(kernel) // 2
    for x in range(width):
        padded[reach + x] = line[x]
    for x in range(1, reach + 1):
        padded[reach - x] = line[_mirrored(-x, width)]
        padded[reach + width - 1 + x] = line[_mirrored(width - 1 + x, width)]
    weight = kernel[0]
    for x in range(width):
        out[x] = weight * padded[x]
    k = 1
    while k + 10 <= len(kernel):  # ten taps a round save loads and stores; the order of sums stays
        a, b, c, d, e = kernel[k], kernel[k + 1], kernel[k + 2], kernel[k + 3], kernel[k + 4]
        f, g, h, i, j = kernel[k + 5], kernel[k + 6], kernel[k + 7], kernel[k + 8], kernel[k + 9]
        for x in range(width):
            p = x + k
            left = out[x] + a * padded[p] + b * padded[p + 1] + c * padded[p + 2] + d * padded[p + 3]
            left = left + e * padded[p + 4] + f * padded[p + 5] + g * padded[p + 6]
            out[x] = left + h * padded[p + 7] + i * padded[p + 8] + j * padded[p + 9]
        k += 10
    while k < len(kernel):
        for x in range(width):
            out[x] += kernel[k] * padded[x + k]
        k += 1


@njit(cache=True, nogil=True)
def _filter_column(ring: Float64, y: int, kernel: Float64, odd: bool, out: Float64) -> None:
    """Filter down the column around row `y`; row i is ring[i % len(kernel)], the kernel even, or odd about its
    middle."""
    n, reach = len(kernel), len(kernel) // 2
    width = len(out)
    middle, weight = ring[y % n], 0.0 if odd else kernel[reach]
    for x in range(width):
        out[x] = weight * middle[x]
    for k in range(1, reach + 1):
        below, above = ring[(y + k) % n], ring[(y - k) % n]
        weight = kernel[reach + k]
        if odd:
            for x in range(width):
                out[x] += weight * (below[x] - above[x])
        else:
            for x in range(width):
                out[x] += weight * (below[x] + above[x])


@njit(cache=True, nogil=True)
def gradient(image: Float32, runs: Runs, along: Float64, across: Float64, odd: bool) -> Float64:
    """Return a separable filter's answer to an image (H, W) at foreground pixels, and its least and greatest anywhere.

    along   kernel of odd length along rows.
    across  kernel of the same length down columns, odd about its middle or even.
    Returns float64 (P + 2,), the last two being the extremes. Mirrors at the edges; the order of sums is OpenCV's.
    """
    height, width = image.shape
    n, reach = len(along), len(along) // 2
    ring, padded = np.empty((n, width), np.float64), np.empty(width + 2 * reach, np.float64)
    line = np.empty(width, np.float64)
    low, high = np.empty(width, np.float64), np.empty(width, np.float64)
    low[:], high[:] = np.inf, -np.inf
    at = 0
    for i in range(len(runs.row)):
        at += runs.end[i] - runs.begin[i]
    values = np.empty(at + 2, np.float64)
    at = 0
    for y in range(-reach, height + reach):
        _filter_row(image[_mirrored(y, height)], along, padded, ring[y % n])
        middle = y - reach
        if middle < 0:
            continue
        _filter_column(ring, middle, across, odd, line)
        for x in range(width):
            value = line[x]
            low[x] = value if value < low[x] else low[x]
            high[x] = value if value > high[x] else high[x]
        for i in range(runs.row_start[middle], runs.row_start[middle + 1]):
            for x in range(runs.begin[i], runs.end[i]):
                values[at] = line[x]
                at += 1
    values[at], values[at + 1] = np.inf, -np.inf
    for x in range(width):
        values[at] = min(values[at], low[x])
        values[at + 1] = max(values[at + 1], high[x])
    return values
