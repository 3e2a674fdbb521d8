"""The quick way to pixels: tiles of JPEG and JPEG 2000 read by their place in the file, decoded, laid side by side.

OpenSlide (tifffile for OME-TIFF) says what levels a file has, and this module where their tiles lie. What is odd in
any way is not read like this; and a tile of each level is compared with what the other library makes of it before a
file is. The pixels are the same bit for bit, save on levels whose downsample is not a whole number: there OpenSlide
blends neighbours, since it counts in level-0 pixels, and this module gives the pixels that the file holds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import imagecodecs
import numpy as np
import simplejpeg

from cellslide.errors import TileError
from cellslide.slides.readers.base import SlideReader, paste
from cellslide.slides.readers.cache import TileCache
from cellslide.slides.readers.tiff import TiffReader
from cellslide.slides.readers.vendor import BLOCK_PX
from cellslide.types import Int64, UInt8

CACHE_BYTES = (32 << 20, 256 << 20)
JPEG, APERIO_J2K_RGB, J2K = 7, 33005, 34712
RGB, YCBCR = 2, 6
NAMES = {JPEG: "JPEG", APERIO_J2K_RGB: "JPEG 2000", J2K: "JPEG 2000"}
# The part of a read, at its right and lower edge, that the reads beside it are likely to share.
SHARED = 0.25


class OddFile(Exception):
    """A file that is not read tile by tile; the message says why."""


class Codec(Protocol):
    """Turns the bytes of a tile into pixels."""

    def decode(self, data: bytes, out: UInt8) -> None:
        """Fill `out`, uint8 (h, w, 3); raises an error of any kind where the bytes are damaged."""


@dataclass(frozen=True, slots=True)
class JpegCodec:
    """Tiles of JPEG. `head` stands before each: the tables that they share, and whether they are RGB or YCbCr.

    Bytes that libjpeg only warns of are an error too, as in OpenSlide: what it fills in is not what was scanned.
    """

    head: bytes

    @classmethod
    def of(cls, tables: bytes | None, is_rgb: bool) -> JpegCodec:
        """Return the codec for abbreviated or whole streams."""
        # Adobe's marker: colour transform 0 is RGB, 1 is YCbCr.
        marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if is_rgb else b"\x01")
        return cls(b"\xff\xd8" + marker + (tables or b"")[2:-2])

    def decode(self, data: bytes, out: UInt8) -> None:
        """Fill `out`; raises ValueError."""
        if data[:2] != b"\xff\xd8":
            raise ValueError("not a JPEG stream")
        found = simplejpeg.decode_jpeg(self.head + data[2:], buffer=out)
        if found.shape != out.shape:
            raise ValueError(f"{found.shape[1]} x {found.shape[0]} px in a tile of {out.shape[1]} x {out.shape[0]}")


@dataclass(frozen=True, slots=True)
class Jpeg2000Codec:
    """Tiles of JPEG 2000 whose samples are RGB."""

    def decode(self, data: bytes, out: UInt8) -> None:
        """Fill `out`; raises what imagecodecs raises."""
        imagecodecs.jpeg2k_decode(data, out=out)


@dataclass(frozen=True, slots=True)
class TiledLevel:
    """One level as its file holds it: sizes in pixels, and for each tile, row by row, file, first byte and length.

    lies  the file states other colours than its tiles are in, so that other libraries show false ones.
    """

    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    file: Int64
    offset: Int64
    n_bytes: Int64
    codec: Codec
    name: str
    lies: bool = False

    @property
    def n_across(self) -> int:
        """Tiles in a row."""
        return -(-self.width_px // self.tile_width_px)

    @property
    def n_down(self) -> int:
        """Rows of tiles."""
        return -(-self.height_px // self.tile_height_px)


class FileBytes:
    """Files open for reads from any thread."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._streams = [path.open("rb", buffering=0) for path in paths]
        self.sizes = [os.fstat(stream.fileno()).st_size for stream in self._streams]
        self._lock = threading.Lock()

    def read(self, file: int, offset: int, n_bytes: int) -> bytes:
        """Return bytes of a file, fewer where it ends; raises OSError."""
        n_bytes = max(min(n_bytes, self.sizes[file] - offset), 0)
        stream = self._streams[file]
        if hasattr(os, "pread"):
            return os.pread(stream.fileno(), n_bytes, offset)
        with self._lock:
            stream.seek(offset)
            return stream.read(n_bytes)

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams:
            stream.close()


