"""Where to look: the tissue of an H&E slide found on a thumbnail, a mask image, or everywhere; optionally inside a region.

Frames: masks cover the whole slide, one cell per `scale_x` by `scale_y` level-0 pixels; polygons and boxes are level-0.
A missed nucleus costs more than a searched piece of glass, so every doubt is decided for tissue.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import shapely
from PIL import Image
from shapely.geometry.base import BaseGeometry

from cellslide.config import TissueConfig
from cellslide.errors import UsageError
from cellslide.slide import Slide
from cellslide.types import Bool, Float32, Float64, Int64, Plane, SlideInfo, UInt8

Box = tuple[float, float, float, float]
TISSUE_COLOR = (150, 110, 60)
GRID_PX = 0.01

# Searched more finely than the mask's cells, so that a single nucleus in pale stroma or fat still shows.
FINE_AREA_MM2 = 100.0
BAND_PX = 8 << 20

# Chroma is max - min of the channels, 0..255, after glass was made neutral. Glass keeps below 3, pale stroma starts at 6.
CHROMA_RANGE = (6, 12)
PALE_CHROMA = 3.5
RELIEF = 9
SPOT_CHROMA = 30
PLAIN_GLASS = 245.0

CLOSE_UM, RIM_UM, SPOT_REACH_UM = 24.0, 24.0, 32.0
HOLE_UM2 = 60_000.0
# Pens and scanner borders are broad; dye on a cut margin and pigment are thin, and belong to the tissue.
PEN_WIDTH_UM, PEN_HALO_UM = 80.0, 48.0

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "cellslide/tissue")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TissueMask:
    """Where to look: `mask` (h, w) over the whole slide, and only inside `roi` (level-0) where there is one."""

    mask: Bool
    scale_x: float
    scale_y: float
    width_px: int
    height_px: int
    roi: BaseGeometry | None = None

    @cached_property
    def _sums(self) -> Int64:
        return np.pad(self.mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def hit(self, xyxy: Box) -> bool:
        """Return True where a level-0 box meets what is to be searched."""
        (x0, x1), (y0, y1) = self._span(xyxy[0], xyxy[2], 1), self._span(xyxy[1], xyxy[3], 0)
        if x1 <= x0 or y1 <= y0:
            return False
        sums = self._sums
        found = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0] > 0
        return bool(found) and (self.roi is None or bool(self.roi.intersects(shapely.box(*xyxy))))

    def _span(self, low: float, high: float, axis: int) -> tuple[int, int]:
        scale, size = (self.scale_x if axis else self.scale_y), self.mask.shape[axis]
        return int(np.clip(np.floor(low / scale), 0, size)), int(np.clip(np.ceil(high / scale), 0, size))

    def contains(self, xy: Float64) -> Bool:
        """Return which level-0 points (N, 2) lie in what is to be searched."""
        height, width = self.mask.shape
        col, row = (np.floor(xy / (self.scale_x, self.scale_y))).astype(np.int64).T
        inside = (col >= 0) & (row >= 0) & (col < width) & (row < height)
        inside[inside] = self.mask[row[inside], col[inside]]
        if self.roi is not None:
            inside &= shapely.intersects_xy(self.roi, xy[:, 0], xy[:, 1])
        return inside

    @property
    def area_share(self) -> float:
        """Share of the slide that the mask covers; the region of interest is not counted."""
        return float(self.mask.mean())

    def polygons(self) -> list[shapely.Polygon]:
        """Return valid polygons in level-0 pixels on a 0.01 px grid, inside the slide, the largest first."""
        outline = shapely.affinity_transform(_mask_outline(self.mask), self.scale_x, self.scale_y)
        outline = outline.intersection(shapely.box(0, 0, self.width_px, self.height_px))
        if self.roi is not None:
            outline = outline.intersection(self.roi)
        outline = shapely.set_precision(shapely.make_valid(outline), GRID_PX)
        parts = [p for p in shapely.get_parts(outline) if isinstance(p, shapely.Polygon) and not p.is_empty]
        return sorted(parts, key=lambda p: (-p.area, p.bounds))


def find_tissue(slide: Slide, config: TissueConfig) -> TissueMask:
    """Return where to look on a slide. Raises UsageError for a mask or region that cannot be used."""
    info = slide.info
    if config.mask is not None:
        mask = _load_mask(config.mask, info)
    elif config.enabled:
        mask = _detect(slide, config)
    else:
        mask = np.ones((1, 1), np.bool_)
    scale_x, scale_y = info.width_px / mask.shape[1], info.height_px / mask.shape[0]
    return TissueMask(mask, scale_x, scale_y, info.width_px, info.height_px, None)
