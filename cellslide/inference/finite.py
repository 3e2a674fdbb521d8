"""What a network gives must be numbers: checked once, between the network and whatever makes nuclei of it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.types import HoverMaps, Instances, NoOutput

# The exponent of a half-precision number that is none.
_HALF_SPECIAL = 0x7C00
NOT_FINITE = "the network gave values that are not finite (damaged weights, or an overflow: try --precision fp32)"


def is_finite(values: NDArray[Any]) -> bool:
    """Tell whether all values are numbers; half precision by its bits, which is quick for maps of probabilities."""
    if not values.size or not np.issubdtype(values.dtype, np.floating):
        return True
    if values.dtype == np.float16:
        bits = values.view(np.uint16)
        # Without sign and below infinity: all is well, and one pass tells.
        return bool(bits.max() < _HALF_SPECIAL or (bits & 0x7FFF).max() < _HALF_SPECIAL)
    with np.errstate(invalid="ignore", over="ignore"):
        # What is no number makes the sum none; numbers may, if they are large enough.
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())


def checked(output: HoverMaps | Instances | NoOutput) -> HoverMaps | Instances | NoOutput:
    """Return the output of one tile, or `NoOutput` with the reason where a value is not finite."""
    if isinstance(output, NoOutput):
        return output
    columns = [getattr(output, f.name) for f in fields(output)]
    if isinstance(output, HoverMaps) and output.type_prob is not None:
        # A softmax: one channel that is no number leaves none of that pixel.
        columns = [output.foreground_prob, output.hv, output.type_prob[0]]
    return output if all(is_finite(c) for c in columns if c is not None) else NoOutput(NOT_FINITE)
