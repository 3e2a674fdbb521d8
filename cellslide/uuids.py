"""The `uuid` of a nucleus: the same slide, weights and place give the same UUID again, so edits can be joined back."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from cellslide.types import Float64, Int64

NAMESPACE = UUID("6f0c4f0e-6a35-5d0b-9d0c-2c1f5f7f3a11")


def pack_places(x: Float64, y: Float64) -> Int64:
    """Return level-0 positions to 0.01 px as one number each, x in the high half."""
    return np.rint(x * 100).astype(np.int64) << 32 | (np.rint(y * 100).astype(np.int64) & 0xFFFFFFFF)


def times_seen(place: Int64, seen: Sequence[Int64]) -> Int64:
    """Return how often each place came before, in the blocks `seen` (sorted) and earlier in this one."""
    before = np.zeros(len(place), np.int64)
    for block in seen:
        before += np.searchsorted(block, place, "right") - np.searchsorted(block, place, "left")
    order = np.argsort(place, kind="stable")
    ordered = place[order]
    before[order] += np.arange(len(place)) - np.searchsorted(ordered, ordered, "left")
    return before


def make_uuids(key: str, place: Int64, repeat: Int64) -> NDArray[Any]:
    """Return uuid5(NAMESPACE, "key/x,y") as text (N,) for places packed as x << 32 | y in 0.01 px (RFC 9562, 5.5)."""
    base = sha1(NAMESPACE.bytes + f"{key}/".encode(), usedforsecurity=False)
    digests = bytearray()
    x, y = place >> 32, (place << 32) >> 32
    for x_cpx, y_cpx, k in zip(x.tolist(), y.tolist(), repeat.tolist(), strict=True):
        name = f"{x_cpx / 100:.2f},{y_cpx / 100:.2f}"
        digest = base.copy()
        digest.update((f"{name}/{k}" if k else name).encode())
        digests += digest.digest()[:16]
    raw = np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16).copy()
    raw[:, 6] = raw[:, 6] & 0x0F | 0x50
    raw[:, 8] = raw[:, 8] & 0x3F | 0x80
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.full((len(raw), 36), ord("-"), np.uint8)
    nibbles = np.stack([raw >> 4, raw & 15], axis=2).reshape(-1, 32)
    text[:, [i for i in range(36) if i not in (8, 13, 18, 23)]] = digits[nibbles]
    return text.view("S36")[:, 0].astype(str).astype(object)
