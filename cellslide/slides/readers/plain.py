"""Images that fit into memory: PNG, JPEG, WebP and arrays."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from cellslide.errors import SlideError
from cellslide.slides.readers.base import WHITE, SlideHeader, composite, paste
from cellslide.types import Level, UInt8


class ArrayReader:
    """An image in memory as a slide of one level."""

    background = WHITE

    def __init__(self, image: UInt8, path: Path, vendor: str) -> None:
        height, width = image.shape[:2]
        self._image = image
        self.header = SlideHeader(path, vendor, width, height, (Level(width, height, 1.0),), read_by="Pillow")

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
                if image.mode.startswith(("I", "F")) or _is_deep(path, vendor):
                    raise SlideError(f"{path}: {image.mode} pixels of more than 8 bits are not 8-bit RGB; convert it")
                turned = _orientation(image)
                pixels = composite(np.asarray(image.convert("RGBA")), WHITE)
    except UnidentifiedImageError as error:
        raise SlideError(f"{path}: not a slide or image that OpenSlide, tifffile or Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise SlideError(f"{path}: too large to read whole; convert it to a tiled TIFF") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise SlideError(f"{path}: damaged or not an image: {error}") from error
    reader = ArrayReader(pixels, path, vendor)
    if turned != 1:
        note = f"its EXIF Orientation is {turned}; pixels are taken as they are stored, not turned"
        reader.header = replace(reader.header, notes=(note,))
    return reader


def _orientation(image: Image.Image) -> int:
    """Return the EXIF Orientation, 1 where it is absent or no orientation."""
    try:
        value = image.getexif().get(Base.Orientation, 1)
    except Exception:  # Pillow raises what it likes on damaged EXIF, which says nothing of pixels.
        return 1
    return value if value in range(1, 9) else 1


def _is_deep(path: Path, kind: str) -> bool:
    """Return True for a PNG of 16 bits, of which Pillow takes the upper 8, whatever range the values have."""
    if kind != "png":
        return False
    with path.open("rb") as stream:
        return stream.read(25)[24:] == b"\x10"
