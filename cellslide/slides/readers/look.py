"""A look at a slide as it is opened: a sample is decoded, levels must show level 0, and colours must be those of H&E.

It reads overviews and a few small places, so that what is wrong with a file is told before an hour is spent on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import cv2
import numpy as np

from cellslide.errors import SlideError, TileError
from cellslide.slides.readers.base import SlideHeader, SlideReader, TileGaps
from cellslide.slides.readers.levels import fits, nominal_downsample
from cellslide.types import Float32, UInt8

# Levels up to this size are looked at whole; of larger ones only places.
VIEW_PX, FEWEST_PX = 3 << 19, 1 << 12
PLACES, PLACE_PX = 4, 32
# Vendors that round the sizes of levels as everyone does; others pad them, and OpenSlide knows by how much.
ROUNDING_VENDORS = frozenset(("aperio", "generic-tiff", "tiff", "ome-tiff", "dicom"))

# Patches of two levels are compared within this many pixels of the coarser one, of at most so many of the finer.
PATCH_PX, SHIFT_PX, FINE_PX = 48, 10, 640
PLAIN_STD, RICH_STD = 3.0, 10.0
SMALLEST_PX = 16
ALIKE, SURE, MOST_SHIFT_PX, MOST_COLOUR = 0.5, 0.7, 2.0, 16.0

# Fluorescence is light on black; in transmitted light glass is the brightest, and even full tissue lets light through.
DARK, DARK_SHARE, BRIGHT, BRIGHT_SHARE = 60, 0.5, 140, 0.02
GLASS_SHARE, GLASS_CHROMA = 0.01, 80


@dataclass(frozen=True, slots=True)
class Patch:
    """A square on a level: corner and edge in its pixels."""

    x: int
    y: int
    edge: int


def looked_at(reader: SlideReader, unnamed: bool = False) -> SlideReader:
    """Return the reader without levels that do not show level 0, its header with what was seen.

    unnamed  nothing says that its three channels are red, green and blue.
    Raises SlideError where nothing of level 0 can be decoded.
    """
    header = reader.header
    if header.missing and header.missing[0].is_gap.all():
        raise SlideError(f"{header.path}: its level 0 has no tiles; the file is damaged")
    _decode_one(reader)
    views = _views(reader) if len(header.levels) > 1 else {}
    kept, notes = _levels(reader, views)
    seen = _colours(reader, {k: view for k, view in views.items() if k in kept})
    if unnamed:
        notes.append("nothing says which of its three channels are red, green and blue; they are taken in this order")
    dark = header.fluorescence or _dark(seen)
    if dark is None and (words := _glass(seen)):
        notes.append(words)
    reader.header = replace(header, notes=(*header.notes, *notes), fluorescence=dark)
    return reader if len(kept) == len(header.levels) else SomeLevels(reader, kept)


class SomeLevels:
    """A slide of which only some levels are used."""

    def __init__(self, reader: SlideReader, kept: Sequence[int]) -> None:
        self.inner, self.kept = reader, tuple(kept)
        header = reader.header
        self.header: SlideHeader = replace(
            header,
            levels=tuple(header.levels[k] for k in kept),
            missing=tuple(header.missing[k] for k in kept) if header.missing else (),
        )
        self.background = reader.background

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB of one of the levels used."""
        return self.inner.read_level(self.kept[level], x_px, y_px, width_px, height_px)

    def close(self) -> None:
        """Close the file."""
        self.inner.close()


# ---------------------------------------------------------------- what is there


def _views(reader: SlideReader) -> dict[int, UInt8]:
    """Return the levels that are small enough to be looked at whole, by their number."""
    views = {}
    for k, level in enumerate(reader.header.levels):
        if level.width_px * level.height_px <= VIEW_PX:
            try:
                views[k] = reader.read_level(k, 0, 0, level.width_px, level.height_px)
            except TileError:
                continue
    return views


def _decode_one(reader: SlideReader) -> None:
    """Raise SlideError where nothing of level 0 can be decoded."""
    error = None
    for patch in _spread(reader.header):
        try:
            reader.read_level(0, patch.x, patch.y, patch.edge, patch.edge)
            return
        except TileError as told:
            error = told
    if error is not None:
        raise SlideError(f"{reader.header.path}: not one of {PLACES**2} places could be decoded: {error}")


