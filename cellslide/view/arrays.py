"""Arrays for the page: one body of named arrays, little-endian, that the browser reads without parsing numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGN = 8


def pack(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any] | None = None) -> bytes:
    """Return arrays and a few facts as bytes.

    Layout: uint32 length of the head, the head (JSON: facts, and of each array its type, length and offset), then the
    arrays, flat, each at a multiple of 8 bytes from the start of the body.
    """
    blobs, places, offset = [], {}, 0
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).ravel()
        flat = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
        places[name] = [flat.dtype.name, len(flat), offset]
        blobs.append(_padded(flat.tobytes()))
        offset += len(blobs[-1])
    head = json.dumps({"facts": dict(facts or {}), "arrays": places}, allow_nan=False).encode()
    # Blanks are no part of JSON's meaning, so the head itself brings the arrays to their place.
    head += b" " * (-(len(head) + 4) % ALIGN)
    return b"".join([len(head).to_bytes(4, "little"), head, *blobs])


def _padded(blob: bytes) -> bytes:
    return blob + bytes(-len(blob) % ALIGN)
