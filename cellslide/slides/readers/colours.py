"""From samples as they are stored to RGB, by what is declared of them; and what a JPEG stream says of itself."""

from __future__ import annotations

import struct
from typing import Any

import cv2
import numpy as np

from cellslide.slides.readers.base import composite
from cellslide.types import UInt8

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
# How many samples make the colour; what follows is an extra sample.
COLOUR_SAMPLES = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
PREMULTIPLIED_ALPHA, ALPHA = 1, 2
_FULL_RANGE = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)
_REC_601 = (0.299, 0.587, 0.114)


def jpeg_is_rgb(stream: bytes) -> bool | None:
    """Return whether a JPEG stream of three components is RGB or YCbCr where it says so decisively, else None.

    Components that are subsampled cannot be RGB; JFIF is YCbCr by its definition.
    """
    adobe: bool | None = None
    jfif, at = False, 2
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], struct.unpack_from(">H", stream, at + 2)[0]
        body = stream[at + 4 : at + 2 + length]
        if marker == 0xE0 and body[:5] == b"JFIF\0":
            jfif = True
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11] == 0
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _by_components(body, adobe, jfif)
        elif marker == 0xDA:
            break
        at += 2 + length
    return None


def _by_components(frame: bytes, adobe: bool | None, jfif: bool) -> bool | None:
    if len(frame) < 15 or frame[5] != 3:
        return None
    if frame[7] != frame[10] or frame[7] != frame[13]:
        return False
    if frame[6:15:3] == b"RGB":
        return True
    return adobe if adobe is not None else False if jfif else None


def alpha_kind(page: Any) -> int:
    """Return the kind of alpha that the first extra sample is declared to be, 0 where it is none."""
    extra = declared_extra(page)
    return extra[0] if extra and extra[0] in (PREMULTIPLIED_ALPHA, ALPHA) else 0


def declared_extra(page: Any) -> tuple[int, ...]:
    """Return the meanings of extra samples as the tag states them; tifffile fills in its own where there is no tag."""
    tag = page.tags.get("ExtraSamples")
    if tag is None:
        return ()
    value = tag.value
    return tuple(int(v) for v in value) if isinstance(value, tuple) else (int(value),)


def as_rgb(pixels: UInt8, page: Any, background: tuple[int, int, int]) -> UInt8:
    """Turn the samples of a page, uint8 (h, w, samples), into RGB; only a declared alpha is laid on the background."""
    kind, n = page.photometric, COLOUR_SAMPLES[page.photometric]
    rgb = _colour(pixels, page, n)
    if not (alpha := alpha_kind(page)) or pixels.shape[-1] <= n:
        return np.ascontiguousarray(rgb)
    if alpha == ALPHA or kind == CMYK:
        return composite(np.dstack([rgb, pixels[..., n]]), background)
    # Premultiplied: the colour has its share of the background left out already.
    rest = np.asarray(background, np.float32) * (1 - pixels[..., n, None].astype(np.float32) / 255)
    return np.clip(np.rint(rgb + rest), 0, 255).astype(np.uint8)


def _colour(pixels: UInt8, page: Any, n: int) -> UInt8:
    kind, samples = page.photometric, pixels[..., :n]
    if kind == PALETTE:
        table = np.asarray(page.colormap, np.uint16)
        # The tag has 16 bits; some writers fill only the lower 8.
        table = (table >> 8).astype(np.uint16) if table.max() > 255 else table
        return np.asarray(table.astype(np.uint8)[:, samples[..., 0]].transpose(1, 2, 0), np.uint8)
    if kind in (WHITE_IS_ZERO, BLACK_IS_ZERO):
        grey = np.repeat(samples, 3, axis=-1)
        return np.asarray(255 - grey if kind == WHITE_IS_ZERO else grey, np.uint8)
    if kind == CMYK:
        ink = 255 - samples.astype(np.uint16)
        return np.asarray((ink[..., :3] * ink[..., 3:] + 127) // 255, np.uint8)
    if kind == YCBCR and page.compression not in (6, 7):
        return np.asarray(cv2.cvtColor(np.ascontiguousarray(samples[..., [0, 2, 1]]), cv2.COLOR_YCrCb2RGB), np.uint8)
    return samples


def odd_ycbcr(page: Any) -> bool:
    """Return True for YCbCr outside JPEG that is subsampled, or that is not on the scale of JPEG."""
    if page.photometric != YCBCR or page.compression == 7:
        return False
    scale = _numbers(page, "ReferenceBlackWhite")
    weights = _numbers(page, "YCbCrCoefficients")
    sampling = page.tags.get("YCbCrSubSampling")
    # 2 x 2 is what the standard takes where there is no tag.
    return (
        sampling is None
        or tuple(sampling.value) != (1, 1)
        or (scale is not None and not np.allclose(scale, _FULL_RANGE, atol=0.51))
        or (weights is not None and not np.allclose(weights, _REC_601, atol=0.002))
    )


def _numbers(page: Any, name: str) -> list[float] | None:
    """Return the values of a tag of rationals, each a pair of numbers."""
    tag = page.tags.get(name)
    if tag is None:
        return None
    flat = np.asarray(tag.value, np.float64).ravel()
    return list(flat[::2] / np.maximum(flat[1::2], 1)) if len(flat) in (6, 12) else None