def _colours(reader: SlideReader, views: dict[int, UInt8]) -> UInt8:
    """Return pixels (n, 3) from all over the slide: the smallest level that shows enough, else places of level 0."""
    if enough := [k for k, view in views.items() if view.size // 3 >= FEWEST_PX]:
        return views[max(enough)].reshape(-1, 3)
    found = [np.full((1, 3), reader.background, np.uint8)]
    for patch in _spread(reader.header):
        with suppress(TileError):
            found.append(reader.read_level(0, patch.x, patch.y, patch.edge, patch.edge).reshape(-1, 3))
    return np.concatenate(found[1:] or found)


def _spread(header: SlideHeader) -> Iterator[Patch]:
    """Yield places all over level 0, the middle first, so that a damaged tile is no reason."""
    width, height = header.width_px, header.height_px
    edge = min(PLACE_PX, width, height)
    steps = [(k + 0.5) / PLACES for k in (*range(PLACES // 2, PLACES), *range(PLACES // 2))]
    gaps = header.missing[0] if header.missing else None
    for v in steps:
        for u in steps:
            x, y = int(u * (width - edge)), int(v * (height - edge))
            if gaps is None or not gaps.covers((x, y, x + edge, y + edge)):
                yield Patch(x, y, edge)


def _dark(pixels: UInt8) -> str | None:
    """Say why these are the colours of fluorescence, or None: most of it black, and what is not black is no glass."""
    dark = float((pixels.max(axis=1) < DARK).mean())
    bright = float((pixels.min(axis=1) > BRIGHT).mean())
    if dark >= DARK_SHARE and bright < BRIGHT_SHARE and pixels.max() > DARK:
        return f"{dark:.0%} of it is black, and there is no glass"
    return None


def _glass(pixels: UInt8) -> str | None:
    """Say that the brightest places have a colour that no glass has, or None."""
    light = pixels @ np.array((0.299, 0.587, 0.114), np.float32)
    brightest = np.median(pixels[light >= np.quantile(light, 1 - GLASS_SHARE)], axis=0)
    if brightest.max() - brightest.min() <= GLASS_CHROMA:
        return None
    said = ", ".join(f"{c:.0f}" for c in brightest)
    return f"its brightest places are not neutral (RGB {said}); does the file state false colours?"


# ---------------------------------------------------------------- levels


def _levels(reader: SlideReader, views: dict[int, UInt8]) -> tuple[list[int], list[str]]:
    """Return the levels that show level 0, each compared with the next finer of them, and why others do not."""
    header = reader.header
    kept, notes = [0], []
    for k in range(1, len(header.levels)):
        if why := _misfit(reader, views, kept[-1], k):
            level = header.levels[k]
            notes.append(f"its level of {level.width_px} x {level.height_px} px {why}; it is not read")
        else:
            kept.append(k)
    return kept, notes


def _misfit(reader: SlideReader, views: dict[int, UInt8], fine: int, coarse: int) -> str | None:
    header = reader.header
    size0, size = (header.width_px, header.height_px), _size(header, coarse)
    if header.vendor in ROUNDING_VENDORS and not fits(size0, size):
        return "does not have the shape of level 0"
    if header.missing and _lacks(header.missing[0], header.missing[coarse]):
        return "lacks tiles that level 0 has"
    if min(size) < SMALLEST_PX:
        return None  # A few pixels show nothing, and are hardly read.
    votes = [v for patch in _patches(header, views, fine, coarse) if (v := _alike(reader, views, fine, coarse, patch))]
    return "does not show what level 0 shows" if votes.count("no") > len(votes) / 2 else None


def _size(header: SlideHeader, level: int) -> tuple[int, int]:
    return header.levels[level].width_px, header.levels[level].height_px


def _lacks(finest: TileGaps, gaps: TileGaps) -> bool:
    """Return True where a level leaves out what level 0 holds."""
    rows, cols = np.nonzero(gaps.is_gap)
    return not all(finest.covers(gaps.box(int(row), int(col))) for row, col in zip(rows, cols, strict=True))


def _scale(header: SlideHeader, level: int) -> float:
    found = header.levels[level]
    return nominal_downsample((header.width_px, header.height_px), (found.width_px, found.height_px), found.downsample)


def _patches(header: SlideHeader, views: dict[int, UInt8], fine: int, coarse: int) -> Iterator[Patch]:
    """Yield where both levels are worth comparing: where each shows most, in each quarter."""
    width, height = _size(header, coarse)
    ratio = _scale(header, coarse) / _scale(header, fine)
    edge = int(max(min(PATCH_PX, FINE_PX / ratio - 2 * SHIFT_PX, width, height), min(16, width, height), 1))
    told = [k for k in (coarse, fine) if k in views] or sorted(views)[:1]
    if not told:
        steps = (0.2, 0.5, 0.8)
        yield from (Patch(int(u * (width - edge)), int(v * (height - edge)), edge) for u in steps for v in steps)
    for k in told:
        scale = _scale(header, k) / _scale(header, coarse)
        for x, y in _richest(views[k], max(int(edge / scale), 1)):
            left, top = (int(np.clip(v * scale - edge / 2, 0, n - edge)) for v, n in ((x, width), (y, height)))
            yield Patch(left, top, edge)


def _richest(view: UInt8, edge: int) -> Iterator[tuple[float, float]]:
    """Yield the middle (x, y) of the square with the most contrast in each quarter of a view."""
    shrink = max(1, int(max(view.shape) / 512))
    grey = cv2.cvtColor(view[::shrink, ::shrink], cv2.COLOR_RGB2GRAY).astype(np.float32)
    side = max(edge // shrink, 1)
    mean, square = (cv2.boxFilter(a, -1, (side, side), borderType=cv2.BORDER_REFLECT) for a in (grey, grey * grey))
    spread = square - mean * mean
    half_y, half_x = max(grey.shape[0] // 2, 1), max(grey.shape[1] // 2, 1)
    for y0 in range(0, grey.shape[0], half_y)[:2]:
        for x0 in range(0, grey.shape[1], half_x)[:2]:
            part = spread[y0 : y0 + half_y, x0 : x0 + half_x]
            y, x = np.unravel_index(int(part.argmax()), part.shape)
            yield (x0 + int(x) + 0.5) * shrink, (y0 + int(y) + 0.5) * shrink


def _alike(reader: SlideReader, views: dict[int, UInt8], fine: int, coarse: int, patch: Patch) -> str | None:
    """Return "yes" or "no": a patch of a level shows what a finer level shows there; None where nobody can say."""
    header = reader.header
    ratio = _scale(header, coarse) / _scale(header, fine)
    try:
        small = _read(reader, views, coarse, (patch.x, patch.y), (patch.edge, patch.edge))
        around = _around(reader, views, fine, patch, ratio)
    except TileError:
        return None
    middle = around[SHIFT_PX:-SHIFT_PX, SHIFT_PX:-SHIFT_PX]
    if (np.ptp(middle.reshape(-1, 3), axis=0) < 1).all() and tuple(middle[0, 0].astype(int)) == reader.background:
        return None  # Glass, or tiles that are not there.
    if np.abs(small.mean(axis=(0, 1)) - middle.mean(axis=(0, 1))).max() > MOST_COLOUR:
        return "no"
    tint, expected = (cv2.GaussianBlur(p[..., 0] - p[..., 2], (0, 0), 2.0) for p in (small.astype(np.float32), middle))
    if np.abs(tint - expected).mean() > MOST_COLOUR:
        return "no"
    return _same_relief(_grey(small), _grey(around))


def _same_relief(small: Float32, around: Float32) -> str | None:
    middle = around[SHIFT_PX:-SHIFT_PX, SHIFT_PX:-SHIFT_PX]
    spread, expected = float(small.std()), float(middle.std())
    if min(spread, expected) < PLAIN_STD:
        return "no" if max(spread, expected) > RICH_STD else None
    scores = cv2.matchTemplate(around, small, cv2.TM_CCOEFF_NORMED)
    here = float(scores[SHIFT_PX, SHIFT_PX])
    y, x = np.unravel_index(int(scores.argmax()), scores.shape)
    best, shift = float(scores.max()), float(np.hypot(y - SHIFT_PX, x - SHIFT_PX))
    if best < ALIKE:
        return "no"
    if shift > MOST_SHIFT_PX and best >= SURE and best - here > 0.1:
        return "no"
    return "yes" if here >= ALIKE else None


def _around(reader: SlideReader, views: dict[int, UInt8], fine: int, patch: Patch, ratio: float) -> Float32:
    """Return the patch and what is around it as the finer level shows it, in pixels of the coarser one."""
    n = patch.edge + 2 * SHIFT_PX
    x0, y0 = (patch.x - SHIFT_PX) * ratio, (patch.y - SHIFT_PX) * ratio
    corner, edge = (int(np.floor(x0)), int(np.floor(y0))), int(np.ceil(n * ratio)) + 1
    pixels = _read(reader, views, fine, corner, (edge, edge)).astype(np.float32)
    if ratio > 2:
        pixels = np.asarray(cv2.blur(pixels, (round(ratio), round(ratio))), np.float32)
    at = np.arange(n) + 0.5
    xs = (at * ratio + x0 - corner[0] - 0.5).astype(np.float32)
    ys = (at * ratio + y0 - corner[1] - 0.5).astype(np.float32)
    return np.asarray(cv2.remap(pixels, *np.meshgrid(xs, ys), cv2.INTER_LINEAR), np.float32)


def _read(
    reader: SlideReader, views: dict[int, UInt8], level: int, corner: tuple[int, int], size: tuple[int, int]
) -> UInt8:
    view = views.get(level)
    (x, y), (width, height) = corner, size
    if view is None:
        return reader.read_level(level, x, y, width, height)
    ys = np.clip(np.arange(y, y + height), 0, view.shape[0] - 1)
    xs = np.clip(np.arange(x, x + width), 0, view.shape[1] - 1)
    return view[ys][:, xs]


def _grey(pixels: UInt8 | Float32) -> Float32:
    grey = cv2.cvtColor(np.ascontiguousarray(pixels, np.float32), cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.GaussianBlur(grey, (0, 0), 1.0), np.float32)
