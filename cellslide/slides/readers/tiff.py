"""A TIFF of any layout, tile by tile or strip by strip, through tifffile."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from cellslide.errors import SlideError, TileError
from cellslide.slides.pixel_size import PixelSize, from_ome, from_tiff
from cellslide.slides.readers.base import WHITE, SlideHeader, composite, paste
from cellslide.slides.readers.cache import TileCache
from cellslide.types import Level, UInt8

MOST_STRIP_PX = 1 << 28
SEGMENT_CACHE_BYTES = 128 << 20


class TiffReader:
    """A TIFF read through tifffile, segment by segment: OME-TIFF with SubIFD levels, big TIFF, tiles or strips."""

    background = WHITE

    def __init__(self, path: Path) -> None:
        try:
            self._tiff = tifffile.TiffFile(path)
            series = max(self._tiff.series, key=lambda s: float(np.prod(s.shape)))
            self.level_pages = [_planes(path, level) for level in series.levels]
            self.header = _tiff_header(path, self._tiff, [pages[0] for pages in self.level_pages])
        except SlideError:
            raise
        except Exception as error:  # tifffile raises what it likes on a damaged file.
            raise SlideError(f"{path}: tifffile cannot open it: {error}") from error
        self._lock = threading.Lock()
        self._cache = TileCache(SEGMENT_CACHE_BYTES)

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB of a level. Raises TileError if the file is damaged there."""
        out = np.empty((height_px, width_px, 3), np.uint8)
        out[:] = self.background
        frame = self.level_pages[level][0].keyframe
        step_y, step_x = _segment_shape(frame)
        ys = range(max(y_px, 0) // step_y, -(-min(y_px + height_px, frame.imagelength) // step_y))
        xs = range(max(x_px, 0) // step_x, -(-min(x_px + width_px, frame.imagewidth) // step_x))
        across = -(-frame.imagewidth // step_x)
        for row in ys:
            for col in xs:
                load = partial(self._segment, level, row * across + col, row, col)
                paste(out, self._cache.get((level, row, col), load), col * step_x - x_px, row * step_y - y_px)
        return out

    def _segment(self, level: int, index: int, row: int, col: int) -> UInt8:
        """Return the RGB pixels of one tile or strip, cut to the image."""
        pages = self.level_pages[level]
        frame = pages[0].keyframe
        (step_y, step_x), separate = _segment_shape(frame), frame.planarconfig == 2 and frame.samplesperpixel > 1
        total = -(-frame.imagelength // step_y) * -(-frame.imagewidth // step_x)
        where = [(page, index + k * total) for page in pages for k in range(frame.samplesperpixel if separate else 1)]
        height, width = min(step_y, frame.imagelength - row * step_y), min(step_x, frame.imagewidth - col * step_x)
        parts = [self._decode(page, i, height, width) for page, i in where]
        return _as_rgb(np.concatenate(parts, axis=-1), frame, self.background)

    def _decode(self, page: Any, index: int, height: int, width: int) -> UInt8:
        """Return one segment as stored, uint8 (height, width, samples); a missing one is background."""
        with self._lock:
            self._tiff.filehandle.seek(page.dataoffsets[index])
            data = self._tiff.filehandle.read(page.databytecounts[index]) or None
        try:
            pixels = page.keyframe.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)[0]
        except Exception as error:  # Codecs raise what they like; it is this segment's either way.
            raise TileError(f"{self.header.path}: segment {index} cannot be decoded: {error}") from error
        samples = page.keyframe.samplesperpixel if page.keyframe.planarconfig == 1 else 1
        if pixels is None:
            return np.full((height, width, samples), self.background[0], np.uint8)
        return np.asarray(pixels[0, :height, :width], np.uint8)

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()


def _planes(path: Path, level: Any) -> list[Any]:
    """Return the pages of one level: one page of colour or grey, or three of one channel each."""
    pages = [page for page in level.pages if page is not None]
    frame = pages[0].keyframe
    shape = {n: axis for axis, n in zip(level.axes, level.shape, strict=True) if n > 1 and axis not in "YXSC"}
    samples = frame.samplesperpixel * len(pages)
    if shape or frame.dtype != np.uint8 or samples not in (1, 3, 4):
        raise SlideError(
            f"{path}: axes {level.axes} {level.shape} of {frame.dtype} are not an 8-bit RGB image; convert it to one"
        )
    if min(*_segment_shape(frame), *frame.shape) < 1 or np.prod(_segment_shape(frame), dtype=float) > MOST_STRIP_PX:
        raise SlideError(f"{path}: strips of {_segment_shape(frame)} px cannot be read; convert it to a tiled TIFF")
    return pages


def _tiff_header(path: Path, tiff: Any, pages: Sequence[Any]) -> SlideHeader:
    sizes = [(p.keyframe.imagewidth, p.keyframe.imagelength) for p in pages]
    width, height = sizes[0]
    levels = tuple(Level(w, h, (width / w + height / h) / 2) for w, h in sizes)
    found = from_ome(tiff.ome_metadata, width, height) if tiff.is_ome else None
    vendor = "ome-tiff" if tiff.is_ome else "tiff"
    return SlideHeader(path, vendor, width, height, levels, found or resolution(tiff), read_by="tifffile")


def _segment_shape(frame: Any) -> tuple[int, int]:
    """(height, width) of a tile, or of a strip."""
    if frame.is_tiled:
        return int(frame.tilelength), int(frame.tilewidth)
    return min(int(frame.rowsperstrip), int(frame.imagelength)), int(frame.imagewidth)


def _as_rgb(pixels: UInt8, frame: Any, background: tuple[int, int, int]) -> UInt8:
    """Turn stored samples (h, w, 1, 3 or 4) into RGB: grey repeated, white-is-zero inverted, alpha composited."""
    if frame.photometric == 3:
        palette = np.asarray(frame.colormap, np.uint16) >> 8
        return np.ascontiguousarray(palette.astype(np.uint8)[:, pixels[..., 0]].transpose(1, 2, 0))
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
        return np.asarray(255 - pixels if frame.photometric == 0 else pixels, np.uint8)
    return composite(pixels, background) if pixels.shape[-1] == 4 else np.ascontiguousarray(pixels)


def resolution(tiff: Any) -> PixelSize | None:
    """Return the pixel size that the tags of an open TIFF state, if any."""
    tags = {tag.name: tag.value for tag in tiff.pages[0].tags.values()}
    return from_tiff(tags, tiff.imagej_metadata)
