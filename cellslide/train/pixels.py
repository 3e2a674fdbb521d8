"""Where training reads pixels: an image that is held, or a slide that is read box by box.

Frame: pixels of a plane at one pixel size, (x, y); boxes are half-open (x0, y0, x1, y1).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from cellslide.slides.readers import open_reader
from cellslide.slides.slide import Slide
from cellslide.types import Plane, SlideInfo, UInt8

Box = tuple[int, int, int, int]


class Pixels(Protocol):
    """Where the pixels of an image come from."""

    def read(self, box: Box) -> UInt8: ...


@dataclass(frozen=True, slots=True)
class InMemory:
    """An image that is held, uint8 (H, W, 3)."""

    image: UInt8

    def read(self, box: Box) -> UInt8:
        """Return the pixels of a box inside the image."""
        x0, y0, x1, y1 = box
        return self.image[y0:y1, x0:x1]


@dataclass(frozen=True, slots=True)
class OnSlide:
    """A part of a slide's plane, read when it is wanted; `corner` is its first pixel."""

    info: SlideInfo
    plane: Plane
    corner: tuple[int, int] = (0, 0)

    def read(self, box: Box) -> UInt8:
        """Return the pixels of a box of the part; raises TileError where the file is damaged."""
        x, y = self.corner
        return _opened(self.info, os.getpid()).read_plane(self.plane, (box[0] + x, box[1] + y, box[2] + x, box[3] + y))


@lru_cache(maxsize=16)
def _opened(info: SlideInfo, process: int) -> Slide:
    # By process, since a handle that was opened before a fork shares its place in the file with the parent's.
    return Slide(open_reader(info.path), info)
