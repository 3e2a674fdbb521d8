"""How a level relates to level 0, by their sizes."""

from __future__ import annotations

import numpy as np

# Sizes are rounded up or down at each halving, which adds up to less than this at any level.
ROUNDING_PX = 1.01


def nominal_downsample(size0: tuple[int, int], size: tuple[int, int], stated: float) -> float:
    """Return the downsample that a level was made with.

    Scanners halve again and again and round the size, so that the ratio of sizes (what OpenSlide states, 2.0005 for 2)
    is off by up to a pixel at the far edge. A whole factor that explains both sizes, a power of two first, is taken.
    """
    for factor in (2.0 ** round(np.log2(stated)), float(round(stated))):
        if all(abs(whole / factor - part) < 1 for whole, part in zip(size0, size, strict=True)):
            return factor
    return stated


def fits(size0: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return True where one downsample explains both edges of a level, but for rounding."""
    if any(part > whole for whole, part in zip(size0, size, strict=True)):
        return False
    low = max(whole / (part + ROUNDING_PX) for whole, part in zip(size0, size, strict=True))
    high = min(
        whole / (part - ROUNDING_PX) if part > ROUNDING_PX else float("inf")
        for whole, part in zip(size0, size, strict=True)
    )
    return low <= high
