"""What opens a slide file: OpenSlide, then tifffile for OME-TIFF and big TIFF, then Pillow, all behind `SlideReader`.

A reader knows levels and pixels; it resamples nothing and decides nothing about pixel size.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import openslide
import tifffile
from PIL import Image, UnidentifiedImageError

from cellslide.errors import SlideError, TileError, UsageError
from cellslide.pixelsize import PixelSize, from_ome, from_openslide, from_tiff
from cellslide.types import Level, UInt8

WHITE = (255, 255, 255)
BLOCK_PX = 256
# More than any slide has, and in a TIFF more than any codec packs into so few bytes.
MOST_PX = 1 << 38
SMALL_PX, MOST_PX_PER_BYTE = 1 << 30, 1_000_000
# A tile or strip is decoded whole; libraries in C end the process where there is no memory for one.
MOST_TILE_PX, MOST_STRIP_PX = 1 << 26, 1 << 28
PAGES_CHECKED = 64
SEGMENT_CACHE_BYTES = 128 << 20
OPENSLIDE_CACHE_BYTES = (32 << 20, 256 << 20)
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True, slots=True)
class SlideHeader:
    """What a file says of itself: level-0 size, pyramid, vendor bounds (x, y, width, height) and pixel size, if any."""

    path: Path
    vendor: str
    width_px: int
    height_px: int
    levels: tuple[Level, ...]
    found: PixelSize | None = None
    objective_power: float | None = None
    bounds: tuple[int, int, int, int] | None = None


class SlideReader(Protocol):
    """A slide file that is open. Reads are safe from several threads."""

    header: SlideHeader
    background: tuple[int, int, int]

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB; position and size in pixels of that level, outside is background."""

    def close(self) -> None:
        """Give the file back."""


