"""Resampling that does not care which box is read: each output pixel has fixed weights over fixed source pixels.

Output pixel i covers [i * ratio, (i + 1) * ratio) of the source, counted from the slide's corner, never from the box's.
So tiles that overlap agree bit for bit where they overlap, at any ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from scipy import sparse

from cellslide.types import Float64, Int64, UInt8


@dataclass(frozen=True, slots=True)
class AxisTaps:
    """Weights along one axis, index and weight (n, taps): output k is sum(weight[k] * source[index[k]])."""

    index: Int64
    weight: Float64

    @property
    def span(self) -> tuple[int, int]:
        """First and one past the last source pixel that is needed."""
        return int(self.index.min()), int(self.index.max()) + 1

    @property
    def is_copy(self) -> bool:
        """True where each output pixel is one source pixel."""
        return bool(self.index.shape[1] == 1)

    def matrix(self) -> sparse.csr_matrix:
        """Return the weights as a float32 matrix (n, span)."""
        n, taps = self.index.shape
        first, last = self.span
        start = np.arange(0, n * taps + 1, taps)
        data = self.weight.ravel().astype(np.float32)
        return sparse.csr_matrix((data, (self.index - first).ravel(), start), shape=(n, last - first))


def axis_taps(first: int, last: int, ratio: float) -> AxisTaps:
    """Return the weights of output pixels first..last-1: area means to shrink (ratio > 1), cubic to enlarge."""
    out = np.arange(first, last, dtype=np.float64)
    if ratio == 1.0:
        return AxisTaps(out.astype(np.int64)[:, None], np.ones((len(out), 1)))
    return _area(out, ratio) if ratio > 1.0 else _cubic(out, ratio)


def _area(out: Float64, ratio: float) -> AxisTaps:
    # Rounded, so that 5 * 2.2 is 11 and takes no sliver of pixel 11.
    low, high = np.round(out * ratio, 9), np.round((out + 1) * ratio, 9)
    taps = math.ceil(ratio) if float(ratio).is_integer() else math.ceil(ratio) + 1
    index = np.floor(low).astype(np.int64)[:, None] + np.arange(taps)
    covered = np.minimum(index + 1, high[:, None]) - np.maximum(index, low[:, None])
    return AxisTaps(index, np.clip(covered, 0.0, None) / (high - low)[:, None])


def _cubic(out: Float64, ratio: float) -> AxisTaps:
    """Catmull-Rom: Keys (1981) with a = -0.5."""
    centre = (out + 0.5) * ratio - 0.5
    index = np.floor(centre).astype(np.int64)[:, None] + np.arange(-1, 3)
    t = np.abs(centre[:, None] - index)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return AxisTaps(index, np.where(t < 1, near, np.where(t < 2, far, 0.0)))


def resample(image: UInt8, y: AxisTaps, x: AxisTaps) -> UInt8:
    """Return (n_y, n_x, 3) from the source pixels `y.span` by `x.span`, uint8 (h, w, 3)."""
    if y.is_copy and x.is_copy:
        return image
    whole = _whole_factor(y, x)
    if whole is not None:
        # Exact means over whole blocks: cv2 does the same sums an order of magnitude faster.
        size = image.shape[1] // whole, image.shape[0] // whole
        return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    height, width, channels = image.shape
    rows = (y.matrix() @ image.reshape(height, -1).astype(np.float32)).reshape(-1, width, channels)
    columns = (x.matrix() @ cv2.transpose(rows).reshape(width, -1)).reshape(len(x.index), -1, channels)
    np.clip(np.rint(columns, out=columns), 0, 255, out=columns)
    return np.asarray(cv2.transpose(columns.astype(np.uint8)), np.uint8).reshape(len(y.index), len(x.index), channels)


def _whole_factor(y: AxisTaps, x: AxisTaps) -> int | None:
    taps = y.index.shape[1]
    plain = bool((y.weight == y.weight[0, 0]).all() and (x.weight == y.weight[0, 0]).all())
    return taps if plain and taps == x.index.shape[1] and taps > 1 else None