# The files of a slide and its levels in them; raises OddFile.
FindLevels = Callable[[], tuple[Sequence[Path], tuple[TiledLevel, ...]]]


class TiledReader:
    """A slide whose tiles are read and decoded here; another reader, `beside`, knows the rest and bad tiles best.

    cache          decoded tiles.
    trusts_beside  the other reader shows the same colours.
    """

    trusts_beside = True

    def __init__(self, beside: SlideReader, files: Sequence[Path], levels: tuple[TiledLevel, ...]) -> None:
        self.header = replace(beside.header, read_by=f"cellslide, tile by tile ({levels[0].name})")
        self.background = beside.background
        self.beside, self.levels = beside, levels
        self.files = FileBytes(files)
        low, high = CACHE_BYTES
        row_bytes = 3 * levels[0].tile_height_px * levels[0].width_px
        self.cache = TileCache(min(max(6 * row_bytes, low), high))

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB of a level. Raises TileError if the file is damaged there."""
        stored = self.levels[level]
        right, bottom = x_px + width_px, y_px + height_px
        out = np.empty((height_px, width_px, 3), np.uint8)
        if x_px < 0 or y_px < 0 or right > stored.width_px or bottom > stored.height_px:
            out[:] = self.background
        step_x, step_y = stored.tile_width_px, stored.tile_height_px
        shared_x, shared_y = right - int(width_px * SHARED), bottom - int(height_px * SHARED)
        for row in range(max(y_px, 0) // step_y, min(-(-bottom // step_y), stored.n_down)):
            for col in range(max(x_px, 0) // step_x, min(-(-right // step_x), stored.n_across)):
                keep = (row + 1) * step_y > shared_y or (col + 1) * step_x > shared_x
                paste(out, self._tile(level, row, col, keep), col * step_x - x_px, row * step_y - y_px)
        return out

    def _tile(self, level: int, row: int, col: int, keep: bool) -> UInt8:
        return self.cache.get((level, row, col), lambda: self._load(level, row, col), keep)

    def _load(self, level: int, row: int, col: int) -> UInt8:
        """Return the pixels of one tile, cut to the level."""
        stored = self.levels[level]
        height = min(stored.tile_height_px, stored.height_px - row * stored.tile_height_px)
        width = min(stored.tile_width_px, stored.width_px - col * stored.tile_width_px)
        try:
            return self.decode(level, row, col)[:height, :width]
        except Exception as error:  # Codecs raise what they like; it is this tile's either way.
            where = f"{self.header.path}: level {level}, tile {col} across, {row} down"
            damaged = TileError(f"{where} cannot be decoded: {error}")
            if not (self.trusts_beside and self._is_whole(level)):
                raise damaged from error
        # What is harmless after all, a byte too many, the other library may overlook.
        try:
            x, y = col * stored.tile_width_px, row * stored.tile_height_px
            return self.beside.read_level(level, x, y, width, height)
        except TileError as error:
            raise damaged from error

    def _is_whole(self, level: int) -> bool:
        downsample = self.header.levels[level].downsample
        return downsample == round(downsample) and not isinstance(self.beside, TiffReader)

    def decode(self, level: int, row: int, col: int) -> UInt8:
        """Return one tile as it is stored, uint8 (tile height, tile width, 3); raises what the codec raises."""
        stored = self.levels[level]
        k = row * stored.n_across + col
        data = self.files.read(int(stored.file[k]), int(stored.offset[k]), int(stored.n_bytes[k]))
        out = np.empty((stored.tile_height_px, stored.tile_width_px, 3), np.uint8)
        stored.codec.decode(data, out)
        return out

    def close(self) -> None:
        """Close the files."""
        self.files.close()
        self.beside.close()


def tiled_reader(beside: SlideReader, find: FindLevels) -> SlideReader:
    """Return a reader of the tiles themselves, or `beside` where the file is odd; its header says which and why."""
    try:
        reader = TiledReader(beside, *find())
    except OddFile as why:
        return _stay(beside, str(why))
    except Exception:  # Libraries raise what it likes on a damaged file, whose pixels may be whole.
        return _stay(beside, "the list of its tiles is damaged")
    if any(level.lies for level in reader.levels):
        reader.trusts_beside = False
    elif not all(_agrees(reader, level) for level in range(len(reader.levels))):
        reader.files.close()
        return _stay(beside, "its tiles are coded in an unusual way")
    return reader


def _stay(beside: SlideReader, why: str) -> SlideReader:
    beside.header = replace(beside.header, read_by=f"{beside.header.read_by}, since {why}")
    return beside


def _agrees(reader: TiledReader, level: int) -> bool:
    """Return True where a tile has the same pixels in both libraries: in the middle, or the first on blended levels."""
    stored, downsample = reader.levels[level], reader.header.levels[level].downsample
    exact = downsample == round(downsample) or isinstance(reader.beside, TiffReader)
    row, col = (stored.n_down // 2, stored.n_across // 2) if exact else (0, 0)
    x, y = col * stored.tile_width_px, row * stored.tile_height_px
    width, height = min(stored.tile_width_px, stored.width_px - x), min(stored.tile_height_px, stored.height_px - y)
    if not exact:
        # Only the first block of `OpenSlideReader` begins on a pixel of the level and is not blended.
        width, height = min(width, BLOCK_PX), min(height, BLOCK_PX)
    try:
        found = reader.decode(level, row, col)[:height, :width]
        return bool(np.array_equal(found, reader.beside.read_level(level, x, y, width, height)))
    except Exception:  # A damaged tile, just here: the other library is right by definition.
        return False


def tiff_levels(own: TiffReader) -> tuple[TiledLevel, ...]:
    """Return where the tiles of a TIFF lie, level by level. Raises OddFile."""
    if own.image.order != (0, 1, 2):
        raise OddFile("its channels are in another order")
    return tuple(_tiff_level(own, pages) for pages in own.level_pages)


def _tiff_level(own: TiffReader, pages: Sequence[Any]) -> TiledLevel:
    page = pages[0]
    if len(pages) != 1 or not page.is_tiled or page.compression not in NAMES:
        raise OddFile("it has no tiles of JPEG or JPEG 2000 in RGB")
    colours = (RGB, YCBCR) if page.compression == JPEG else (RGB,)
    shape = (page.samplesperpixel, page.planarconfig, page.imagedepth, page.tiledepth, page.fillorder)
    if page.dtype != np.uint8 or shape != (3, 1, 1, 1, 1) or page.photometric not in colours or page.extrasamples:
        raise OddFile("its tiles are not 8-bit RGB")
    offset, n_bytes = np.asarray(page.dataoffsets, np.int64), np.asarray(page.databytecounts, np.int64)
    codec = JpegCodec.of(page.jpegtables, own.is_rgb(page)) if page.compression == JPEG else Jpeg2000Codec()
    level = TiledLevel(
        int(page.imagewidth), int(page.imagelength), int(page.tilewidth), int(page.tilelength),
        np.zeros_like(offset), offset, n_bytes, codec, NAMES[page.compression], own.image.lies,
    )  # fmt: skip
    if len(offset) != level.n_across * level.n_down or len(n_bytes) != len(offset) or (n_bytes <= 0).any():
        raise OddFile("tiles are missing")
    return level
