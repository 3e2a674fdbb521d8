"""Records of a slide, its planes and their tiles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cellslide.types.arrays import Float64

MppSource = Literal["flag", "list", "vendor", "ome", "tiff"]


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the pyramid: size in its own pixels, `downsample` relative to level 0."""

    width_px: int
    height_px: int
    downsample: float


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """What a slide is: level-0 size in pixels, pixel size in µm, pyramid and vendor bounds (x, y, width, height)."""

    slide_id: str
    path: Path
    vendor: str
    width_px: int
    height_px: int
    mpp_x: float
    mpp_y: float
    mpp_source: MppSource
    levels: tuple[Level, ...]
    objective_power: float | None = None
    bounds: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Plane:
    """The slide resampled to `mpp`; `scale_x`, `scale_y` are level-0 pixels per plane pixel."""

    mpp: float
    scale_x: float
    scale_y: float
    width_px: int
    height_px: int

    @classmethod
    def of(cls, info: SlideInfo, mpp: float) -> Plane:
        """Return the plane of `info` at `mpp` µm/px; it covers the slide, so its size is rounded up."""
        scale_x, scale_y = mpp / info.mpp_x, mpp / info.mpp_y
        # A pixel size that differs from the model's by rounding in the header must not resample the slide.
        scale_x = 1.0 if abs(scale_x - 1.0) < 0.01 else scale_x
        scale_y = 1.0 if abs(scale_y - 1.0) < 0.01 else scale_y
        width, height = (int(np.ceil(n / s - 1e-6)) for n, s in ((info.width_px, scale_x), (info.height_px, scale_y)))
        return cls(mpp, scale_x, scale_y, max(width, 1), max(height, 1))

    def to_level0(self, xy: NDArray[Any]) -> Float64:
        """Convert plane points (N, 2) to level-0 pixels."""
        return np.asarray(xy, np.float64) * (self.scale_x, self.scale_y)

    def from_level0(self, xy: NDArray[Any]) -> Float64:
        """Convert level-0 points (N, 2) to plane pixels."""
        return np.asarray(xy, np.float64) / (self.scale_x, self.scale_y)


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile of the plane: it reads `read_xyxy` (may leave the plane) and owns `own_xyxy`; own boxes partition it.

    `index` counts over the whole grid, row by row, also over tiles that are skipped: it names a place.
    """

    index: int
    row: int
    col: int
    read_xyxy: tuple[int, int, int, int]
    own_xyxy: tuple[int, int, int, int]

    @property
    def size_px(self) -> int:
        """Edge of the square read box in plane pixels."""
        return self.read_xyxy[2] - self.read_xyxy[0]

    def to_plane(self, xy: NDArray[Any]) -> Float64:
        """Convert tile points (N, 2) to plane pixels."""
        return np.asarray(xy, np.float64) + (self.read_xyxy[0], self.read_xyxy[1])
