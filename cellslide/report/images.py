"""Pictures as small data URIs: the tissue, dots by class on a clear ground, densities in colours all can tell apart."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cellslide.types import Float32, Float64, UInt8

# After Okabe and Ito: told apart by readers of every kind of colour vision. Beyond eight, the marks differ in shape.
COLORS = (
    (230, 159, 0), (0, 114, 178), (0, 158, 115), (240, 228, 66), (86, 180, 233), (213, 94, 0), (20, 20, 20),
    (255, 255, 255),
)  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond")
NO_CLASS = (130, 130, 130)
LEVELS = 63
THUMBNAIL_PX, THUMBNAIL_QUALITY = 64, 50
# Marks are as large as leaves the tissue to be seen: radius (px) and rim by how many there are.
MARKS = ((1_500, 3, 1), (7_000, 2, 1))
SMALL_MARK = (2, 0)
# Densities are spread by this much, and by no less than this many bins.
SPREAD_UM, LEAST_SIGMA = 25.0, 1.2


def color_of(k: int, n_classes: int) -> tuple[int, int, int]:
    """Return the colour of class k; cells without a class (k = n_classes) are grey."""
    return NO_CLASS if k >= n_classes else COLORS[k % len(COLORS)]


def shape_of(k: int, n_classes: int) -> str:
    """Return the mark of class k; no two of 32 classes share both mark and colour."""
    return "cross" if k >= n_classes else SHAPES[(k + k // len(COLORS)) % len(SHAPES)]


def webp_uri(image: UInt8, quality: int) -> str:
    """Return an image uint8 (H, W, 3) as the data URI of a WebP."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def thumbnail(page: Path) -> str:
    """Return the picture of the slide on a report as the data URI of a small WebP, "" where it has none."""
    try:
        found = re.search(r'class="base" src="data:image/webp;base64,([A-Za-z0-9+/=]+)"', page.read_text("utf-8"))
        if found is None:
            return ""
        image = Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB")
    except (OSError, ValueError):
        return ""
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return webp_uri(np.asarray(image), THUMBNAIL_QUALITY)


def indexed_uri(indices: UInt8, palette: UInt8) -> str:
    """Return indices uint8 (H, W) into a palette (C, 3) as the data URI of a PNG whose index 0 is clear."""
    image = Image.fromarray(indices, mode="P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    bits = max(1, int(np.ceil(np.log2(len(palette)))))
    image.save(buffer, format="PNG", optimize=True, transparency=0, bits=1 << int(np.ceil(np.log2(bits))))
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def dots_uri(xy: Float32, size: tuple[int, int], k: int, n_classes: int, n_dots: int) -> str:
    """Return the dots of one class, (N, 2) in pixels of a picture of `size` (w, h), as marks with a rim.

    n_dots  dots of all classes: many are drawn smaller, without the rim.
    """
    radius, rim = next(((r, rim) for most, r, rim in MARKS if n_dots <= most), SMALL_MARK)
    canvas = np.zeros((size[1], size[0]), np.uint8)
    stamp = _stamp(shape_of(k, n_classes), radius)
    for x, y in np.rint(xy - 0.5).astype(int).tolist():
        _put(canvas, stamp, x, y)
    if rim:
        grown = cv2.dilate(canvas, np.ones((3, 3), np.uint8))
        canvas = np.where(canvas > 0, 2, grown).astype(np.uint8)
    else:
        canvas = (canvas * 2).astype(np.uint8)
    color = color_of(k, n_classes)
    pale = sum(color) > 380
    rim_color = (0, 0, 0) if pale else (255, 255, 255)
    return indexed_uri(canvas, np.array([(0, 0, 0), rim_color, color], np.uint8))


def _stamp(shape: str, radius: int) -> UInt8:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    inside = {
        "circle": x**2 + y**2 <= radius**2 + 1,
        "square": (abs(x) < radius) & (abs(y) < radius),
        "diamond": abs(x) + abs(y) <= radius,
        "triangle": (y < radius) & (2 * abs(x) <= y + radius + 1),
        "cross": abs(x) == abs(y),
    }[shape]
    return inside.astype(np.uint8)


def _put(canvas: UInt8, stamp: UInt8, x: int, y: int) -> None:
    r = stamp.shape[0] // 2
    height, width = canvas.shape
    x0, x1, y0, y1 = max(x - r, 0), min(x + r + 1, width), max(y - r, 0), min(y + r + 1, height)
    if x1 > x0 and y1 > y0:
        part = canvas[y0:y1, x0:x1]
        np.maximum(part, stamp[y0 - y + r : y1 - y + r, x0 - x + r : x1 - x + r], out=part)


def smoothed(grid: NDArray[Any], bin_um: float) -> Float64:
    """Return counts (rows, cols) spread over their neighbours, so that single nuclei do not look like structure."""
    sigma = max(LEAST_SIGMA, SPREAD_UM / bin_um)
    spread = cv2.GaussianBlur(grid.astype(np.float32), (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)
    return np.asarray(spread, np.float64)


def heat_uri(values: Float64, most: float) -> str:
    """Return values (rows, cols) as a PNG in cividis from 0 to `most`; what is not above 0, or no number, is clear."""
    share = np.clip(np.nan_to_num(values) / max(most, 1e-9), 0, 1)
    indices = np.where(share > 0.01, 1 + np.floor(share * (LEVELS - 1)), 0).astype(np.uint8)
    return indexed_uri(indices, palette())


def palette() -> UInt8:
    """Return the colours (LEVELS + 1, 3) of heat_uri, the clear one first."""
    ramp = np.linspace(0, 255, LEVELS).astype(np.uint8)[:, None]
    colors = np.asarray(cv2.applyColorMap(ramp, cv2.COLORMAP_CIVIDIS))[:, 0, ::-1]
    return np.concatenate([np.zeros((1, 3), np.uint8), colors])
