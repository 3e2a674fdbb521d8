"""Slides painted for tests: discs at known centres, known pixel size, written as a real pyramidal TIFF or OME-TIFF.

Frame: level-0 pixels, (x, y); pixel i covers [i, i + 1). Files are lossless, so level 0 reads back exactly as painted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tifffile

from cellslide.types import Float64, Int32, UInt8

GLASS = (243, 243, 243)
TISSUE = (225, 180, 210)
DISC = (95, 55, 140)
PINK_DISC = (180, 60, 90)
Color = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class PaintedSlide:
    """A painted slide.

    `image` uint8 (H, W, 3), `labels` int32 (H, W) with k + 1 where disc k is on top, `centres_xy` float64 (N, 2).
    """

    path: Path
    image: UInt8
    labels: Int32
    centres_xy: Float64
    radius_px: Float64
    mpp: float

    @property
    def width_px(self) -> int:
        """Width of level 0."""
        return self.image.shape[1]

    @property
    def height_px(self) -> int:
        """Height of level 0."""
        return self.image.shape[0]


def paint_slide(
    path: Path,
    width: int,
    height: int,
    mpp: float | None = 0.5,
    centres_xy: Sequence[tuple[float, float]] | Float64 = (),
    radius_px: float | Sequence[float] = 6.0,
    level_downsamples: Sequence[float] = (1, 4),
    *,
    background: Literal["plain", "tissue"] = "plain",
    tissue_xyxy: tuple[int, int, int, int] | None = None,
    disc_color: Color | Sequence[Color] = DISC,
    mpp_y: float | None = None,
    tile_px: int = 256,
    seed: int = 0,
) -> PaintedSlide:
    """Paint discs and write them to `path`: OME-TIFF with SubIFD levels if it ends in .ome.tif, else a generic pyramid.

    background   "plain" is glass; "tissue" is pink, slightly uneven, inside `tissue_xyxy` (everywhere if None).
    radius_px, disc_color   one for all discs, or one per disc.
    mpp          µm/px written to the file (`mpp_y` where y differs); None writes none.
    """
    centres = np.asarray(centres_xy, np.float64).reshape(-1, 2)
    radii = np.broadcast_to(np.asarray(radius_px, np.float64), len(centres)).copy()
    colors = np.broadcast_to(np.asarray(disc_color, np.uint8), (len(centres), 3))
    image = _background(width, height, background, tissue_xyxy, np.random.default_rng(seed))
    labels = np.zeros((height, width), np.int32)
    for k in range(len(centres)):
        _paint_disc(image, labels, k, centres[k], float(radii[k]), colors[k])
    write_pyramid(path, image, mpp, mpp_y, level_downsamples, tile_px)
    return PaintedSlide(path, image, labels, centres, radii, float("nan") if mpp is None else mpp)


def grid_centres(width: int, height: int, step_px: float, margin_px: float = 0.0) -> Float64:
    """Return centres (N, 2) on a square grid, row by row, at least `margin_px` inside the slide."""
    xs = np.arange(margin_px + step_px / 2, width - margin_px, step_px)
    ys = np.arange(margin_px + step_px / 2, height - margin_px, step_px)
    return np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)


def write_pyramid(
    path: Path,
    image: UInt8,
    mpp: float | None,
    mpp_y: float | None = None,
    level_downsamples: Sequence[float] = (1, 4),
    tile_px: int = 256,
    compression: str | None = "zlib",
) -> None:
    """Write uint8 (H, W, 3) as a tiled pyramid; levels are area means of level 0, sizes rounded down, at least 1 px."""
    levels = [image if d == 1 else shrink(image, d) for d in level_downsamples]
    common = {"photometric": "rgb", "tile": (tile_px, tile_px), "compression": compression}
    mpp_y = mpp if mpp_y is None else mpp_y
    is_ome = path.name.lower().endswith((".ome.tif", ".ome.tiff"))
    with tifffile.TiffWriter(path, ome=is_ome) as tiff:
        if is_ome:
            sizes = {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp_y, "PhysicalSizeYUnit": "µm"}
            metadata = {"axes": "YXS", **(sizes if mpp is not None else {})}
            tiff.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **common)
            for level in levels[1:]:
                tiff.write(level, subfiletype=1, **common)
            return
        where = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp_y), "resolutionunit": "CENTIMETER"}
        for k, level in enumerate(levels):
            tiff.write(level, subfiletype=int(k > 0), metadata=None, **common, **where)


def shrink(image: UInt8, downsample: float) -> UInt8:
    """Return the area mean at 1 / downsample, size rounded down but at least 1 px."""
    from PIL import Image

    height, width = image.shape[:2]
    size = max(int(width / downsample), 1), max(int(height / downsample), 1)
    box = (0, 0, min(size[0] * downsample, width), min(size[1] * downsample, height))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, box=box))


def _background(
    width: int, height: int, kind: str, tissue_xyxy: tuple[int, int, int, int] | None, rng: np.random.Generator
) -> UInt8:
    image = np.empty((height, width, 3), np.uint8)
    image[:] = GLASS
    if kind == "tissue":
        x0, y0, x1, y1 = tissue_xyxy or (0, 0, width, height)
        part = image[y0:y1, x0:x1]
        part[:] = np.asarray(TISSUE) + rng.integers(-6, 7, (*part.shape[:2], 1))
    return image


def _paint_disc(image: UInt8, labels: Int32, k: int, centre: Float64, radius: float, color: UInt8) -> None:
    """Paint every pixel whose centre lies in the disc; parts outside the slide are left out."""
    height, width = labels.shape
    x0, y0 = np.maximum(np.floor(centre - radius).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(centre + radius).astype(int) + 1, (width, height))
    if x1 <= x0 or y1 <= y0:
        return
    xs, ys = np.arange(x0, x1) + 0.5 - centre[0], np.arange(y0, y1) + 0.5 - centre[1]
    inside = xs[None, :] ** 2 + ys[:, None] ** 2 <= radius**2
    image[y0:y1, x0:x1][inside] = color
    labels[y0:y1, x0:x1][inside] = k + 1
