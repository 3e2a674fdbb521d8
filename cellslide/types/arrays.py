"""Names of arrays by the type of their numbers, and the check of their lengths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]


def check_lengths(record: object, n: int, columns: tuple[str, ...]) -> None:
    """Raise ValueError where one of the `columns` of a record has not `n` rows; one that is None has none to have."""
    for name in columns:
        column = getattr(record, name)
        if column is not None and len(column) != n:
            raise ValueError(f"{type(record).__name__}.{name} has {len(column)} rows, expected {n}")
