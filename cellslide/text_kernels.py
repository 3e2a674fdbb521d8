"""Compiled loops that write text: UUIDs of places and the features of a GeoJSON file. Importing it needs numba.

Texts are bytes, uint8; a matrix (N, W) holds one text a row, padded with NUL.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cellslide.types import Int64, UInt8

# The four digits of 0 to 9999.
_DIGITS = (48 + np.arange(10_000)[:, None] // (1000, 100, 10, 1) % 10).astype(np.uint8)
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_SHA1 = np.array([0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0], np.uint32)
_ROUNDS = np.array([0x5A827999, 0x6ED9EBA1, 0x8F1BBCDC, 0xCA62C1D6], np.uint32)
# A place is two numbers of at most 19 digits with sign, point, comma and a count.
_LONGEST = 80
# The text of a point: of numbers of up to 8 digits before the point, as `jsontext` allows, and more.
_POINT = 50


@njit(cache=True, nogil=True)
def _put_four(value: int, size: int, out: UInt8, at: int) -> int:
    for k in range(size):
        out[at + k] = _DIGITS[value, 4 - size + k]
    return at + size


@njit(cache=True, nogil=True)
def _put_head(value: int, out: UInt8, at: int) -> int:
    return _put_four(value, 1 + (value > 9) + (value > 99) + (value > 999), out, at)


@njit(cache=True, nogil=True)
def _put_whole(value: int, out: UInt8, at: int) -> int:
    """Write the digits of 0 <= value; returns where they end."""
    if value < 10_000:
        return _put_head(value, out, at)
    if value < 100_000_000:
        return _put_four(value % 10_000, 4, out, _put_head(value // 10_000, out, at))
    size, rest = 1, value // 10
    while rest:
        size, rest = size + 1, rest // 10
    end = at + size
    for k in range(end - 1, at - 1, -1):
        out[k] = 48 + value % 10
        value //= 10
    return end


@njit(cache=True, nogil=True)
def _put_cents(cents: int, out: UInt8, at: int, bare: bool) -> int:
    """Write hundredths as a decimal, zeros at its end left out if `bare`; returns where it ends."""
    if cents < 0:
        out[at] = 45
        at, cents = at + 1, -cents
    at = _put_whole(cents // 100, out, at)
    part = cents % 100
    if bare and part == 0:
        return at
    out[at], out[at + 1], out[at + 2] = 46, 48 + part // 10, 48 + part % 10
    return at + 2 if bare and part % 10 == 0 else at + 3


@njit(cache=True, nogil=True)
def _turn(value: np.uint32, bits: int) -> np.uint32:
    """Return 32 bits turned to the left."""
    return np.uint32(value << bits | np.uint32(value) >> (32 - bits))


@njit(cache=True, nogil=True)
def _sha1_block(state: np.ndarray, block: UInt8, at: int, word: np.ndarray) -> None:
    """Take 64 bytes of `block` into the state (5,) of SHA-1 (FIPS 180-4, 6.1.2); `word` (80,) is scratch."""
    for k in range(16):
        i = at + 4 * k
        word[k] = (
            np.uint32(block[i]) << np.uint32(24)
            | np.uint32(block[i + 1]) << np.uint32(16)
            | np.uint32(block[i + 2]) << np.uint32(8)
            | np.uint32(block[i + 3])
        )
    for k in range(16, 80):
        mixed = word[k - 3] ^ word[k - 8] ^ word[k - 14] ^ word[k - 16]
        word[k] = _turn(mixed, 1)
    a, b, c, d, e = state[0], state[1], state[2], state[3], state[4]
    for k in range(80):
        if k < 20:
            chosen = d ^ (b & (c ^ d))
        elif 40 <= k < 60:
            chosen = (b & c) | (b & d) | (c & d)
        else:
            chosen = b ^ c ^ d
        new = np.uint32(_turn(a, 5) + chosen + e + _ROUNDS[k // 20] + word[k])
        a, b, c, d, e = new, a, _turn(b, 30), c, d
    state[0] += a
    state[1] += b
    state[2] += c
    state[3] += d
    state[4] += e


@njit(cache=True, nogil=True)
def place_uuids(prefix: UInt8, x: Int64, y: Int64, repeat: Int64) -> UInt8:
    """Return version 5 UUIDs (N, 36) of `prefix` and "x,y" in hundredths, "/repeat" behind it where that is not 0."""
    word = np.empty(80, np.uint32)
    state, first = np.empty(5, np.uint32), _SHA1.copy()
    whole = len(prefix) // 64 * 64
    for at in range(0, whole, 64):
        _sha1_block(first, prefix, at, word)
    rest = len(prefix) - whole
    text = np.zeros(rest + _LONGEST + 128, np.uint8)
    text[:rest] = prefix[whole:]
    out = np.empty((len(x), 36), np.uint8)
    for i in range(len(x)):
        end = _put_cents(x[i], text, rest, False)
        text[end] = 44
        end = _put_cents(y[i], text, end + 1, False)
        if repeat[i]:
            text[end] = 47
            end = _put_whole(repeat[i], text, end + 1)
        state[:] = first
        for at in range(0, _pad(text, end, whole), 64):
            _sha1_block(state, text, at, word)
        _put_uuid(state, out[i])
    return out


@njit(cache=True, nogil=True)
def _pad(text: UInt8, end: int, before: int) -> int:
    """Put behind a message what SHA-1 asks for, its length in bits at the end; returns where that ends."""
    stop = (end + 9 + 63) // 64 * 64
    text[end] = 0x80
    text[end + 1 : stop] = 0
    bits = np.uint64(8 * (before + end))
    for k in range(8):
        text[stop - 1 - k] = np.uint8(bits >> np.uint64(8 * k) & np.uint64(255))
    return stop


@njit(cache=True, nogil=True)
def _put_uuid(state: np.ndarray, out: UInt8) -> None:
    """Write a SHA-1 state as a version 5 UUID (RFC 9562, 5.5)."""
    at = 0
    for k in range(16):
        if k == 4 or k == 6 or k == 8 or k == 10:
            out[at] = 45
            at += 1
        value = np.int64(state[k // 4]) >> (24 - 8 * (k % 4)) & 255
        if k == 6:
            value = value & 0x0F | 0x50
        elif k == 8:
            value = value & 0x3F | 0x80
        out[at], out[at + 1] = _HEX[value >> 4], _HEX[value & 15]
        at += 2


@njit(cache=True, nogil=True)
def _put_point(x: int, y: int, out: UInt8, at: int) -> int:
    out[at] = 91
    at = _put_cents(x, out, at + 1, True)
    out[at] = 44
    at = _put_cents(y, out, at + 1, True)
    out[at] = 93
    return at + 1


@njit(cache=True, nogil=True)
def write_rows(head: UInt8, cents: Int64, start: Int64, tail: UInt8, close: bool) -> UInt8:
    """Return for each i: head[i], the points of its ring as `[x,y],[x,y]`, tail[i]; NUL bytes are dropped.

    head, tail (N, W) are texts, `cents` (P, 2) points in hundredths, `start` (N + 1,) where rings begin; `close` writes
    the first point again at the end.
    """
    n = len(head)
    out = np.empty(n * (head.shape[1] + tail.shape[1] + _POINT) + _POINT * len(cents), np.uint8)
    at = 0
    for i in range(n):
        at = _put_text(head[i], out, at)
        for k in range(start[i], start[i + 1]):
            if k > start[i]:
                out[at] = 44
                at += 1
            at = _put_point(cents[k, 0], cents[k, 1], out, at)
        if close:
            out[at] = 44
            at = _put_point(cents[start[i], 0], cents[start[i], 1], out, at + 1)
        at = _put_text(tail[i], out, at)
    return out[:at]


@njit(cache=True, nogil=True)
def _put_text(text: UInt8, out: UInt8, at: int) -> int:
    for byte in text:  # without a branch: what is dropped is written over
        out[at] = byte
        at += byte != 0
    return at
