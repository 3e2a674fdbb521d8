"""Pictures for the page: tiles of a pyramid whose levels halve, and crops around a nucleus.

Frames: tile (x, y) of level L covers 512 x 512 px of the plane that shrinks the slide by 2^(top - L); crops beyond the
slide's edge show its background. A slide that is gone gives plain tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cellslide.errors import TileError
from cellslide.slides.slide import Slide, thumbnail_plane
from cellslide.types import Float64, Plane, SlideInfo, UInt8
from cellslide.view.lru_cache import LruCache

TILE_PX = 512
QUALITY = 88
CACHE_BYTES = 64 << 20
# What stands where there is no slide, and where a tile of it cannot be read.
PLAIN, DAMAGED = (236, 236, 236), (150, 150, 150)


def top_level(info: SlideInfo) -> int:
    """Return the level that shows the slide pixel by pixel; level 0 would be a single pixel."""
    return max(1, int(np.ceil(np.log2(max(info.width_px, info.height_px)))))


class TilePictures:
    """Tiles of one slide, the last of them kept; read from several threads."""

    def __init__(self, info: SlideInfo, slide: Slide | None) -> None:
        self.info, self.slide = info, slide
        self._kept: LruCache[bytes] = LruCache(CACHE_BYTES, len)

    def tile(self, level: int, x: int, y: int) -> bytes | None:
        """Return a tile as JPEG, or None where there is none at that place."""
        top = top_level(self.info)
        if not 0 <= level <= top or x < 0 or y < 0:
            return None
        plane = thumbnail_plane(self.info, float(2 ** (top - level)))
        x0, y0 = x * TILE_PX, y * TILE_PX
        if x0 >= plane.width_px or y0 >= plane.height_px:
            return None
        box = x0, y0, min(x0 + TILE_PX, plane.width_px), min(y0 + TILE_PX, plane.height_px)
        return self._kept.get((level, x, y), lambda: as_jpeg(read(self.slide, plane, box)))


def read(slide: Slide | None, plane: Plane, box: tuple[int, int, int, int]) -> UInt8:
    """Return the pixels of a plane box, uint8 (h, w, 3); plain where there is no slide, grey where it is damaged."""
    shape = (box[3] - box[1], box[2] - box[0], 3)
    if slide is None:
        return np.full(shape, PLAIN, np.uint8)
    try:
        return slide.read_plane(plane, box)
    except TileError:
        return np.full(shape, DAMAGED, np.uint8)


def as_jpeg(pixels: UInt8) -> bytes:
    """Return RGB uint8 (h, w, 3) as JPEG whose colours are as fine as its lines."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return _encode(pixels, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, QUALITY, *sampling])


def as_png(pixels: UInt8) -> bytes:
    """Return RGB uint8 (h, w, 3) as PNG, bit for bit."""
    return _encode(pixels, ".png", [])


def _encode(pixels: UInt8, form: str, settings: list[int]) -> bytes:
    done, data = cv2.imencode(form, cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR), settings)
    if not done:
        raise TileError(f"a picture could not be written as {form}")
    return data.tobytes()


@dataclass(frozen=True, slots=True)
class CropField:
    """A square field around a nucleus: `field_px` pixels of `mpp` µm, as a path of the classifier sees it."""

    name: str
    mpp: float
    field_px: int
    most_px: int = 512

    def box(self, info: SlideInfo, xy: Float64) -> tuple[Plane, tuple[int, int, int, int]]:
        """Return the plane that the picture of the field about a level-0 point (2,) is read from, and its box there."""
        shrink = max(1.0, self.field_px / self.most_px)
        plane = Plane.of(info, self.mpp * shrink)
        size = round(self.field_px / shrink)
        x0, y0 = np.rint(plane.from_level0(xy) - size / 2).astype(int).tolist()
        return plane, (x0, y0, x0 + size, y0 + size)

    def place(self, info: SlideInfo, xy: Float64, points: Float64) -> Float64:
        """Return level-0 points (N, 2) as shares of the picture's edges, 0..1 inside."""
        plane, (x0, y0, x1, _) = self.box(info, xy)
        return (plane.from_level0(points) - (x0, y0)) / (x1 - x0)
