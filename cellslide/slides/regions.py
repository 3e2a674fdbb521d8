"""Regions of interest in GeoJSON: outlines to search in, less their holes and less what is marked to be ignored.

Frames: level-0 pixels; a file's zero point is that of the slide's bounds, as QuPath writes it, or the level-0 plane.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely
import shapely.affinity
from shapely.geometry.base import BaseGeometry

from cellslide.errors import UsageError
from cellslide.geometry.outlines import is_tangled
from cellslide.store.foreign_files import is_plain, parse_json
from cellslide.types import SlideInfo

Origin = Literal["bounds", "level0"]
MOST_ROI_BYTES = 256 << 20
# QuPath's class for what is to be left out; "Region*" and others with a star are searched.
IGNORED = "ignore"
# Objects that are nuclei or their tiles; beside annotations they are no regions.
DETECTIONS = {"detection", "cell", "nucleus", "tile"}
# Of a region that lies farther out than this share of its area, the zero point is doubtful.
OUTSIDE_SHARE = 0.05

_log = logging.getLogger(__name__)


def load_roi(path: Path, info: SlideInfo, origin: Origin = "bounds") -> BaseGeometry:
    """Return the polygons of a GeoJSON file (.gz too) as one level-0 geometry; `origin` is what they are relative to.

    Takes a FeatureCollection, a Feature, a geometry or a bare list of these, nested as they like. What is of a class
    "Ignore*" is cut out. Raises UsageError where there is no polygon, and where all lie beside the slide.
    """
    try:
        roi, left_out = _union(list(_objects(parse_json(unpacked(path), "the text", UsageError))), path)
    except (
        UsageError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError, RecursionError,
        OverflowError, MemoryError, zlib.error, shapely.errors.ShapelyError,
    ) as error:  # fmt: skip
        raise UsageError(f"--roi {path}: not GeoJSON: {str(error)[:200]}") from error
    dx, dy = origin_offset(info, origin)
    roi = shapely.affinity.translate(roi, dx, dy)
    _check_place(roi, path, info, origin)
    if left_out:
        words = ", ".join(f"{n} {kind}" for kind, n in sorted(left_out.items()))
        _log.warning("--roi %s: only polygons are regions; left out: %s", path, words)
    shapely.prepare(roi)
    return roi


def load_regions(path: Path, info: SlideInfo, origin: Origin = "bounds") -> list[tuple[str, BaseGeometry]]:
    """Return the polygons of a GeoJSON file one by one in level-0 pixels, each by its name, else its class.

    Takes what `load_roi` takes; detections and objects of a class "Ignore*" are left out. Raises UsageError as it does.
    """
    try:
        objects = list(_objects(parse_json(unpacked(path), "the text", UsageError)))
        found = [(_region_name(holder), _polygons(geometry)) for geometry, holder in objects
                 if kind_of(holder) not in DETECTIONS and not _is_ignored(holder)]  # fmt: skip
    except (
        UsageError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError, RecursionError,
        OverflowError, MemoryError, zlib.error, shapely.errors.ShapelyError,
    ) as error:  # fmt: skip
        raise UsageError(f"--regions {path}: not GeoJSON: {str(error)[:200]}") from error
    regions = [
        (name, shapely.affinity.translate(shapely.union_all(polygons), *origin_offset(info, origin)))
        for name, polygons in found
        if polygons
    ]
    if not regions:
        raise UsageError(f"--regions {path}: no polygon in it")
    return regions


def load_objects(path: Path, flag: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (geometry, the Feature that holds it) of all that a GeoJSON file (.gz too) holds, in its order.

    Raises UsageError that names `flag` for a file that is none.
    """
    try:
        return list(_objects(parse_json(unpacked(path), "the text", UsageError)))
    except (
        UsageError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError, RecursionError,
        MemoryError, zlib.error,
    ) as error:  # fmt: skip
        raise UsageError(f"{flag} {path}: not GeoJSON: {str(error)[:200]}") from error


def _region_name(holder: dict[str, Any]) -> str:
    properties = holder.get("properties")
    name = properties.get("name") if isinstance(properties, dict) else None
    words = name if isinstance(name, str) and name.strip() else ": ".join(class_words(holder))
    return words.strip()[:100] or "region"


def _is_ignored(holder: dict[str, Any]) -> bool:
    return any(word.strip().lower().rstrip("*") == IGNORED for word in class_words(holder))


def origin_offset(info: SlideInfo, origin: Origin) -> tuple[int, int]:
    """Return the level-0 position of a file's zero point: the corner of the bounds, where QuPath crops, or (0, 0)."""
    return info.bounds[:2] if origin == "bounds" and info.bounds is not None else (0, 0)


def simple_polygons(geometry: BaseGeometry) -> Iterator[shapely.Polygon]:
    """Yield the polygons of a geometry, however nested."""
    for part in shapely.get_parts(geometry):
        if isinstance(part, shapely.Polygon):
            yield part
        elif shapely.get_num_geometries(part) > 1:
            yield from simple_polygons(part)


def unpacked(path: Path) -> bytes:
    """Return the content of a file, plain or gzip; raises ValueError for more than regions need, or no plain file."""
    if not is_plain(path):
        raise ValueError("not a plain file, or not there")
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as stream:
        text = stream.read(MOST_ROI_BYTES + 1)
    if len(text) > MOST_ROI_BYTES:
        raise ValueError(f"more than {MOST_ROI_BYTES >> 20} MB; regions are a few outlines")
    return text


