"""What was searched, from `tissue.geojson`: its outline in level-0 pixels, its area, and the box that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapely
from shapely.geometry import shape

from cellslide.errors import CellslideError
from cellslide.slides.tissue import ARTEFACT, origin_offset
from cellslide.store.foreign_files import read_json
from cellslide.types import RunRecord, SlideInfo

# Of a region that takes less than this share of the slide, the pictures show the region alone.
WHOLE_SHARE = 0.6
MARGIN = 0.04
SIMPLE_SHARE = 0.001
MOST_POLYGONS = 200

Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class SearchedRegion:
    """The regions that were searched; `mm2` is None and `polygons` empty where the file is not there.

    artefacts  what of them is no clean tissue: what it is, and its outline.
    """

    polygons: tuple[shapely.Polygon, ...]
    mm2: float | None
    info: SlideInfo
    artefacts: tuple[tuple[str, shapely.Polygon], ...] = ()

    def box(self) -> tuple[float, float, float, float]:
        """Return the level-0 box that pictures show: the slide, or what was searched where that is much less."""
        width, height = float(self.info.width_px), float(self.info.height_px)
        if not self.polygons:
            return 0.0, 0.0, width, height
        x0, y0, x1, y1 = shapely.total_bounds(list(self.polygons)).tolist()
        if (x1 - x0) * (y1 - y0) > WHOLE_SHARE * width * height:
            return 0.0, 0.0, width, height
        margin = MARGIN * max(x1 - x0, y1 - y0)
        return max(0.0, x0 - margin), max(0.0, y0 - margin), min(width, x1 + margin), min(height, y1 + margin)

    def path(self, place: Place) -> str:
        """Return the outline as an SVG path; `place` takes level-0 points into its frame."""
        x0, _, x1, _ = self.box()
        return outline(self.polygons, SIMPLE_SHARE * (x1 - x0), place)


def outline(polygons: Sequence[shapely.Polygon], tolerance: float, place: Place) -> str:
    """Return the outline of the first polygons as an SVG path, steps below `tolerance` (level-0 px) left out."""
    words = []
    for polygon in polygons[:MOST_POLYGONS]:
        simple = shapely.simplify(polygon, tolerance)
        for ring in (simple.exterior, *simple.interiors):
            points = (place(x, y) for x, y in ring.coords[:-1])
            words.append("M" + "L".join(f"{x:g},{y:g}" for x, y in points) + "Z")
    return "".join(words)


def read_searched(folder: Path, info: SlideInfo, record: RunRecord) -> SearchedRegion:
    """Return what a slide's folder says was searched; a missing or foreign file tells nothing."""
    origin = (record.config.get("output") or {}).get("geojson_origin", "bounds")
    dx, dy = origin_offset(info, origin)
    try:
        named = [(_name(f), f) for f in read_json(folder / "tissue.geojson")["features"]]
        placed = [(name, shapely.transform(shape(f["geometry"]), lambda xy: xy + (dx, dy))) for name, f in named]
        searched = [f for name, f in named if not name.startswith(ARTEFACT)]
        area = sum(float(f["properties"]["measurements"]["area mm2"]) for f in searched)
    except (
        OSError,
        CellslideError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        shapely.errors.ShapelyError,
    ):
        return SearchedRegion((), None, info)
    kept = [(name, p) for name, p in placed if isinstance(p, shapely.Polygon) and not p.is_empty]
    tissue = tuple(p for name, p in kept if not name.startswith(ARTEFACT))
    return SearchedRegion(tissue, area, info, tuple((n, p) for n, p in kept if n.startswith(ARTEFACT)))


def _name(feature: dict[str, Any]) -> str:
    return str((feature["properties"].get("classification") or {}).get("name", ""))
