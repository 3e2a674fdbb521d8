"""Compiled loops that make the UUIDs of places: their text, and its SHA-1. Importing it needs numba."""

from __future__ import annotations

import numpy as np
from numba import njit

from cellslide.types import Int64, UInt8

_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_SHA1 = np.array([0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0], np.uint32)
_ROUNDS = np.array([0x5A827999, 0x6ED9EBA1, 0x8F1BBCDC, 0xCA62C1D6], np.uint32)
# A place is two numbers of at most 19 digits with sign, point, comma and a count.
_LONGEST = 80


@njit(cache=True, nogil=True)
def _put_whole(value: int, out: UInt8, at: int) -> int:
    """Write the digits of 0 <= value; returns where they end."""
    size, rest = 1, value // 10
    while rest:
        size, rest = size + 1, rest // 10
    for k in range(at + size - 1, at - 1, -1):
        out[k] = 48 + value % 10
        value //= 10
    return at + size


@njit(cache=True, nogil=True)
def _put_cents(cents: int, out: UInt8, at: int) -> int:
    """Write hundredths with two decimals; returns where they end."""
    if cents < 0:
        out[at] = 45
        at, cents = at + 1, -cents
    at = _put_whole(cents // 100, out, at)
    part = cents % 100
    out[at], out[at + 1], out[at + 2] = 46, 48 + part // 10, 48 + part % 10
    return at + 3


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
        end = _put_cents(x[i], text, rest)
        text[end] = 44
        end = _put_cents(y[i], text, end + 1)
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
    for k in range(end + 1, stop):  # a loop, since a slice takes seconds to compile
        text[k] = 0
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
