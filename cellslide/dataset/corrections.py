"""Corrections of one slide: regions that were checked as a whole, and the nuclei that are true in them.

A file of GeoJSON is one of two: all nuclei as they are now, which QuPath exports, or changes to the slide's table, each
detection with a property `correction` (deleted, moved, retyped, added). Frame: level-0 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from cellslide.errors import UsageError, short
from cellslide.slides.regions import DETECTIONS, Origin, class_words, kind_of, load_objects, origin_offset
from cellslide.store.cell_table import CellTable
from cellslide.store.table_schema import ABSTAINED, NOT_NUCLEUS
from cellslide.store.table_writer import NUCLEUS
from cellslide.types import Float64, Int64, SlideInfo

CHECKED = "checked"
CHANGES = ("deleted", "moved", "retyped", "added")
NUCLEI = DETECTIONS - {"tile"}
# No nucleus reaches farther from its centroid; so far beside a region are nuclei looked for that its edge cuts.
REACH_UM = 50.0


@dataclass(frozen=True, slots=True)
class Nucleus:
    """One nucleus: its place, its outline where it has one, and the name of its class, "" for none."""

    xy: tuple[float, float]
    outline: shapely.Polygon | None
    name: str


@dataclass(frozen=True, slots=True)
class Change:
    """One change to the nucleus `uuid` of a table."""

    what: str
    uuid: str
    nucleus: Nucleus | None


@dataclass(frozen=True, slots=True)
class Checked:
    """The regions that were checked, and all nuclei that are true in them, with those that reach in from beside.

    beside  changes to nuclei that lie in no checked region, before and after: they are not used.
    """

    region: BaseGeometry
    nuclei: tuple[Nucleus, ...]
    beside: int


def read_corrections(path: Path, table: CellTable, origin: Origin = "bounds", checked: str = CHECKED) -> Checked:
    """Read a file of corrections; changes are applied to the nuclei of `table`.

    checked  class, or name, of the annotations that say which regions were checked.
    Raises UsageError for a file without such a region, a region beside the slide, regions that overlap, changes to
    nuclei that are not in the table, and two changes to one nucleus.
    """
    objects = [(shapely.affinity.translate(_shape(g, path), *origin_offset(table.slide, origin)), h)
               for g, h in load_objects(path, "--corrections")]  # fmt: skip
    region = _region([(g, h) for g, h in objects if kind_of(h) not in DETECTIONS], path, checked, table.slide)
    marked = [(g, h) for g, h in objects if kind_of(h) in NUCLEI]
    changes = [found for g, h in marked if (found := _change(g, h, path)) is not None]
    if changes and len(changes) < len(marked):
        raise UsageError(
            f"--corrections {path}: {len(marked) - len(changes)} of {len(marked)} nuclei have no `correction`; "
            "give all nuclei, or changes alone"
        )
    shapely.prepare(region)
    if marked and not changes:
        return Checked(region, tuple(n for g, h in marked if _reaches(n := _nucleus(g, h), region)), 0)
    now, beside = _changed(table, region, changes, path)
    return Checked(region, tuple(n for n in now if _reaches(n, region)), beside)


def _reaches(nucleus: Nucleus, region: BaseGeometry) -> bool:
    """Tell whether a nucleus lies in a region, or reaches into it: what its edge cuts is no background."""
    outline = nucleus.outline
    return bool(shapely.intersects_xy(region, *nucleus.xy)) or (outline is not None and region.intersects(outline))


def _shape(geometry: dict[str, Any], path: Path) -> BaseGeometry:
    try:
        return shapely.geometry.shape(geometry)
    except (ValueError, TypeError, KeyError, AttributeError, shapely.errors.ShapelyError) as error:
        raise UsageError(f"--corrections {path}: a geometry that is none ({short(error)})") from error


def _region(
    found: Sequence[tuple[BaseGeometry, dict[str, Any]]], path: Path, checked: str, info: SlideInfo
) -> BaseGeometry:
    wanted = checked.strip().lower()
    names = [{*(word.lower() for word in class_words(h)), _name(h).lower()} for _, h in found]
    regions = [
        shapely.make_valid(g) for (g, _), words in zip(found, names, strict=True) if wanted in words and g.area > 0
    ]
    if not regions:
        others = sorted({word for words in names for word in words if word})
        more = f"; its annotations are {', '.join(others[:6])}" if others else ""
        raise UsageError(
            f"--corrections {path}: no annotation of the class {checked!r}{more}; draw around what you have checked as "
            "a whole, or name another class by --checked"
        )
    slide = shapely.box(0, 0, info.width_px, info.height_px)
    for region in regions:
        if shapely.intersection(region, slide).area <= 0:
            raise UsageError(
                f"--corrections {path}: the checked region at {_place(region)} lies beside the slide, which has "
                f"{info.width_px} x {info.height_px} px; check --geojson-origin"
            )
    for a, b in shapely.STRtree(regions).query(regions, predicate="intersects").T:
        # Neighbours that were drawn by hand may share an edge to within a pixel.
        if a < b and (common := shapely.intersection(regions[a], regions[b])).buffer(-0.5).area > 0:
            raise UsageError(
                f"--corrections {path}: two checked regions overlap at {_place(common)}; merge them into one, or "
                "delete one"
            )
    return shapely.intersection(shapely.union_all(regions), slide)


def _place(geometry: BaseGeometry) -> str:
    x0, y0, x1, y1 = (f"{v:.0f}" for v in geometry.bounds)
    return f"x {x0} to {x1}, y {y0} to {y1} px of level 0"


def _name(holder: dict[str, Any]) -> str:
    properties = holder.get("properties")
    name = properties.get("name") if isinstance(properties, dict) else None
    return name.strip() if isinstance(name, str) else ""


def _change(geometry: BaseGeometry, holder: dict[str, Any], path: Path) -> Change | None:
    properties = holder.get("properties")
    what = properties.get("correction") if isinstance(properties, dict) else None
    if what is None:
        return None
    if what not in CHANGES:
        raise UsageError(f"--corrections {path}: correction {short(what)} must be one of {', '.join(CHANGES)}")
    uuid = str(holder.get("id") or "")
    if not uuid and what != "added":
        raise UsageError(f"--corrections {path}: a nucleus that is {what} has no id")
    return Change(what, uuid, None if what == "deleted" else _nucleus(geometry, holder))


def _nucleus(geometry: BaseGeometry, holder: dict[str, Any]) -> Nucleus:
    middle = geometry.centroid
    polygons = [p for p in shapely.get_parts(geometry) if isinstance(p, shapely.Polygon) and p.area > 0]
    return Nucleus(
        (float(middle.x), float(middle.y)), max(polygons, key=lambda p: p.area, default=None),
        _plain(": ".join(class_words(holder))),
    )  # fmt: skip


def _plain(name: str) -> str:
    """Return a class as data sets name it, "" for the words that stand for none."""
    return "" if name in (ABSTAINED, NUCLEUS.name) else name


def _changed(
    table: CellTable, region: BaseGeometry, changes: Sequence[Change], path: Path
) -> tuple[list[Nucleus], int]:
    """Return the nuclei of a table near a region with the changes, and how many changes lie in no region.

    Rejected objects are left out save where they were given a class. A nucleus may be moved into the region from beside
    it, so changed ones are looked for everywhere.
    """
    by_uuid = {change.uuid: change for change in changes if change.what != "added"}
    known = [change.uuid for change in changes if change.what != "added"]
    if twice := sorted({uuid for uuid in known if known.count(uuid) > 1} if len(known) > len(by_uuid) else ()):
        raise UsageError(f"--corrections {path}: nucleus {twice[0]} is changed twice; keep one of the changes")
    left, beside, found = set(by_uuid), 0, []
    names = (*table.decisions, "")
    near = region.buffer(REACH_UM / min(table.slide.mpp_x, table.slide.mpp_y))
    shapely.prepare(near)
    for chunk in table.iter_chunks(probabilities=False):
        xy = chunk.cells.centroid_xy
        inside = np.asarray(shapely.intersects_xy(near, xy[:, 0], xy[:, 1]), np.bool_)
        uuids = [str(one) for one in chunk.uuid]
        touched = np.array([one in by_uuid for one in uuids], np.bool_)
        for row in np.flatnonzero(inside | touched):
            change = by_uuid.get(uuids[row])
            left.discard(uuids[row])
            name = names[int(chunk.class_index[row])]
            before = Nucleus((float(xy[row, 0]), float(xy[row, 1])), _outline(chunk.cells, int(row)), _plain(name))
            if change is None:
                if name != NOT_NUCLEUS:
                    found.append(before)
                continue
            after = None if change.nucleus is None else _after(before, change)
            beside += not any(n is not None and _reaches(n, region) for n in (before, after))
            if after is not None:
                found.append(after)
    if left:
        raise UsageError(
            f"--corrections {path}: {len(left)} changed nuclei are not in {table.path}, such as {sorted(left)[0]}; the "
            "file belongs to another run"
        )
    added = [change.nucleus for change in changes if change.what == "added" and change.nucleus is not None]
    return found + added, beside + sum(not _reaches(n, region) for n in added)


def _after(before: Nucleus, change: Change) -> Nucleus:
    """Return a nucleus after its change; one that is moved by a point takes its outline along."""
    now = change.nucleus
    assert now is not None
    if change.what == "retyped":
        return Nucleus(before.xy, before.outline, now.name)
    outline = now.outline
    if outline is None and before.outline is not None:
        outline = shapely.affinity.translate(before.outline, now.xy[0] - before.xy[0], now.xy[1] - before.xy[1])
    return Nucleus(now.xy, outline, now.name or before.name)


def _outline(cells: Any, row: int) -> shapely.Polygon | None:
    if cells.contour_xy is None:
        return None if cells.box_xyxy is None else shapely.box(*cells.box_xyxy[row])
    start: Int64 = cells.contour_start
    ring: Float64 = cells.contour_xy[start[row] : start[row + 1]]
    return shapely.Polygon(ring) if len(ring) >= 3 else None
