"""Compiled loops that write the features of a GeoJSON file. Importing it needs numba.

A text is copied as whole words and what stands behind its end written over by the next: a store of four or eight bytes
costs what one of a single byte does. So nothing here writes into the last eight bytes of a buffer but what spills.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from cellslide.formats.ascii_columns import MISSING, UUID_BYTES, fraction_words
from cellslide.types import Int64, UInt8

# Two numbers of a sign, eight digits, as `jsontext` allows, a point and two decimals, with `,[`, `,` and `]`.
_POINT = 28
_VALUE = 24
_SPILL = 8
# Which of the texts of a file are the same in every feature; those of its measurements and classes follow.
OPENING, GEOMETRY, PROPERTIES, MEASUREMENTS, END, FIRST_KEY = range(6)


def _words(texts: list[str], size: int) -> tuple[NDArray[Any], UInt8]:
    """Return texts of up to `size` bytes as numbers of as many bytes, as they lie in memory, and their lengths."""
    raw = np.array([text.encode() for text in texts], f"S{size}")
    return raw.view(f"u{size}"), np.array([len(text) for text in texts], np.uint8)


_PADDED, _ = _words([f"{i:04d}" for i in range(10_000)], 4)
_BARE, _BARE_LENGTH = _words([str(i) for i in range(10_000)], 4)
_CENTS, _CENTS_LENGTH = _words(fraction_words(2), 4)
_PARTS, _PARTS_LENGTH = _words(fraction_words(4), 8)
_NEXT_POINT, _ = _words([",["], 4)


def _storing(context: Any, out: Any, at: Any, word: Any) -> Any:
    """Store a number of four or eight bytes from out[at] on, wherever that is; compiled code calls it without
    `context`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, values[0])
        place = builder.bitcast(builder.gep(array.data, [values[1]]), ir.PointerType(values[2].type))
        builder.store(values[2], place, align=1)
        return context.get_dummy_value()

    return types.void(out, types.intp, word), generate


_put_word: Any = intrinsic(_storing)


@njit(cache=True, nogil=True)
def _put_whole(value: Any, out: UInt8, at: int) -> int:
    """Write the digits of a number below 10^8, 32 bits without sign; returns where they end."""
    if value < np.uint32(10_000):
        _put_word(out, at, _BARE[value])
        return at + _BARE_LENGTH[value]
    high = value // np.uint32(10_000)
    _put_word(out, at, _BARE[high])
    at += _BARE_LENGTH[high]
    _put_word(out, at, _PADDED[value - high * np.uint32(10_000)])
    return at + 4


@njit(cache=True, nogil=True)
def _put_cents(cents: int, out: UInt8, at: int) -> int:
    """Write hundredths as a decimal, zeros at its end left out; returns where it ends."""
    if cents < 0:
        out[at] = 45
        at, cents = at + 1, -cents
    whole = cents // 100
    at = _put_whole(np.uint32(whole), out, at)
    part = cents - 100 * whole
    _put_word(out, at, _CENTS[part])
    return at + _CENTS_LENGTH[part]


@njit(cache=True, nogil=True)
def _put_value(value: int, out: UInt8, at: int) -> int:
    """Write ten thousandths as a decimal, zeros at its end left out; returns where it ends."""
    if value < 0:
        out[at] = 45
        at, value = at + 1, -value
    at = _put_whole(np.uint32(value // 10_000), out, at)
    part = value % 10_000
    _put_word(out, at, _PARTS[part])
    return at + _PARTS_LENGTH[part]


@njit(cache=True, nogil=True)
def _put_point(x: int, y: int, out: UInt8, at: int) -> int:
    """Write `,[x,y]`; returns where it ends."""
    _put_word(out, at, _NEXT_POINT[0])
    at = _put_cents(x, out, at + 2)
    out[at] = 44
    at = _put_cents(y, out, at + 1)
    out[at] = 93
    return at + 1


@njit(cache=True, nogil=True)
def _put_text(text: NDArray[np.uint64], length: int, out: UInt8, at: int) -> int:
    for k in range((length + 7) // 8):
        _put_word(out, at + 8 * k, text[k])
    return at + length


@njit(cache=True, nogil=True)
def _put_measurements(values: Int64, texts: NDArray[np.uint64], lengths: Int64, out: UInt8, at: int) -> int:
    """Write what is not MISSING of `values` (M,), each behind its key, a comma between two; returns where they end."""
    first = at
    for k in range(len(values)):
        if values[k] == MISSING:
            continue
        if at > first:
            out[at] = 44
            at += 1
        at = _put_text(texts[FIRST_KEY + k], lengths[FIRST_KEY + k], out, at)
        at = _put_value(values[k], out, at)
    return at


@njit(cache=True, nogil=True)
def write_features(
    texts: NDArray[np.uint64],
    lengths: Int64,
    uuid: NDArray[np.uint32],
    cents: Int64,
    start: Int64,
    close: bool,
    kind: Int64,
    values: Int64,
) -> UInt8:
    """Return N features, one behind the other.

    texts    (T, W), `lengths` (T,) in bytes: what OPENING to END name, M keys, then texts of classes.
    uuid     (N, 9), 36 characters each.
    cents    points (P, 2) in hundredths of a pixel; `start` (N + 1,) says where rings begin, `close` to repeat the
             first point.
    kind     (N,), which of the texts is the class.
    values   (N, M) in ten thousandths, all below 10^12, or MISSING.
    """
    n = len(uuid)
    fixed = lengths[:FIRST_KEY].sum() + UUID_BYTES + lengths[FIRST_KEY:].max()
    keys = lengths[FIRST_KEY : FIRST_KEY + values.shape[1]].sum() + values.shape[1] * _VALUE
    out = np.empty(n * (fixed + keys + _POINT) + _POINT * len(cents) + _SPILL, np.uint8)
    at = 0
    for i in range(n):
        at = _put_text(texts[OPENING], lengths[OPENING], out, at)
        for k in range(UUID_BYTES // 4):
            _put_word(out, at + 4 * k, uuid[i, k])
        at += UUID_BYTES
        while out[at - 1] == 0:  # one that is shorter
            at -= 1
        # The comma before the first point goes where GEOMETRY ends, whose last byte then comes back.
        at = _put_text(texts[GEOMETRY], lengths[GEOMETRY], out, at) - 1
        opened, last = at, out[at]
        for k in range(start[i], start[i + 1]):
            at = _put_point(cents[k, 0], cents[k, 1], out, at)
        if close:
            at = _put_point(cents[start[i], 0], cents[start[i], 1], out, at)
        out[opened] = last
        for part in (PROPERTIES, kind[i], MEASUREMENTS):
            at = _put_text(texts[part], lengths[part], out, at)
        at = _put_measurements(values[i], texts, lengths, out, at)
        at = _put_text(texts[END], lengths[END], out, at)
    return out[:at]
