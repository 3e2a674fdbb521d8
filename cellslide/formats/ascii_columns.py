"""Numbers and words as ASCII, whole columns at once: rows of bytes padded with NUL, which is dropped at the end.

A column of N texts is a matrix uint8 (N, W). Side by side they make rows; `pack` joins rows into the final bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.types import Bool, Int64, UInt8

LARGEST = 99_999_999  # integer part that two groups of four digits hold
UUID_BYTES = 36
MISSING = -(2**63)  # stands for a number that is not finite, which JSON does not know


def _words(texts: Sequence[str], width: int) -> UInt8:
    raw = np.array([text.encode() for text in texts], f"S{width}")
    matrix: UInt8 = raw.view(np.uint8).reshape(len(texts), width)
    return matrix


def _table(texts: Sequence[str]) -> NDArray[np.uint32]:
    return _words(texts, 4).copy().view(np.uint32)[:, 0]


_PADDED = _table([f"{i:04d}" for i in range(10_000)])
_BARE = _table([str(i) for i in range(10_000)])
_ZERO_IS_NOTHING = _BARE.copy()
_ZERO_IS_NOTHING[0] = 0
_SIGN = _table(["", "-"])


def fraction_words(places: int) -> list[str]:
    """Return the decimals of all parts of one, with their point, without zeros at the end."""
    return [f".{i:0{places}d}".rstrip("0").rstrip(".") for i in range(10**places)]


_CENTS = {end: _table([text + end for text in fraction_words(2)]) for end in (",", "]")}
_FRACTIONS = {places: _words(fraction_words(places), 8) for places in (2, 4)}


def check_pixels(cents: Int64) -> None:
    """Raise ValueError for hundredths that are too large to be those of a pixel coordinate."""
    if cents.size and (largest := max(int(cents.max()), -int(cents.min())) // 100) > LARGEST:
        raise ValueError(f"{largest} is too large to be a pixel coordinate or a measurement")


def _whole(value: Int64) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the digits of 0 <= value <= LARGEST as two columns of four bytes, without leading zeros."""
    if value.size and value.max() > LARGEST:
        raise ValueError(f"{value.max()} is too large to be a pixel coordinate or a measurement")
    high, low = np.divmod(value.astype(np.uint32), np.uint32(10_000))
    return _ZERO_IS_NOTHING[high], np.where(high > 0, _PADDED[low], _BARE[low])


def text_table(texts: Sequence[str]) -> tuple[NDArray[np.uint64], Int64]:
    """Return texts as rows of words of 8 bytes (T, W), and their lengths (T,) in bytes."""
    sizes = [len(text.encode()) for text in texts]
    return _words(texts, -(-max(sizes) // 8) * 8).view(np.uint64), np.array(sizes, np.int64)


def constant(text: str, n: int) -> UInt8:
    """Return `text` n times."""
    raw = np.frombuffer(text.encode(), np.uint8)
    return np.broadcast_to(raw, (n, len(raw)))


def choice(texts: Sequence[str], index: NDArray[Any]) -> UInt8:
    """Return texts[index[i]] in row i."""
    rows: UInt8 = _words(texts, max(1, *(len(text.encode()) for text in texts)))[index]
    return rows


def strings(values: NDArray[Any], width: int) -> UInt8:
    """Return ASCII strings (N,) of at most `width` bytes."""
    return np.ascontiguousarray(values.astype(f"S{width}")).view(np.uint8).reshape(len(values), width)


def decimals(values: NDArray[Any], places: int) -> UInt8:
    """Return finite numbers rounded to 2 or 4 decimals, trailing zeros dropped."""
    scaled = np.rint(np.asarray(values, np.float64) * 10**places).astype(np.int64)
    whole, fraction = np.divmod(np.abs(scaled), 10**places)
    columns = np.stack([_SIGN[(scaled < 0).astype(np.intp)], *_whole(whole)], axis=1)
    return np.concatenate([columns.view(np.uint8).reshape(len(scaled), 12), _FRACTIONS[places][fraction]], axis=1)


def vertices(cents: Int64, is_first: Bool) -> NDArray[np.uint32]:
    """Return points (P, 2) in hundredths as `,[x,y]`, 32 bytes a row as 8 words; no comma where `is_first`."""
    sign = (cents < 0).astype(np.intp)
    whole, fraction = np.divmod(np.abs(cents), 100)
    opening = _table([",[", "[", ",[-", "[-"])
    words = np.empty((len(cents), 8), np.uint32)
    words[:, 0] = opening[2 * sign[:, 0] + is_first]
    words[:, 1], words[:, 2] = _whole(whole[:, 0])
    words[:, 3] = _CENTS[","][fraction[:, 0]]
    words[:, 4] = _SIGN[sign[:, 1]]
    words[:, 5], words[:, 6] = _whole(whole[:, 1])
    words[:, 7] = _CENTS["]"][fraction[:, 1]]
    return words


def to_words(columns: Sequence[UInt8]) -> NDArray[np.uint64]:
    """Put columns side by side and pad the rows to whole words of 8 bytes."""
    width = sum(column.shape[1] for column in columns)
    padding = np.zeros((len(columns[0]), -width % 8), np.uint8)
    return np.concatenate([*columns, padding], axis=1).view(np.uint64)


def pack(head: NDArray[np.uint64], body: NDArray[np.uint64], body_rows: Int64, tail: NDArray[np.uint64]) -> bytes:
    """Join for each i: head[i], its next body_rows[i] rows of `body`, tail[i]; NUL bytes are dropped."""
    n = len(head)
    sizes = np.empty((n, 3), np.int64)
    sizes[:, 0], sizes[:, 1], sizes[:, 2] = head.shape[1], body_rows * body.shape[1], tail.shape[1]
    part = np.repeat(np.tile(np.arange(3, dtype=np.uint8), n), sizes.ravel())
    out = np.empty(len(part), np.uint64)
    for k, block in enumerate((head, body, tail)):
        out[part == k] = block.ravel()
    text: UInt8 = out.view(np.uint8)
    return bytes(text[text != 0])