def open_reader(path: Path) -> SlideReader:
    """Open a slide file, or a folder of DICOM files, with the first library that knows it.

    Raises UsageError if it is not there, SlideError if no library can read it.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    file = _first_dicom(path) if path.is_dir() else path
    if _is_tiff(file):
        _check_tiles(file)
    reader = _open_known(path, file)
    try:
        _check_size(reader.header, file)
    except SlideError:
        reader.close()
        raise
    return reader


def _open_known(path: Path, file: Path) -> SlideReader:
    if _is_ome(file):
        # OpenSlide takes tiled OME-TIFF for plain TIFF, without its levels and pixel size.
        return TiffReader(path)
    vendor = openslide.OpenSlide.detect_format(file)
    if vendor is not None:
        try:
            return OpenSlideReader(path, file)
        except SlideError:
            # Plain TIFF with a codec that OpenSlide lacks (WebP, Zstandard); vendors' own files are not second-guessed.
            if vendor != "generic-tiff":
                raise
    return TiffReader(path) if _is_tiff(file) else pillow_reader(path)


def _first_dicom(folder: Path) -> Path:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    for file in files:
        if openslide.OpenSlide.detect_format(file) == "dicom":
            return file
    raise SlideError(f"{folder}: no DICOM slide in this folder; give the slide file")


def _is_tiff(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(4) in _TIFF_MAGIC
    except OSError as error:
        raise SlideError(f"{path}: cannot be read: {error.strerror}") from error


def _check_tiles(path: Path) -> None:
    """Raise SlideError for a TIFF whose tiles do not fit into memory, before a library in C asks for it."""
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page for _, page in zip(range(PAGES_CHECKED), tiff.pages, strict=False)]
            tiles = [(int(p.tilewidth), int(p.tilelength)) for p in pages if isinstance(p, tifffile.TiffPage)]
    except Exception:  # What is damaged is told when it is opened; tifffile raises what it likes.
        return
    width, height = max(tiles, key=lambda tile: tile[0] * tile[1], default=(0, 0))
    if width * height > MOST_TILE_PX:
        raise SlideError(f"{path}: tiles of {width} x {height} px do not fit into memory; convert it to smaller tiles")


def _check_size(header: SlideHeader, file: Path) -> None:
    """Raise SlideError for a size that no slide has, or that the bytes of a TIFF cannot hold."""
    pixels, size = header.width_px * header.height_px, file.stat().st_size
    bomb = pixels > SMALL_PX and pixels > size * MOST_PX_PER_BYTE and _is_tiff(file)
    if bomb or pixels > MOST_PX or pixels <= 0:
        raise SlideError(
            f"{header.path}: {header.width_px} x {header.height_px} px in {size:,} bytes is no slide; is it damaged?"
        )


def _is_ome(path: Path) -> bool:
    if not _is_tiff(path):
        return False
    try:
        with tifffile.TiffFile(path) as tiff:
            return bool(tiff.is_ome)
    except Exception:  # tifffile raises what it likes on a damaged file.
        return False


def composite(rgba: UInt8, background: tuple[int, int, int]) -> UInt8:
    """Lay uint8 (h, w, 4) with straight alpha on a plain colour; (h, w, 3)."""
    alpha = cv2.extractChannel(rgba, 3)
    if alpha.min() == 255:
        return np.asarray(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), np.uint8)
    share = alpha[..., None].astype(np.float32) / 255
    mixed = rgba[..., :3] * share + np.asarray(background, np.float32) * (1 - share)
    return np.rint(mixed).astype(np.uint8)


class OpenSlideReader:
    """A slide that OpenSlide reads: `path` is what was asked for, `file` what is opened (one of a DICOM folder)."""

    def __init__(self, path: Path, file: Path) -> None:
        self._file = file
        try:
            self._handle = openslide.OpenSlide(file)
            properties = dict(self._handle.properties)
            self.background = _background(properties)
            self.header = _openslide_header(path, file, self._handle, properties)
        except (openslide.OpenSlideError, OSError, ValueError) as error:
            raise SlideError(f"{path}: OpenSlide cannot open it: {error}") from error
        # Room for about one row of tiles: neighbours in the row below need the rows where tiles overlap again.
        low, high = OPENSLIDE_CACHE_BYTES
        self._handle.set_cache(openslide.OpenSlideCache(min(max(5 * 256 * 4 * self.header.width_px, low), high)))

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB of a level. Raises TileError if the file is damaged there."""
        downsample = self.header.levels[level].downsample
        if downsample == round(downsample):
            where = x_px * round(downsample), y_px * round(downsample)
            return self._read(where, level, (width_px, height_px))
        # OpenSlide takes positions as whole level-0 pixels and blends level pixels where these do not divide. On a
        # fixed grid of blocks each pixel is blended in one way only, whichever box asks for it.
        out = np.empty((height_px, width_px, 3), np.uint8)
        for y in range(y_px // BLOCK_PX * BLOCK_PX, y_px + height_px, BLOCK_PX):
            for x in range(x_px // BLOCK_PX * BLOCK_PX, x_px + width_px, BLOCK_PX):
                block = self._read((round(x * downsample), round(y * downsample)), level, (BLOCK_PX, BLOCK_PX))
                paste(out, block, x - x_px, y - y_px)
        return out

    def _read(self, where: tuple[int, int], level: int, size: tuple[int, int]) -> UInt8:
        try:
            return self._region(self._handle, where, level, size)
        except openslide.OpenSlideError:
            # A handle that failed once refuses everything after, so one bad tile would lose the slide: get a fresh one.
            # The old one is left to its other users. Another thread may have caused this, hence the second try.
            self._handle = openslide.OpenSlide(self._file)
        try:
            with openslide.OpenSlide(self._file) as fresh:
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


def _openslide_header(
    path: Path, file: Path, handle: openslide.OpenSlide, properties: Mapping[str, str]
) -> SlideHeader:
    sizes = zip(handle.level_dimensions, handle.level_downsamples, strict=True)
    levels = tuple(Level(w, h, float(d)) for (w, h), d in sizes)
    bounds = [properties.get(f"openslide.bounds-{name}") for name in ("x", "y", "width", "height")]
    power = properties.get("openslide.objective-power")
    return SlideHeader(
        path,
        properties.get("openslide.vendor", "unknown"),
        levels[0].width_px,
        levels[0].height_px,
        levels,
        from_openslide(properties) or _tiff_size(file),
        float(power) if power else None,
        (int(bounds[0]), int(bounds[1]), int(bounds[2]), int(bounds[3])) if None not in bounds else None,  # type: ignore[arg-type]
    )


def _tiff_size(file: Path) -> PixelSize | None:
    if not _is_tiff(file):
        return None
    try:
        with tifffile.TiffFile(file) as tiff:
            return _resolution(tiff)
    except Exception:  # tifffile raises what it likes on a damaged file.
        return None


def _resolution(tiff: Any) -> PixelSize | None:
    tags = {tag.name: tag.value for tag in tiff.pages[0].tags.values()}
    return from_tiff(tags, tiff.imagej_metadata)


def paste(out: UInt8, part: UInt8, x: int, y: int) -> None:
    """Put `part` into `out` with its corner at (x, y), which may lie outside; what does not fit is left out."""
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + part.shape[1], out.shape[1]), min(y + part.shape[0], out.shape[0])
    if x1 > x0 and y1 > y0:
        out[y0:y1, x0:x1] = part[y0 - y : y1 - y, x0 - x : x1 - x]


class TiffReader:
    """A TIFF read through tifffile, segment by segment: OME-TIFF with SubIFD levels, big TIFF, tiles or strips."""

    background = WHITE

    def __init__(self, path: Path) -> None:
        try:
            self._tiff = tifffile.TiffFile(path)
            series = max(self._tiff.series, key=lambda s: float(np.prod(s.shape)))
            self._levels = [_planes(path, level) for level in series.levels]
            self.header = _tiff_header(path, self._tiff, [pages[0] for pages in self._levels])
        except SlideError:
            raise
        except Exception as error:  # tifffile raises what it likes on a damaged file.
            raise SlideError(f"{path}: tifffile cannot open it: {error}") from error
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int, int], UInt8] = OrderedDict()
        self._cached_bytes = 0

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB of a level. Raises TileError if the file is damaged there."""
        out = np.empty((height_px, width_px, 3), np.uint8)
        out[:] = self.background
        frame = self._levels[level][0].keyframe
        step_y, step_x = _segment_shape(frame)
        ys = range(max(y_px, 0) // step_y, -(-min(y_px + height_px, frame.imagelength) // step_y))
        xs = range(max(x_px, 0) // step_x, -(-min(x_px + width_px, frame.imagewidth) // step_x))
        across = -(-frame.imagewidth // step_x)
        for row in ys:
            for col in xs:
                segment = self._segment(level, row * across + col, row, col)
                paste(out, segment, col * step_x - x_px, row * step_y - y_px)
        return out

    def _segment(self, level: int, index: int, row: int, col: int) -> UInt8:
        """Return the RGB pixels of one tile or strip, cut to the image."""
        key = (level, row, col)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        pages = self._levels[level]
        frame = pages[0].keyframe
        (step_y, step_x), separate = _segment_shape(frame), frame.planarconfig == 2 and frame.samplesperpixel > 1
        total = -(-frame.imagelength // step_y) * -(-frame.imagewidth // step_x)
        where = [(page, index + k * total) for page in pages for k in range(frame.samplesperpixel if separate else 1)]
        height, width = min(step_y, frame.imagelength - row * step_y), min(step_x, frame.imagewidth - col * step_x)
        parts = [self._decode(page, i, height, width) for page, i in where]
        pixels = _as_rgb(np.concatenate(parts, axis=-1), frame, self.background)
        self._remember(key, pixels)
        return pixels

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

    def _remember(self, key: tuple[int, int, int], pixels: UInt8) -> None:
        with self._lock:
            if key not in self._cache:
                self._cached_bytes += pixels.nbytes
            self._cache[key] = pixels
            while self._cached_bytes > SEGMENT_CACHE_BYTES and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes

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
    return SlideHeader(path, vendor, width, height, levels, found or _resolution(tiff))


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


class ArrayReader:
    """An image in memory as a slide of one level."""

    background = WHITE

    def __init__(self, image: UInt8, path: Path, vendor: str) -> None:
        height, width = image.shape[:2]
        self._image = image
        self.header = SlideHeader(path, vendor, width, height, (Level(width, height, 1.0),))

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB; the only level is 0."""
        out = np.empty((height_px, width_px, 3), np.uint8)
        out[:] = self.background
        paste(out, self._image, -x_px, -y_px)
        return out

    def close(self) -> None:
        """Nothing is open."""


def pillow_reader(path: Path) -> ArrayReader:
    """Read a PNG, JPEG, WebP or other plain image whole.

    Raises SlideError for what Pillow cannot read or what is too large for it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                vendor = (image.format or "image").lower()
                if image.mode.startswith(("I", "F")):
                    raise SlideError(f"{path}: {image.mode} pixels are not 8-bit RGB; convert it")
                pixels = composite(np.asarray(image.convert("RGBA")), WHITE)
    except UnidentifiedImageError as error:
        raise SlideError(f"{path}: not a slide or image that OpenSlide, tifffile or Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise SlideError(f"{path}: too large to read whole; convert it to a tiled TIFF") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise SlideError(f"{path}: damaged or not an image: {error}") from error
    return ArrayReader(pixels, path, vendor)
