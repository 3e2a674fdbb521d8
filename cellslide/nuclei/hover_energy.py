"""Energy between nuclei, from the gradients of the distance maps; for both forms of decoding.

`HoverDecode.mode` picks the scale of the gradients: "published" stretches them by their extremes in the tile and gives
the published instances; "fixed" uses constants, and whole numbers, so that a nucleus comes out the same whatever else
is in the tile and wherever it lies.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.types import Float32, Float64, HoverDecode

# Steps per unit of the distance maps and of the energy in "fixed" mode: far finer than a network's noise, and coarse
# enough that the sums of a 21 px Sobel kernel and of the blur fit 53 bits and are therefore exact.
HV_STEPS = 2.0**12
HV_LIMIT = 2.0
ENERGY_STEPS = 2.0**22


def gradient_range(kernel_px: int) -> tuple[float, float]:
    """Return the default (low, high) of `hv_gradient_range`, in units of the distance maps per pixel.

    The maps rise from -1 to 1 across a nucleus and fall by 2 between two that touch. With p the greatest answer of the
    unit-gain Sobel kernel to a step of 1, a nucleus answers up to about p and a touching border -2p: those are the
    ends.
    """
    derive, _ = sobel_kernels(kernel_px)
    # The answer to a step is the running sum of the derivative kernel, divided by the answer to a ramp of 1 per pixel.
    peak = float(np.cumsum(-derive).max()) / float(derive @ np.arange(kernel_px))
    return -2 * peak, peak


@cache
def sobel_kernels(kernel_px: int) -> tuple[Float64, Float64]:
    """Return OpenCV's derivative and smoothing kernels (kernel_px,)."""
    import cv2

    derive, smooth = cv2.getDerivKernels(1, 0, kernel_px, ktype=cv2.CV_64F)
    return np.asarray(derive, np.float64).ravel(), np.asarray(smooth, np.float64).ravel()


def stretch(values: NDArray[Any]) -> Float32:
    """Scale values of any shape linearly to 0..1, float32, as OpenCV rounds it."""
    import cv2

    out = np.empty(values.shape, np.float32)
    return np.asarray(cv2.normalize(values, out, 0, 1, cv2.NORM_MINMAX, cv2.CV_32F), np.float32).reshape(values.shape)


def published_energy(across: Float32, down: Float32) -> Float32:
    """Return the energy where the stretched gradients along x and y are `across` and `down`, of the same shape."""
    return np.asarray(np.maximum(np.maximum(1 - across, 1 - down), np.float32(0)), np.float32)


def fixed_energy(across: Float64, down: Float64, config: HoverDecode) -> Float32:
    """Return the energy max((high - gradient) / (high - low)), 1 where two nuclei touch; gradients in HV_STEPS.

    Nothing is clipped, so that the flood meets no plateaus. The sums are whole numbers and exact, hence independent of
    where in the tile a nucleus lies and of the order in which they were added up.
    """
    low, high = config.hv_gradient_range or gradient_range(config.kernel_px)
    derive, smooth = sobel_kernels(config.kernel_px)
    gain = float(derive @ np.arange(config.kernel_px)) * float(smooth.sum()) * HV_STEPS
    scale = ENERGY_STEPS / (high - low)
    energy = np.minimum(across, down)
    energy *= scale / gain
    np.subtract(high * scale, energy, out=energy)
    np.rint(energy, out=energy)
    energy /= ENERGY_STEPS
    return energy.astype(np.float32)


def ceil_float32(value: float) -> np.float32:
    """Return the least float32 not below `value`; a float32 is below it exactly when it is below `value`."""
    rounded = np.float32(value)
    return rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(np.inf))
