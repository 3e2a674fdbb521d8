"""What all readers share: what a file says of itself, what a reader does, pixels laid on others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from cellslide.errors import SlideError
from cellslide.slides.pixel_size import PixelSize
from cellslide.types import Bool, Level, UInt8

WHITE = (255, 255, 255)
# More than any slide has.
MOST_PX = 1 << 38
# A tile is decoded whole; libraries in C end the process where there is no memory for one.
MOST_TILE_PX = 1 << 26
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True, slots=True)
class TileGaps:
    """Which tiles of a level are not in the file: bool (rows, columns); the edges of a tile in level-0 pixels."""

    is_gap: Bool
    width_px: float
    height_px: float

    def box(self, row: int, col: int) -> tuple[float, float, float, float]:
        """Return a tile's level-0 box (x0, y0, x1, y1)."""
        x, y = col * self.width_px, row * self.height_px
        return x, y, x + self.width_px, y + self.height_px

    def covers(self, box: tuple[float, float, float, float]) -> bool:
        """Return True where nothing of a level-0 box is in the file."""
        rows, cols = self.is_gap.shape
        x0, y0 = int(box[0] / self.width_px), int(box[1] / self.height_px)
        x1 = min(max(int(np.ceil((box[2] - 1) / self.width_px)), x0 + 1), cols)
        y1 = min(max(int(np.ceil((box[3] - 1) / self.height_px)), y0 + 1), rows)
        return bool(self.is_gap[y0:y1, x0:x1].all())


@dataclass(frozen=True, slots=True)
class SlideHeader:
    """What a file says of itself: level-0 size, pyramid, vendor bounds (x, y, width, height) and pixel size, if any.

    read_by       in words what reads the pixels.
    notes         what whoever opens the slide should be told, a line each.
    fluorescence  in words why the slide is no stain in transmitted light, None where it is one.
    missing       for each level the tiles that the file leaves out; empty where that is not known.
    """

    path: Path
    vendor: str
    width_px: int
    height_px: int
    levels: tuple[Level, ...]
    found: PixelSize | None = None
    objective_power: float | None = None
    bounds: tuple[int, int, int, int] | None = None
    read_by: str = ""
    notes: tuple[str, ...] = ()
    fluorescence: str | None = None
    missing: tuple[TileGaps, ...] = field(default=(), compare=False)


class SlideReader(Protocol):
    """A slide file that is open. Reads are safe from several threads."""

    header: SlideHeader
    background: tuple[int, int, int]

    def read_level(self, level: int, x_px: int, y_px: int, width_px: int, height_px: int) -> UInt8:
        """Return uint8 (height, width, 3) RGB; position and size in pixels of that level, outside is background."""

    def close(self) -> None:
        """Give the file back."""


def is_tiff(path: Path) -> bool:
    """Return whether a file begins as TIFF does; raises SlideError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) in _TIFF_MAGIC
    except OSError as error:
        raise SlideError(f"{path}: cannot be read: {error.strerror}") from error


def composite(rgba: UInt8, background: tuple[int, int, int]) -> UInt8:
    """Lay uint8 (h, w, 4) with straight alpha on a plain colour; (h, w, 3)."""
    alpha = cv2.extractChannel(rgba, 3)
    if alpha.min() == 255:
        return np.asarray(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), np.uint8)
    share = alpha[..., None].astype(np.float32) / 255
    mixed = rgba[..., :3] * share + np.asarray(background, np.float32) * (1 - share)
    return np.rint(mixed).astype(np.uint8)


def paste(out: UInt8, part: UInt8, x: int, y: int) -> None:
    """Put `part` into `out` with its corner at (x, y), which may lie outside; what does not fit is left out."""
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + part.shape[1], out.shape[1]), min(y + part.shape[0], out.shape[0])
    if x1 > x0 and y1 > y0:
        out[y0:y1, x0:x1] = part[y0 - y : y1 - y, x0 - x : x1 - x]
