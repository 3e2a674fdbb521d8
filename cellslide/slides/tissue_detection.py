"""Find the tissue of an H&E slide on an overview, without a model.

Colour, relief and single nuclei are looked at, each on its own: dense tissue is coloured, pale stroma has fibres, and
fat shows only its nuclei. Glass is plain. A missed nucleus costs more than a searched piece of glass, so
doubt is tissue.

Units: chroma is max - min of the channels, 0..255, after the glass was made neutral.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cellslide.slides.slide import Slide
from cellslide.types import Bool, Float32, Plane, SlideInfo, UInt8

# Searched more finely than the mask's cells, so that a single nucleus in pale stroma or fat still shows.
FINE_AREA_MM2 = 100.0
BAND_PX = 8 << 20
FEWEST_CELLS = 256

# Glass stays below 3, pale stroma starts at 6; Otsu's threshold is taken between these.
CHROMA_RANGE = (6.0, 12.0)
PALE_CHROMA, RELIEF, SPOT_CHROMA = 3.5, 9, 34
GLASS_CHROMA, GLASS_RELIEF, GLASS_LEVEL, GLASS_SHARE = 14, 4, 150, 0.01
NEUTRAL = 245.0

CLOSE_UM, RIM_UM, SPOT_REACH_UM, DENSE_UM = 24.0, 16.0, 20.0, 12.0
HOLE_UM2 = 60_000.0
FIELD_SHARE = 0.005
# Pens and scanner borders are broad; dye on a cut margin and pigment are thin, and belong to the tissue.
PEN_WIDTH_UM, PEN_HALO_UM = 80.0, 40.0


@dataclass(frozen=True, slots=True)
class Overview:
    """The slide in cells of `um` µm and `scale` level-0 pixels (x, y): mean colour, and what is in each cell.

    rgb uint8 (h, w, 3); spot uint8 (h, w), the largest chroma in a cell; relief uint8 (h, w), its brightness range.
    """

    rgb: UInt8
    spot: UInt8
    relief: UInt8
    um: float
    scale: tuple[float, float]


def detect_tissue(slide: Slide, cell_um: float, min_area_um2: float) -> tuple[Bool, tuple[float, float]]:
    """Return a mask (h, w) over the whole slide and the level-0 pixels per cell in x and y.

    Cells are `cell_um` µm wide, smaller on small fields; pieces below `min_area_um2`, smaller too, are left out.
    """
    view = overview(slide, cell_um)
    area_um2 = slide.info.width_px * slide.info.mpp_x * slide.info.height_px * slide.info.mpp_y
    return tissue_cells(view, min(min_area_um2, FIELD_SHARE * area_um2)), view.scale


def overview(slide: Slide, cell_um: float) -> Overview:
    """Read the slide in bands, two to four pixels per cell and axis, and keep what the cells need."""
    fine, per_cell = _fine_plane(slide.info, cell_um)
    cols = -(-fine.width_px // per_cell)
    step = max(1, BAND_PX // (cols * per_cell * per_cell))
    rows = -(-fine.height_px // per_cell)
    bands = []
    for row in range(0, rows, step):
        last = min(row + step, rows)
        box = (0, row * per_cell, cols * per_cell, last * per_cell)
        bands.append(_cells(slide.read_plane(fine, box), per_cell))
    rgb, spot, relief = (np.concatenate(parts) for parts in zip(*bands, strict=True))
    return Overview(rgb, spot, relief, fine.mpp * per_cell, (fine.scale_x * per_cell, fine.scale_y * per_cell))


def _fine_plane(info: SlideInfo, cell_um: float) -> tuple[Plane, int]:
    """Return the plane to read and how many of its pixels make a cell."""
    width_um, height_um = info.width_px * info.mpp_x, info.height_px * info.mpp_y
    cell_um = min(cell_um, max(2.0, max(width_um, height_um) / FEWEST_CELLS))
    wanted = cell_um / (4 if width_um * height_um <= FINE_AREA_MM2 * 1e6 else 2)
    fine_um = max(wanted, info.mpp_x, info.mpp_y)
    return Plane.of(info, fine_um), max(1, round(cell_um / fine_um))


def _cells(image: UInt8, n: int) -> tuple[UInt8, UInt8, UInt8]:
    """Return mean colour, largest chroma and brightness range of n x n blocks of uint8 (h, w, 3)."""
    height, width = image.shape[0] // n, image.shape[1] // n
    rgb = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8).reshape(height, n, width, n)
    spot = chroma(image).reshape(height, n, width, n).max(axis=(1, 3))
    return rgb.reshape(height, width, 3), spot, grey.max(axis=(1, 3)) - grey.min(axis=(1, 3))


def chroma(image: UInt8) -> UInt8:
    """Return max - min of the channels of uint8 (h, w, 3)."""
    red, green, blue = cv2.split(image)
    high, low = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    return np.asarray(cv2.subtract(high, low), np.uint8)


def tissue_cells(view: Overview, min_area_um2: float) -> Bool:
    """Return which cells of an overview are tissue, holes filled and rims included."""
    glass = glass_colour(view)
    neutral = neutralise(view.rgb, glass)
    ink = ink_cells(view.rgb, neutral, view.um)
    colour = np.asarray(cv2.GaussianBlur(neutral, (0, 0), max(0.5, 4.0 / view.um)), np.uint8)
    stained = _stained(colour, view) & (view.rgb.min(axis=2) < 253) & ~ink
    closed = _close(stained, CLOSE_UM / view.um) & ~ink
    kept = _drop_small(closed, min_area_um2 / view.um**2)
    filled = _fill_holes(kept, HOLE_UM2 / view.um**2) & ~ink
    return _grow(filled, RIM_UM / view.um)


def glass_colour(view: Overview) -> Float32:
    """Return the colour of empty glass (3,): what is bright, pale and plain, unscanned white aside; else near white.

    Plainness matters: a field that is pale stroma from edge to edge must not be taken for glass.
    """
    flat = (view.relief <= GLASS_RELIEF) & (chroma(view.rgb) < GLASS_CHROMA) & (view.rgb.min(axis=2) > GLASS_LEVEL)
    scanned = flat & (view.rgb.min(axis=2) < 254)
    if scanned.sum() < GLASS_SHARE * scanned.size:
        return np.full(3, NEUTRAL, np.float32)
    candidates = view.rgb[scanned]
    level = candidates.mean(axis=1).astype(np.int64)
    mode = np.bincount(level).argmax()
    return np.asarray(np.median(candidates[np.abs(level - mode) <= 3], axis=0), np.float32)


def neutralise(rgb: UInt8, glass: Float32) -> UInt8:
    """Scale the channels so that glass becomes grey; brighter than glass stays neutral."""
    scaled = np.minimum(rgb / glass, 1.0) * NEUTRAL
    return np.rint(scaled).astype(np.uint8)


def _stained(colour: UInt8, view: Overview) -> Bool:
    """Return the cells that have colour, or fibres with a hint of it, or a nucleus near by."""
    strength = chroma(colour)
    otsu, _ = cv2.threshold(strength, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    coloured = strength > float(np.clip(otsu, *CHROMA_RANGE))
    pale = (strength > PALE_CHROMA) & (cv2.blur(view.relief, (3, 3)) > RELIEF)
    # Nuclei of dense tissue need no reach: it would only widen the rim.
    dense = _grow(_open(coloured, DENSE_UM / view.um), DENSE_UM / view.um)
    near = _grow((view.spot > SPOT_CHROMA) & ~dense, SPOT_REACH_UM / view.um)
    return np.asarray(coloured | pale | near, np.bool_)


def ink_cells(rgb: UInt8, neutral: UInt8, um: float) -> Bool:
    """Return cells under broad blue, green or black marks: pen strokes, and the black around a scan.

    In H&E green is the weakest channel and red is above it; pens turn that round. Thin marks are kept as tissue.
    """
    red, green, blue = (neutral[..., k].astype(np.int16) for k in range(3))
    blueish = (blue - red > 40) & (red < green + 4)
    greenish = (green - red > 20) & (green > blue - 12)
    black = (rgb.max(axis=2) < 80) & (chroma(rgb) < 32)
    marks = blueish | greenish | black
    broad = _open(marks, PEN_WIDTH_UM / um / 2)
    # The soft rim of a mark: its colour, or too little colour of its own to be tissue.
    rim = _grow(broad, PEN_HALO_UM / um) & (marks | (red - green < 12))
    return np.asarray(broad | rim, np.bool_)


def _disc(radius: float) -> UInt8:
    size = max(round(radius), 0) * 2 + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)), np.uint8)


def _grow(mask: Bool, radius: float) -> Bool:
    return np.asarray(cv2.dilate(mask.astype(np.uint8), _disc(radius)) > 0, np.bool_)


def _open(mask: Bool, radius: float) -> Bool:
    return np.asarray(cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, _disc(radius)) > 0, np.bool_)


def _close(mask: Bool, radius: float) -> Bool:
    """Close gaps; the border is padded, since closing at an edge would else open it."""
    pad = round(radius) + 1
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, _disc(radius))
    return np.asarray(closed[pad:-pad, pad:-pad] > 0, np.bool_)


def _drop_small(mask: Bool, min_cells: float) -> Bool:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_cells
    keep[0] = False
    return np.asarray(keep[labels], np.bool_)


def _fill_holes(mask: Bool, max_cells: float) -> Bool:
    """Fill holes up to a size; what touches the border is no hole."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    height, width = mask.shape
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    enclosed = (left > 0) & (top > 0) & (right < width) & (bottom < height)
    fill = enclosed & (stats[:, cv2.CC_STAT_AREA] <= max_cells)
    fill[0] = False
    return np.asarray(mask | fill[labels], np.bool_)
