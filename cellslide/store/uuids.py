"""The `uuid` of a nucleus: the same slide, weights and place give the same UUID again, so edits can be joined back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

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


def make_uuids(key: str, place: Int64, repeat: Int64) -> NDArray[np.bytes_]:
    """Return version 8 UUIDs (RFC 9562, 5.8) as bytes (N,) of 36 for places packed as x << 32 | y in 0.01 px.

    A place that came `repeat` times before gets another UUID each time. The first half is one to one in the place, so
    that different places of a slide never share it; the key decides which half that is.
    """
    seeds = np.frombuffer(sha256(f"{NAMESPACE}/{key}".encode()).digest(), "<u8")
    high = _mix(place.astype(np.uint64) ^ seeds[0])
    low = _mix(high + repeat.astype(np.uint64) * (seeds[2] | np.uint64(1)) ^ seeds[1])
    raw = np.stack([high, low], axis=1).astype(">u8").view(np.uint8).reshape(-1, 16)
    raw[:, 6] = raw[:, 6] & 0x0F | 0x80
    raw[:, 8] = raw[:, 8] & 0x3F | 0x80
    digits = np.frombuffer(raw.tobytes().hex().encode(), np.uint8).reshape(-1, 32)
    text = np.full((len(raw), 36), ord("-"), np.uint8)
    for first, stop, hyphens in ((0, 8, 0), (8, 12, 1), (12, 16, 2), (16, 20, 3), (20, 32, 4)):
        text[:, first + hyphens : stop + hyphens] = digits[:, first:stop]
    return text.view("S36")[:, 0]


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return 64 bits spread over all 64, one to one: the last step of SplitMix64."""
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)
