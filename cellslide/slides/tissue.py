"""Where to look: the tissue that was found, a mask image, or everywhere; and only inside a region, if one is given.

Frames: masks cover the whole slide, one cell per `scale_x` by `scale_y` level-0 pixels; boxes, points and polygons are
level-0. Files for QuPath have its origin: the vendor's bounds are subtracted, unless "level0" is asked for.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
import shapely.affinity
from shapely.geometry.base import BaseGeometry

from cellslide.config import TissueConfig
from cellslide.slides.mask_image import load_mask
from cellslide.slides.missing import missing_tissue
from cellslide.slides.regions import Origin, load_roi, origin_offset, simple_polygons
from cellslide.slides.slide import Slide
from cellslide.slides.tissue_detection import detect_tissue
from cellslide.store.atomic import write_text
from cellslide.types import Bool, Float64, Int64, SlideInfo

Box = tuple[float, float, float, float]
TISSUE, TISSUE_COLOR = "Tissue", (150, 110, 60)
ARTEFACT, ARTEFACT_COLOR = "Artefact", (230, 120, 0)
GRID_PX = 0.01
# Outlines follow the cells' edges; steps of one cell are smoothed away.
SMOOTH_CELLS, SMALL_CELLS = 0.8, 25.0
# Less than this share of the slide is nothing, and as much less than all is everything.
NOTHING = 0.0005

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "cellslide/tissue")
_log = logging.getLogger(__name__)

__all__ = ["Box", "Origin", "TissueMask", "find_tissue", "load_roi", "on_grid", "origin_offset", "outline_cells",
           "write_tissue"]  # fmt: skip


@dataclass(frozen=True)
class TissueMask:
    """Where to look: `mask` (h, w) over the whole slide, and only inside `roi` where there is one."""

    mask: Bool
    scale_x: float
    scale_y: float
    width_px: int
    height_px: int
    roi: BaseGeometry | None = None

    @cached_property
    def _sums(self) -> Int64:
        sums: Int64 = np.pad(self.mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        return sums

    def hit(self, xyxy: Box) -> bool:
        """Return True where a level-0 box meets what is to be searched."""
        x0, x1 = _span(xyxy[0], xyxy[2], self.scale_x, self.mask.shape[1])
        y0, y1 = _span(xyxy[1], xyxy[3], self.scale_y, self.mask.shape[0])
        if x1 <= x0 or y1 <= y0:
            return False
        sums = self._sums
        found = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0] > 0
        return bool(found) and (self.roi is None or bool(shapely.intersects(self.roi, shapely.box(*xyxy))))

    def near(self, xyxy: Box) -> bool:
        """Return True where a level-0 box, or what lies right beside it, is to be searched."""
        x0, y0, x1, y1 = xyxy
        return self.hit((x0 - self.scale_x, y0 - self.scale_y, x1 + self.scale_x, y1 + self.scale_y))

    def share(self, xyxy: Box) -> float:
        """Return how much of a level-0 box is marked in the mask, 0..1; the region does not count."""
        x0, x1 = _span(xyxy[0], xyxy[2], self.scale_x, self.mask.shape[1])
        y0, y1 = _span(xyxy[1], xyxy[3], self.scale_y, self.mask.shape[0])
        return float(self.mask[y0:y1, x0:x1].mean()) if x1 > x0 and y1 > y0 else 0.0

    def contains(self, xy: Float64) -> Bool:
        """Return which level-0 points (N, 2) lie in what is to be searched."""
        height, width = self.mask.shape
        col, row = np.floor(xy / (self.scale_x, self.scale_y)).astype(np.int64).T
        inside: Bool = (col >= 0) & (row >= 0) & (col < width) & (row < height)
        inside[inside] = self.mask[row[inside], col[inside]]
        if self.roi is not None:
            inside &= shapely.intersects_xy(self.roi, xy[:, 0], xy[:, 1])
        return inside

    @property
    def is_empty(self) -> bool:
        """True where nothing is to be searched."""
        return not self.mask.any() or (self.roi is not None and not self.polygons())

    def searched_share(self) -> float:
        """Return which share of the slide is to be searched."""
        if self.roi is None:
            return float(self.mask.mean())
        return float(sum(p.area for p in self.polygons()) / (self.width_px * self.height_px))

    def polygons(self) -> list[shapely.Polygon]:
        """Return valid polygons on a 0.01 px grid, inside the slide, the largest first."""
        outline = shapely.box(0, 0, self.width_px, self.height_px)
        if not self.mask.all():
            traced = shapely.affinity.scale(outline_cells(self.mask), self.scale_x, self.scale_y, origin=(0, 0))
            outline = shapely.intersection(traced, outline)
        if self.roi is not None:
            outline = shapely.intersection(outline, self.roi)
        return on_grid(outline)


def _span(low: float, high: float, scale: float, size: int) -> tuple[int, int]:
    """Return the first and one past the last cell that low..high touches."""
    return max(int(np.floor(low / scale)), 0), min(int(np.ceil(high / scale)), size)


def outline_cells(mask: Bool) -> BaseGeometry:
    """Return the outline of a mask (h, w) in its own cells, holes cut out, steps of single cells smoothed.

    Traced on doubled cells, whose centres lie a quarter inside the edges; growing by that quarter gives the edges.
    """
    doubled = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    rings, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not rings:
        return shapely.MultiPolygon()
    outers: dict[int, list[Any]] = {k: [] for k, links in enumerate(hierarchy[0]) if links[3] < 0}
    for k, links in enumerate(hierarchy[0]):
        if links[3] >= 0 and len(rings[k]) > 2:
            outers[int(links[3])].append(_ring(rings[k]))
    parts = [shapely.Polygon(_ring(rings[k]), holes) for k, holes in outers.items() if len(rings[k]) > 2]
    grown = shapely.buffer(shapely.make_valid(shapely.MultiPolygon(parts)), 0.25, join_style="mitre")
    pieces = shapely.get_parts(grown)
    # A piece of a few cells has too few corners to lose any.
    smooth = [p if p.area < SMALL_CELLS else shapely.simplify(p, SMOOTH_CELLS, preserve_topology=True) for p in pieces]
    return shapely.union_all(smooth)


def _ring(contour: Any) -> Float64:
    return np.asarray((contour[:, 0].astype(np.float64) + 0.5) / 2, np.float64)


def on_grid(geometry: BaseGeometry) -> list[shapely.Polygon]:
    """Return the polygons of a geometry, valid with all vertices on the 0.01 px grid, the largest first."""
    snapped = shapely.set_precision(shapely.make_valid(geometry), GRID_PX)
    parts = [p for p in shapely.get_parts(snapped, return_index=False) for p in simple_polygons(p)]
    return sorted((p for p in parts if not p.is_empty), key=lambda p: (-p.area, p.bounds))


def find_tissue(slide: Slide, config: TissueConfig) -> TissueMask:
    """Return where to look on a slide; says so in the log where that is nowhere.

    Raises UsageError for a mask or a region that cannot be used.
    """
    info = slide.info
    roi = load_roi(config.roi, info, config.roi_origin) if config.roi else None
    if config.mask is not None:
        found = load_mask(config.mask, info)
    elif config.enabled:
        found = detect_tissue(slide, config.thumbnail_mpp, config.min_area_um2)
    else:
        found = np.ones((1, 1), np.bool_), (float(info.width_px), float(info.height_px))
    mask, (scale_x, scale_y) = found
    tissue = TissueMask(mask, scale_x, scale_y, info.width_px, info.height_px, roi)
    if tissue.is_empty:
        _log.warning("%s: no tissue found%s", info.path, "" if roi is None else " inside --roi")
    if config.mask is None and config.enabled and (gone := missing_tissue(slide, 0, tissue)):
        _log.warning("%s: %d tiles inside the tissue are missing in the file; no nuclei there", info.path, len(gone))
    if config.mask is not None or roi is not None:
        _tell_share(tissue, config)
    return tissue


def _tell_share(tissue: TissueMask, config: TissueConfig) -> None:
    """Say how much of the slide a mask or a region lets be searched: nothing and everything are rarely meant."""
    share = tissue.searched_share()
    file = config.roi if config.mask is None else config.mask
    flag = "--roi" if config.mask is None else "--tissue-mask"
    words = f"{share:.1%}".replace("%", " %")
    if share < NOTHING or (config.mask is not None and share > 1 - NOTHING):
        _log.warning("%s %s: %s of the slide is searched; is that meant?", flag, file, words)
    else:
        _log.info("%s %s: %s of the slide is searched", flag, file, words)


def write_tissue(
    tissue: TissueMask,
    path: Path,
    info: SlideInfo,
    origin: Origin = "bounds",
    artefacts: Mapping[str, BaseGeometry] | None = None,
) -> float:
    """Write the searched regions as QuPath annotations, a Feature a polygon, in one step; return their area (mm²).

    artefacts  what of them is no clean tissue, by what it is; each part becomes a Feature of its own class.
    """
    dx, dy = origin_offset(info, origin)
    polygons = [p for q in tissue.polygons() for p in on_grid(shapely.affinity.translate(q, -dx, -dy))]
    features = [_feature(polygon, number, info, TISSUE) for number, polygon in enumerate(polygons, 1)]
    for name, region in (artefacts or {}).items():
        # What lies beyond the tissue was not searched.
        inside = shapely.intersection(shapely.affinity.translate(region, -dx, -dy), shapely.union_all(polygons))
        found = enumerate(on_grid(inside), 1)
        features += [_feature(polygon, number, info, f"{ARTEFACT}: {name}") for number, polygon in found]
    write_text(path, json.dumps({"type": "FeatureCollection", "features": features}))
    return round(float(sum(polygon.area for polygon in polygons)) * info.mpp_x * info.mpp_y / 1e6, 6)


def _feature(polygon: shapely.Polygon, number: int, info: SlideInfo, name: str) -> dict[str, Any]:
    rings = [polygon.exterior, *polygon.interiors]
    coordinates = [[[round(x, 2), round(y, 2)] for x, y in ring.coords] for ring in rings]
    area_mm2 = polygon.area * info.mpp_x * info.mpp_y / 1e6
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, f"{info.slide_id}/{coordinates}")),
        "geometry": {"type": "Polygon", "coordinates": coordinates},
        "properties": {
            "objectType": "annotation",
            "name": f"{name} {number}",
            "isLocked": True,
            "classification": {"name": name, "color": list(TISSUE_COLOR if name == TISSUE else ARTEFACT_COLOR)},
            "measurements": {"area mm2": round(area_mm2, 6)},
        },
    }
