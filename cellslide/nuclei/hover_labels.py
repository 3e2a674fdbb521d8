"""HoverMaps -> label map with compiled kernels: the same labels as `plain` gives, several times as fast."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.nuclei.gradient_kernels import gradient, hv_steps
from cellslide.nuclei.hover_energy import (
    HV_LIMIT,
    HV_STEPS,
    ceil_float32,
    fixed_energy,
    published_energy,
    sobel_kernels,
    stretch,
)
from cellslide.nuclei.watershed_kernels import Runs, components, fill_holes, flood, lay_out
from cellslide.types import Float32, Float64, HoverDecode, HoverMaps, Int32, UInt8


def hover_labels(maps: HoverMaps, config: HoverDecode) -> Int32:
    """Return the label map int32 (H, W) of one tile; see `decode.hover_instances`."""
    runs, n = components(_foreground(maps, config), 1, config.min_object_px)
    shape = maps.foreground.shape
    if len(runs.row) == 0:
        return np.zeros(shape, np.int32)
    energy = _energy(maps.hv, runs, config)
    level, blob, calm = lay_out(runs, energy, float(ceil_float32(config.energy_threshold)), shape)
    markers, _ = components(_opened(calm), 1, config.min_marker_px)
    labels, whole = flood(runs, n, markers, level, blob, config.mode == "fixed")
    if whole:
        return np.asarray(labels, np.int32)
    # Tied markers come out as the whole tile's heap has them, in the published form.
    from cellslide.nuclei import hover_reference as plain

    return plain.hover_labels(maps, config)


def _foreground(maps: HoverMaps, config: HoverDecode) -> UInt8:
    foreground = maps.foreground
    if config.foreground_threshold != 0.5:
        foreground = (maps.foreground_prob > np.float16(config.foreground_threshold)).view(np.uint8)
    return np.require(foreground, np.uint8, ("C", "W"))


def _energy(hv: Float32, runs: Runs, config: HoverDecode) -> Float32:
    """Return the energy of foreground pixels, float32 (P,), in the order of the runs."""
    if config.mode == "published":
        # The extremes of the tile stand at the end of the values, so these are stretched as the whole tile would be.
        return published_energy(*(stretch(_gradient(stretch(hv[axis]), runs, axis, config))[:-2] for axis in (0, 1)))
    steps = np.empty(hv.shape[1:], np.float32)
    sums = []
    for axis in (0, 1):
        hv_steps(np.require(hv[axis], np.float32, ("C", "W")), HV_LIMIT, HV_STEPS, steps)
        sums.append(_gradient(steps, runs, axis, config)[:-2])
    return fixed_energy(sums[0], sums[1], config)


def _gradient(image: Float32, runs: Runs, axis: int, config: HoverDecode) -> Float64:
    derive, smooth = sobel_kernels(config.kernel_px)
    along, across = (derive, smooth) if axis == 0 else (smooth, derive)
    return np.asarray(gradient(image, runs, along, across, axis == 1), np.float64)


def _opened(calm: UInt8) -> NDArray[Any]:
    """Fill the holes of the calm foreground, in place, and open it by a 5 px disc."""
    import cv2

    zeros, n = components(calm, 0, 1)
    fill_holes(calm, zeros, n)
    return cv2.morphologyEx(calm, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
