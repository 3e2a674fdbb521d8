"""The `uuid` of a nucleus: the same slide, weights and place give the same UUID again, so edits can be joined back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha1
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from cellslide.geometry import kernels
from cellslide.types import Float64, Int64

NAMESPACE = UUID("6f0c4f0e-6a35-5d0b-9d0c-2c1f5f7f3a11")
_FAR = 2**31 - 1


def pack_places(x: Float64, y: Float64) -> Int64:
    """Return level-0 positions to 0.01 px as one number each, x in the high half."""
    return np.rint(x * 100).astype(np.int64) << 32 | (np.rint(y * 100).astype(np.int64) & 0xFFFFFFFF)


def times_seen(place: Int64, seen: Sequence[Int64]) -> Int64:
    """Return how often each place came before, in the blocks `seen` (sorted) and earlier in this one."""
    before = np.zeros(len(place), np.int64)
    ordered = np.sort(place)
    # Hardly any place comes twice, and to see that is quicker than to count.
    for block in seen:
        if _meet(block, ordered):
            before += np.searchsorted(block, place, "right") - np.searchsorted(block, place, "left")
    if (ordered[1:] == ordered[:-1]).any():
        order = np.argsort(place, kind="stable")
        before[order] += np.arange(len(place)) - np.searchsorted(ordered, ordered, "left")
    return before


def _meet(block: Int64, other: Int64) -> bool:
    """Tell whether two sorted blocks have a place in common."""
    if not len(block):
        return False
    near = block[np.minimum(np.searchsorted(block, other), len(block) - 1)]
    return bool((near == other).any())


class SeenPlaces:
    """Counts how often places came before, block by block, and forgets a block once no later one reaches up to it.

    Cells in the order of a slide are sorted by their tile row, so a few blocks are in memory at a time.
    """

    def __init__(self, y_blocks: Iterable[Float64]) -> None:
        """`y_blocks` are the y of all blocks to come, in level-0 pixels."""
        lowest = [int(pack_places(y, y).astype(np.int32).min(initial=_FAR)) for y in y_blocks]
        self._lowest = np.minimum.accumulate(np.array([*lowest, _FAR])[::-1])[::-1].tolist()
        self._seen: list[tuple[int, Int64]] = []
        self._n = 0

    def repeats(self, place: Int64) -> Int64:
        """Return `times_seen` of the next block (N,)."""
        low = self._lowest[self._n]
        self._n += 1
        self._seen = [(top, block) for top, block in self._seen if top >= low]
        before = times_seen(place, [block for _, block in self._seen])
        self._seen.append((int(place.astype(np.int32).max(initial=-_FAR)), np.sort(place)))
        return before


def make_uuids(key: str, place: Int64, repeat: Int64) -> NDArray[Any]:
    """Return uuid5(NAMESPACE, "key/x,y") as text (N,) for places packed as x << 32 | y in 0.01 px (RFC 9562, 5.5).

    A place that came `repeat` times before gets "/repeat" behind it.
    """
    return uuid_bytes(key, place, repeat).astype(str).astype(object)


def uuid_bytes(key: str, place: Int64, repeat: Int64) -> NDArray[np.bytes_]:
    """Return the same UUIDs as bytes (N,) of 36."""
    prefix = NAMESPACE.bytes + f"{key}/".encode()
    x, y = place >> 32, (place << 32) >> 32
    if kernels.available():
        from cellslide.store.uuid_kernels import place_uuids

        return np.asarray(place_uuids(np.frombuffer(prefix, np.uint8), x, y, repeat)).view("S36")[:, 0]
    return _hashed(prefix, x, y, repeat)


def _hashed(prefix: bytes, x: Int64, y: Int64, repeat: Int64) -> NDArray[np.bytes_]:
    base = sha1(prefix, usedforsecurity=False)
    digests = bytearray()
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
    return text.view("S36")[:, 0]