def _objects(content: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (geometry, the Feature that holds it) of everything that a file holds, in its order."""
    waiting: list[tuple[Any, dict[str, Any]]] = [(content, {})]
    while waiting:
        item, holder = waiting.pop()
        if isinstance(item, list):
            waiting += [(part, holder) for part in reversed(item)]
        elif item["type"] == "FeatureCollection":
            waiting.append((list(item["features"]), holder))
        elif item["type"] == "Feature":
            waiting += [(item["geometry"], item)] if item.get("geometry") else []
        elif item["type"] == "GeometryCollection":
            waiting += [(part, holder) for part in reversed(item["geometries"])]
        else:
            yield item, holder


def _union(objects: list[tuple[dict[str, Any], dict[str, Any]]], path: Path) -> tuple[BaseGeometry, Counter[str]]:
    """Return what is to be searched, and how many geometries of other kinds are left out, by kind."""
    kinds = [kind_of(holder) for _, holder in objects]
    some_regions = any(kind and kind not in DETECTIONS for kind in kinds)
    wanted: list[BaseGeometry] = []
    ignored: list[BaseGeometry] = []
    names: dict[str, None] = {}
    left_out: Counter[str] = Counter()
    for (geometry, holder), kind in zip(objects, kinds, strict=True):
        if some_regions and kind in DETECTIONS:
            left_out[kind] += 1
            continue
        polygons = _polygons(geometry)
        if not polygons:
            left_out[str(geometry["type"])[:40]] += 1
            continue
        (ignored if _is_ignored(holder) else wanted).extend(polygons)
        names[": ".join(class_words(holder)) or "none"] = None
    if not wanted:
        what = "no polygon in it" if not ignored else "only regions to ignore; draw what is to be searched, too"
        raise UsageError(f"--roi {path}: {what}")
    if len(names) > 1:
        said = ", ".join(list(names)[:6])[:200]
        cut = "; those to ignore are cut out" if ignored else "; all of them are searched"
        _log.info("--roi %s: regions of the classes %s%s", path, said, cut)
    roi = shapely.union_all(wanted)
    return (shapely.difference(roi, shapely.union_all(ignored)) if ignored else roi), left_out


def kind_of(holder: dict[str, Any]) -> str:
    """Return what an object is (annotation, detection, cell ...), in lower case, "" where that is not said."""
    properties = holder.get("properties")
    found = [(place.get(key) if isinstance(place, dict) else None) for place in (properties, holder)
             for key in ("objectType", "object_type")]  # fmt: skip
    return next((str(word).lower() for word in found if word), "")


def class_words(holder: dict[str, Any]) -> list[str]:
    """Return the names of an object's class, a derived one in its parts."""
    for place in (holder.get("properties"), holder):
        entry = place.get("classification", place.get("class")) if isinstance(place, dict) else None
        if isinstance(entry, dict):
            names = entry.get("names")
            entry = entry.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else None)
        if isinstance(entry, str) and entry:
            return [word.strip() for word in entry.split(":")]
    return []


def _polygons(geometry: dict[str, Any]) -> list[BaseGeometry]:
    """Return the polygons of a geometry, holes cut out also where they share a rim with the outline; [] for others."""
    kind, coordinates = geometry["type"], geometry.get("coordinates")
    many: Any
    if kind == "Polygon":
        many = [coordinates]
    elif kind == "MultiPolygon":
        many = coordinates
    elif kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        many = []
    else:
        raise ValueError(f"a geometry of type {str(kind)[:40]!r}")
    return [part for rings in many if rings for part in simple_polygons(_cut(rings))]


def _cut(rings: Any) -> BaseGeometry:
    outline, *holes = (_area(ring) for ring in rings)
    return shapely.difference(outline, shapely.union_all(holes)) if holes else outline


def _area(ring: Any) -> BaseGeometry:
    """Return what one ring encloses; raises ValueError for one that is none."""
    xy = np.array([vertex[:2] for vertex in ring], np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy).all():
        raise ValueError("an outline whose vertices are no numbers")
    if len(xy) < 3:
        return shapely.Polygon()
    polygon = shapely.Polygon(xy)
    if is_tangled(polygon).any():
        raise ValueError("an outline crosses itself too often to be mended; draw it anew")
    return shapely.make_valid(polygon)


def _check_place(roi: BaseGeometry, path: Path, info: SlideInfo, origin: Origin) -> None:
    """Raise UsageError where a region lies beside the slide; warn where a part of it does."""
    inside = shapely.intersection(roi, shapely.box(0, 0, info.width_px, info.height_px)).area
    x0, y0, x1, y1 = (round(v) for v in roi.bounds) if not roi.is_empty else (0, 0, 0, 0)
    other = "level0" if origin == "bounds" else "bounds"
    tried = f"--geojson-origin {other}" if info.bounds is not None else "--geojson-origin, and that it is in pixels"
    where = f"x {x0} to {x1}, y {y0} to {y1} px, the slide is {info.width_px} x {info.height_px} px; check {tried}"
    if roi.area > 0 and inside <= 0:
        raise UsageError(f"--roi {path}: lies beside the slide: {where}")
    if roi.area > 0 and inside < (1 - OUTSIDE_SHARE) * roi.area:
        _log.warning("--roi %s: %.0f %% of it lies beside the slide: %s", path, 100 * (1 - inside / roi.area), where)
