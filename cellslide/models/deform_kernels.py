"""Compiled loop of deformable attention on a CPU. Importing it needs numba."""

from __future__ import annotations

import numpy as np
from numba import njit

from cellslide.types import Float32, Int64


@njit(cache=True, nogil=True)
def sample(
    value: Float32, shapes: Int64, locations: Float32, weights: Float32, out: Float32, begin: int, end: int
) -> None:
    """Fill `out` float32 (B, Q, heads, d) for queries `begin` to `end`, bilinear, zero outside the grids.

    value      float32 (B, S, heads, d), S = sum of H * W over `shapes` int64 (levels, 2).
    locations  float32 (B, Q, heads, levels, points, 2), (x, y) in [0, 1].
    weights    float32 (B, Q, heads, levels, points).
    """
    n, _, heads, levels, points = weights.shape
    for b in range(n):
        for q in range(begin, end):
            for head in range(heads):
                row = out[b, q, head]
                row[:] = np.float32(0.0)
                first = 0
                for level in range(levels):
                    h, w = shapes[level]
                    for p in range(points):
                        x = locations[b, q, head, level, p, 0] * np.float32(w) - np.float32(0.5)
                        y = locations[b, q, head, level, p, 1] * np.float32(h) - np.float32(0.5)
                        # Nothing of it lies on the grid; also keeps what follows from overflowing an integer.
                        if not (x > -1.0 and y > -1.0 and x < w and y < h):
                            continue
                        x0, y0 = int(np.floor(x)), int(np.floor(y))
                        right, below = x - np.float32(x0), y - np.float32(y0)
                        weight = weights[b, q, head, level, p]
                        for dy in range(2):
                            if not 0 <= y0 + dy < h:
                                continue
                            part = weight * (below if dy else np.float32(1.0) - below)
                            for dx in range(2):
                                if not 0 <= x0 + dx < w:
                                    continue
                                share = part * (right if dx else np.float32(1.0) - right)
                                source = value[b, first + (y0 + dy) * w + x0 + dx, head]
                                for i in range(len(row)):
                                    row[i] += share * source[i]
                    first += h * w
