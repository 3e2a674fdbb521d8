"""A TIFF of any layout, tile by tile or strip by strip, through tifffile."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from cellslide.errors import SlideError, TileError
from cellslide.slides.readers.base import WHITE, SlideHeader, TileGaps, composite, paste
from cellslide.slides.readers.cache import TileCache
from cellslide.slides.readers.choose import APERIO_J2K_YCBCR, TiffImage, choose, is_jpeg_rgb, segment_shape
from cellslide.slides.readers.colours import BLACK_IS_ZERO, WHITE_IS_ZERO, as_rgb
from cellslide.types import Level, UInt8

SEGMENT_CACHE_BYTES = 128 << 20
MOST_SEGMENTS = 1 << 26


class TiffReader:
    """A TIFF read through tifffile, segment by segment: OME-TIFF with SubIFD levels, big TIFF, tiles or strips.

    image  what the slide is in the file; `vendor` names its maker where one is known.
    """

    background = WHITE

    def __init__(self, path: Path, vendor: str | None = None) -> None:
        try:
            # By the ending .ndpi alone tifffile takes a file for one of Hamamatsu, which do not come here.
            self._tiff = tifffile.TiffFile(path, is_ndpi=False)
        except Exception as error:  # tifffile raises what it likes on a damaged file.
            raise SlideError(f"{path}: tifffile cannot open it: {error}") from error
        try:
            self.image = choose(path, self._tiff)
            self.level_pages = self.image.levels
            self.header = _tiff_header(path, self.image, vendor)
        except Exception as error:
            self._tiff.close()
            if isinstance(error, SlideError):
                raise
            raise SlideError(f"{path}: tifffile cannot open it: {error}") from error
        self._lock = threading.Lock()
        self._cache = TileCache(SEGMENT_CACHE_BYTES)

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB of a level. Raises TileError if the file is damaged there."""
        out = np.empty((height_px, width_px, 3), np.uint8)
        out[:] = self.background
        frame = self.level_pages[level][0]
        step_y, step_x = segment_shape(frame)
        ys = range(max(y_px, 0) // step_y, -(-min(y_px + height_px, frame.imagelength) // step_y))
        xs = range(max(x_px, 0) // step_x, -(-min(x_px + width_px, frame.imagewidth) // step_x))
        across = -(-frame.imagewidth // step_x)
        for row in ys:
            for col in xs:
                load = partial(self._segment, level, row * across + col, row, col)
                paste(out, self._cache.get((level, row, col), load), col * step_x - x_px, row * step_y - y_px)
        return out

    def _segment(self, level: int, index: int, row: int, col: int) -> UInt8:
        """Return the RGB pixels of one tile or strip, cut to the image; one that is left out is background."""
        pages = self.level_pages[level]
        page = pages[0]
        step_y, step_x = segment_shape(page)
        height, width = min(step_y, page.imagelength - row * step_y), min(step_x, page.imagewidth - col * step_x)
        places = _places(page, index)
        if any(_is_gap(page, i) for page in pages for i in places):
            return np.full((height, width, 3), self.background, np.uint8)
        stored = np.concatenate([self._decode(page, i, height, width) for page in pages for i in places], axis=-1)
        return self._coloured(stored, page, len(pages))

    def _coloured(self, stored: UInt8, page: Any, n_pages: int) -> UInt8:
        order = self.image.order
        if n_pages >= 3 or (page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and stored.shape[-1] == 3):
            rgb = np.ascontiguousarray(stored[..., order])
            rgb = np.asarray(255 - rgb if page.photometric == WHITE_IS_ZERO else rgb, np.uint8)
            return composite(np.dstack([rgb, stored[..., 3]]), self.background) if n_pages == 4 else rgb
        if order != (0, 1, 2):
            stored = np.concatenate([stored[..., order], stored[..., 3:]], axis=-1)
        return as_rgb(stored, page, self.background)

    def _decode(self, page: Any, index: int, height: int, width: int) -> UInt8:
        """Return one segment as stored, uint8 (height, width, samples)."""
        with self._lock:
            self._tiff.filehandle.seek(page.dataoffsets[index])
            data = self._tiff.filehandle.read(page.databytecounts[index])
        try:
            if page.compression == APERIO_J2K_YCBCR:
                raise ValueError("JPEG 2000 in YCbCr is read in tiles of RGB levels only")
            pixels = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)[0]
            if pixels is None or pixels.shape[1] < height or pixels.shape[2] < width:
                raise ValueError("it is cut short")
        except Exception as error:  # Codecs raise what they like; it is this segment's either way.
            raise TileError(f"{self.header.path}: segment {index} cannot be decoded: {error}") from error
        return np.asarray(pixels[0, :height, :width], np.uint8)

    def is_rgb(self, page: Any) -> bool:
        """Return whether the JPEG tiles of a page are RGB, or else YCbCr."""
        return is_jpeg_rgb(self._tiff, page)

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()


def _places(page: Any, index: int) -> list[int]:
    """Return the segments that hold one place: one, or one for each channel where these are stored apart."""
    if page.planarconfig != 2 or page.samplesperpixel == 1:
        return [index]
    step_y, step_x = segment_shape(page)
    total = -(-page.imagelength // step_y) * -(-page.imagewidth // step_x)
    return [index + k * total for k in range(page.samplesperpixel)]


def _is_gap(page: Any, index: int) -> bool:
    return bool(index >= len(page.databytecounts) or page.databytecounts[index] <= 0 or page.dataoffsets[index] <= 0)


def _gaps(pages: tuple[Any, ...], size0: tuple[int, int]) -> TileGaps:
    """Return which tiles or strips of a level are not in the file, in any of its channels."""
    page = pages[0]
    step_y, step_x = segment_shape(page)
    rows, cols = -(-page.imagelength // step_y), -(-page.imagewidth // step_x)
    if rows * cols > MOST_SEGMENTS:
        raise ValueError(f"{size0[0]} x {size0[1]} px in {rows * cols:,} tiles is no slide; is it damaged?")
    is_gap = np.zeros(rows * cols, np.bool_)
    for one in pages:
        for k in range(len(_places(one, 0))):
            held = np.zeros(rows * cols, np.bool_)
            start = k * rows * cols
            counts = np.asarray(one.databytecounts[start : start + rows * cols], np.int64)
            offsets = np.asarray(one.dataoffsets[start : start + rows * cols], np.int64)
            n = min(len(counts), len(offsets))
            held[:n] = (counts[:n] > 0) & (offsets[:n] > 0)
            is_gap |= ~held
    scale_x, scale_y = size0[0] / page.imagewidth, size0[1] / page.imagelength
    return TileGaps(is_gap.reshape(rows, cols), step_x * scale_x, step_y * scale_y)


def _tiff_header(path: Path, image: TiffImage, vendor: str | None) -> SlideHeader:
    width, height = image.sizes[0]
    levels = tuple(Level(w, h, (width / w + height / h) / 2) for w, h in image.sizes)
    known = "ome-tiff" if image.is_ome else vendor if vendor not in (None, "generic-tiff") else "tiff"
    return SlideHeader(
        path, known or "tiff", width, height, levels, image.found, image.power, read_by="tifffile", notes=image.notes,
        fluorescence=image.fluorescence,
        missing=tuple(_gaps(pages, (width, height)) for pages in image.levels),
    )  # fmt: skip
