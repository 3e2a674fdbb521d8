"""Open slides and read them at any pixel size: level-0 facts in `Slide.info`, pixels by `Slide.read_plane`.

Frames: a plane is the slide resampled to a model's pixel size (`types.Plane`); its pixel i covers [i, i + 1) * scale
level-0 pixels. Every plane pixel is resampled once from the best level, with weights that depend on its position
only.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from cellslide.errors import FluorescenceError, SlideError
from cellslide.slides import pixel_size as pixelsize
from cellslide.slides.readers import ArrayReader, SlideHeader, SlideReader, open_reader
from cellslide.slides.readers.levels import nominal_downsample
from cellslide.slides.resample import AxisTaps, axis_taps, resample
from cellslide.types import MppSource, Plane, SlideInfo, UInt8

MAX_READ_PX = 16 << 20
# The largest glass for whole organs is a fifth of it.
MOST_MM2 = 200_000.0
# A level this little coarser than the plane still serves: its pixels are drawn 0.1 % larger.
LEVEL_TOLERANCE = 1.001

_log = logging.getLogger(__name__)


class Slide:
    """An open slide with a known pixel size; a context manager, pickled by path and reopened, read from any thread."""

    def __init__(self, reader: SlideReader, info: SlideInfo) -> None:
        self.reader = reader
        self.info = info

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.info,)

    def close(self) -> None:
        """Close the file."""
        self.reader.close()

    @property
    def background(self) -> tuple[int, int, int]:
        """Colour of what lies outside the slide, RGB."""
        return self.reader.background

    @cached_property
    def level_scales(self) -> tuple[float, ...]:
        """Level-0 pixels per pixel of each level, as its makers meant it (see `nominal_downsample`)."""
        info = self.info
        return tuple(
            nominal_downsample((info.width_px, info.height_px), (level.width_px, level.height_px), level.downsample)
            for level in info.levels
        )

    def best_level(self, plane: Plane) -> int:
        """Return the coarsest level that is not coarser than the plane; level 0 when the plane enlarges."""
        limit = min(plane.scale_x, plane.scale_y) * LEVEL_TOLERANCE
        fits = [k for k, scale in enumerate(self.level_scales) if scale <= limit]
        return max(fits, key=lambda k: self.level_scales[k], default=0)

    def read_plane(self, plane: Plane, xyxy: tuple[int, int, int, int]) -> UInt8:
        """Return uint8 (h, w, 3) RGB of a plane box (x0, y0, x1, y1), which may leave the plane; outside is background.

        A pixel has the same value whichever box reads it. Raises TileError where the file is damaged.
        """
        level = self.best_level(plane)
        scale = self.level_scales[level]
        return self._read(level, plane.scale_x / scale, plane.scale_y / scale, xyxy)

    def _read(self, level: int, ratio_x: float, ratio_y: float, xyxy: tuple[int, int, int, int]) -> UInt8:
        x0, y0, x1, y1 = xyxy
        if x1 <= x0 or y1 <= y0:
            return np.zeros((max(y1 - y0, 0), max(x1 - x0, 0), 3), np.uint8)
        x, y = axis_taps(x0, x1, ratio_x), axis_taps(y0, y1, ratio_y)
        # Pixels that are only copied need no room beside the result.
        large = (x1 - x0) * ratio_x * (y1 - y0) * ratio_y > MAX_READ_PX and not (x.is_copy and y.is_copy)
        if large and (x1 - x0, y1 - y0) != (1, 1):
            return self._read_halves(level, ratio_x, ratio_y, xyxy)
        return resample(self._source(level, x, y), y, x)

    def _read_halves(self, level: int, ratio_x: float, ratio_y: float, xyxy: tuple[int, int, int, int]) -> UInt8:
        """Read a large box in parts, so that an overview of a slide without small levels needs little memory."""
        x0, y0, x1, y1 = xyxy
        if (x1 - x0) * ratio_x >= (y1 - y0) * ratio_y:
            middle = (x0 + x1) // 2
            boxes, axis = ((x0, y0, middle, y1), (middle, y0, x1, y1)), 1
        else:
            middle = (y0 + y1) // 2
            boxes, axis = ((x0, y0, x1, middle), (x0, middle, x1, y1)), 0
        return np.concatenate([self._read(level, ratio_x, ratio_y, box) for box in boxes], axis=axis)

    def _source(self, level: int, x: AxisTaps, y: AxisTaps) -> UInt8:
        (xa, xb), (ya, yb) = x.span, y.span
        return self.reader.read_level(level, xa, ya, xb - xa, yb - ya)

    def thumbnail(self, max_px: int) -> UInt8:
        """Return the whole slide as uint8 (h, w, 3), its longer edge at most `max_px`; it is never enlarged."""
        factor = max(1.0, max(self.info.width_px, self.info.height_px) / max_px)
        plane = thumbnail_plane(self.info, factor)
        return self.read_plane(plane, (0, 0, plane.width_px, plane.height_px))


def thumbnail_plane(info: SlideInfo, factor: float) -> Plane:
    """Return the plane that has `factor` level-0 pixels per pixel on both axes, whatever the pixel size."""
    width, height = (max(1, int(np.ceil(n / factor - 1e-6))) for n in (info.width_px, info.height_px))
    return Plane(info.mpp_x * factor, factor, factor, width, height)


def _info(header: SlideHeader, mpp: float | None, source: MppSource, slide_id: str | None) -> SlideInfo:
    mpp_x, mpp_y, chosen = pixelsize.choose(header.path, header.found, mpp, source)
    width_mm, height_mm = header.width_px * mpp_x / 1e3, header.height_px * mpp_y / 1e3
    if width_mm * height_mm > MOST_MM2:
        raise SlideError(f"{header.path}: {width_mm:.0f} x {height_mm:.0f} mm is no slide; check --mpp {mpp_x:g}")
    return SlideInfo(
        slide_id or header.path.stem,
        header.path,
        header.vendor,
        header.width_px,
        header.height_px,
        mpp_x,
        mpp_y,
        chosen,
        header.levels,
        header.objective_power,
        header.bounds,
    )


def open_slide(
    path: Path | str,
    mpp: float | None = None,
    mpp_source: Literal["flag", "list"] = "flag",
    slide_id: str | None = None,
    local: Path | None = None,
    allow_fluorescence: bool = False,
) -> Slide:
    """Open a slide: any file of OpenSlide's formats, a folder of DICOM files, OME-TIFF, TIFF, PNG, JPEG or WebP.

    `mpp` (µm/px of level 0) wins over what the file says; `local` is a copy to read from. Raises PixelSizeError if the
    pixel size is not known, FluorescenceError for a slide of fluorescence unless it is allowed, UsageError if there is
    no such file, SlideError if it cannot be read.
    """
    path = path if isinstance(path, Path) else Path(path)
    reader = open_reader(local or path)
    # What is said of the slide, errors too, names the slide and not its copy.
    reader.header = replace(reader.header, path=path)
    try:
        _tell(reader.header, allow_fluorescence)
        return Slide(reader, _info(reader.header, mpp, mpp_source, slide_id))
    except BaseException:
        reader.close()
        raise


def slide_from_array(image: UInt8, mpp: float, slide_id: str = "image") -> Slide:
    """Return an image in memory, uint8 (H, W, 3), as a slide of one level."""
    reader = ArrayReader(image, Path(slide_id), "array")
    return Slide(reader, _info(reader.header, mpp, "flag", slide_id))


def _tell(header: SlideHeader, allow_fluorescence: bool) -> None:
    """Log what was noticed when a slide was opened. Raises FluorescenceError."""
    for note in header.notes:
        _log.warning("%s: %s", header.path, note)
    if header.fluorescence is None:
        return
    if not allow_fluorescence:
        raise FluorescenceError(
            f"{header.path}: fluorescence, not H&E: {header.fluorescence}; --allow-fluorescence reads it all the same"
        )
    _log.warning("%s: read as H&E, as asked for, though %s", header.path, header.fluorescence)


def inspect_slide(path: Path | str, allow_fluorescence: bool = False) -> SlideHeader:
    """Return what the file says of itself, also when its pixel size is unknown or not believable.

    Raises FluorescenceError as `open_slide` does.
    """
    reader = open_reader(path if isinstance(path, Path) else Path(path))
    try:
        _tell(reader.header, allow_fluorescence)
        return reader.header
    finally:
        reader.close()


def _reopen(info: SlideInfo) -> Slide:
    return Slide(open_reader(info.path), info)
