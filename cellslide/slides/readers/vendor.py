"""Slides that OpenSlide reads: the formats of scanners, DICOM, plain tiled TIFF."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide

from cellslide.errors import SlideError, TileError
from cellslide.slides.pixel_size import from_openslide
from cellslide.slides.readers.base import WHITE, SlideHeader, composite, paste
from cellslide.types import Level, UInt8

BLOCK_PX = 256
LINES_PX = 8 << 20
OPENSLIDE_CACHE_BYTES = (32 << 20, 256 << 20)


class OpenSlideReader:
    """A slide that OpenSlide reads: `path` is what was asked for, `file` what is opened (one of a DICOM folder)."""

    def __init__(self, path: Path, file: Path) -> None:
        self.file = file
        try:
            self._handle = openslide.OpenSlide(file)
            properties = dict(self._handle.properties)
            self.background = _background(properties)
            self.header = _openslide_header(path, self._handle, properties)
        except (openslide.OpenSlideError, OSError, ValueError) as error:
            raise SlideError(f"{path}: OpenSlide cannot open it: {error}") from error
        # Room for about one row of tiles: neighbours in the row below need the rows where tiles overlap again.
        low, high = OPENSLIDE_CACHE_BYTES
        self._handle.set_cache(openslide.OpenSlideCache(min(max(5 * 256 * 4 * self.header.width_px, low), high)))

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB of a level. Raises TileError if the file is damaged there."""
        downsample = self.header.levels[level].downsample
        if downsample == round(downsample):
            return self._read_lines(level, round(downsample), (x_px, y_px), (width_px, height_px))
        # OpenSlide takes positions as whole level-0 pixels and blends level pixels where these do not divide. On a
        # fixed grid of blocks each pixel is blended in one way only, whichever box asks for it.
        out = np.empty((height_px, width_px, 3), np.uint8)
        for y in range(y_px // BLOCK_PX * BLOCK_PX, y_px + height_px, BLOCK_PX):
            for x in range(x_px // BLOCK_PX * BLOCK_PX, x_px + width_px, BLOCK_PX):
                block = self._read((round(x * downsample), round(y * downsample)), level, (BLOCK_PX, BLOCK_PX))
                paste(out, block, x - x_px, y - y_px)
        return out

    def _read_lines(self, level: int, downsample: int, corner: tuple[int, int], size: tuple[int, int]) -> UInt8:
        """Read a box of a level as whole lines at a time, so that what OpenSlide needs beside the result is little."""
        (x, y), (width, height) = corner, size
        lines = max(LINES_PX // max(width, 1), 1)
        if height <= lines:
            return self._read((x * downsample, y * downsample), level, size)
        out = np.empty((height, width, 3), np.uint8)
        for first in range(0, height, lines):
            part = width, min(lines, height - first)
            out[first : first + part[1]] = self._read((x * downsample, (y + first) * downsample), level, part)
        return out

    def _read(self, where: tuple[int, int], level: int, size: tuple[int, int]) -> UInt8:
        with suppress(openslide.OpenSlideError):
            return self._region(self._handle, where, level, size)
        # A handle that failed once refuses everything after, so one bad tile would lose the slide: get a fresh one.
        # The old one is left to its other users. Another thread may have caused this, hence the second try.
        try:
            self._handle = openslide.OpenSlide(self.file)
            with openslide.OpenSlide(self.file) as fresh:
                return self._region(fresh, where, level, size)
        except openslide.OpenSlideError as error:
            raise TileError(f"{self.header.path}: level {level} at {where} cannot be read: {error}") from error

    def _region(self, handle: openslide.OpenSlide, where: tuple[int, int], level: int, size: tuple[int, int]) -> UInt8:
        return composite(np.asarray(handle.read_region(where, level, size)), self.background)

    def close(self) -> None:
        """Close the handle."""
        self._handle.close()


def _background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    text = properties.get("openslide.background-color", "")
    return (int(text[:2], 16), int(text[2:4], 16), int(text[4:6], 16)) if len(text) == 6 else WHITE


def _openslide_header(path: Path, handle: openslide.OpenSlide, properties: Mapping[str, str]) -> SlideHeader:
    sizes = zip(handle.level_dimensions, handle.level_downsamples, strict=True)
    levels = tuple(Level(w, h, float(d)) for (w, h), d in sizes)
    bounds = [properties.get(f"openslide.bounds-{name}") for name in ("x", "y", "width", "height")]
    text = properties.get("openslide.objective-power")
    power = float(text) if text else None
    found = from_openslide(properties)
    return SlideHeader(
        path,
        properties.get("openslide.vendor", "unknown"),
        levels[0].width_px,
        levels[0].height_px,
        levels,
        replace(found, power=power) if found else None,
        power,
        (int(bounds[0]), int(bounds[1]), int(bounds[2]), int(bounds[3])) if None not in bounds else None,  # type: ignore[arg-type]
        "OpenSlide",
    )
