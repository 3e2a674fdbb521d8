"""What QuPath 0.4 to 0.7 demands of a GeoJSON file of detections, rule by rule; an empty list of faults is a good file.

Some faults cost QuPath the whole file (a class without colour, an open or self-crossing ring, a null, a text as
measurement), others lose something in silence (ids that are no UUID, a misplaced nucleus). All are faults here.
"""

from __future__ import annotations

import gzip
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import shapely
from shapely.geometry import shape

GRID_PX = 0.01
ENTRY_CELLS = 50_000
OBJECT_TYPES = {"detection", "cell", "tile", "annotation", "root", "tma_core"}
TOP_KEYS = {"type", "id", "geometry", "nucleusGeometry", "properties"}


def read_collections(path: Path) -> list[tuple[str, Any]]:
    """Return (name, parsed JSON) of the file, or of each entry of a zip; raises ValueError for what is not JSON."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return [(name, _parse(archive.read(name))) for name in archive.namelist()]
    raw = path.read_bytes()
    return [(path.name, _parse(gzip.decompress(raw) if path.suffix == ".gz" else raw))]


def read_features(path: Path) -> list[dict[str, Any]]:
    """Return the features of all collections of a file."""
    return [feature for _, collection in read_collections(path) for feature in collection["features"]]


def _parse(raw: bytes) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(raw.decode("utf-8"), parse_constant=refuse)


def file_faults(path: Path) -> list[str]:
    """Return every fault of a file by its name, its collections and its features."""
    faults = []
    if not path.name.endswith((".geojson", ".json", ".geojson.gz", ".json.gz", ".zip")):
        faults.append(f"{path.name}: QuPath does not read this ending")
    try:
        collections = read_collections(path)
    except ValueError as error:
        return [*faults, f"{path.name}: {error}"]
    ids: set[str] = set()
    for name, collection in collections:
        if path.suffix == ".zip" and not name.endswith((".geojson", ".json")):
            faults.append(f"{name}: an entry of a zip must end in .geojson")
        faults += [f"{name}: {fault}" for fault in collection_faults(collection, ids)]
    return faults


def collection_faults(collection: Any, ids: set[str] | None = None) -> list[str]:
    """Return the faults of one collection; `ids` carries the ids met in earlier entries of the same file."""
    if not isinstance(collection, dict) or collection.get("type") != "FeatureCollection":
        return ["not a FeatureCollection"]
    features, ids = collection["features"], set() if ids is None else ids
    if len(features) > ENTRY_CELLS:
        return [f"{len(features)} features, at most {ENTRY_CELLS}"]
    faults = []
    for i, feature in enumerate(features):
        faults += [f"feature {i}: {fault}" for fault in feature_faults(feature)]
        if feature.get("id") in ids:
            faults.append(f"feature {i}: duplicate id")
        ids.add(str(feature.get("id")))
    return faults


def feature_faults(feature: dict[str, Any]) -> list[str]:
    """Return the faults of one feature."""
    faults = [f"null at {place}" for place in _nulls(feature, "feature")]
    if feature.get("type") != "Feature":
        faults.append("type is not Feature")
    faults += [f"unexpected key {key}" for key in feature.keys() - TOP_KEYS]
    faults += _id_faults(feature.get("id"))
    for key in ("geometry", "nucleusGeometry"):
        if feature.get(key) is not None:
            faults += [f"{key}: {fault}" for fault in geometry_faults(feature[key])]
        elif key == "geometry":
            faults.append("no geometry")
    if not faults and "nucleusGeometry" in feature:
        faults += _nucleus_faults(feature)
    return faults + _property_faults(feature.get("properties") or {})


def _nulls(value: Any, place: str) -> Iterator[str]:
    if value is None:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _nulls(item, f"{place}.{key}")


def _id_faults(text: Any) -> list[str]:
    try:
        ok = str(UUID(text)) == text
    except (ValueError, AttributeError, TypeError):
        ok = False
    return [] if ok else ["id is not a UUID; QuPath would replace it"]


def _nucleus_faults(feature: dict[str, Any]) -> list[str]:
    inside = shape(feature["geometry"]).covers(shape(feature["nucleusGeometry"]))
    return [] if inside else ["the nucleus leaves its cell"]


def geometry_faults(geometry: dict[str, Any]) -> list[str]:
    """Return the faults of a geometry: Point or Polygon only, finite, on the grid, closed, valid, also when snapped."""
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind == "Point":
        return _coordinate_faults([coordinates])
    if kind != "Polygon" or not coordinates:
        return [f"a {kind}, not a Polygon or Point"]
    faults = []
    for ring in coordinates:
        faults += _coordinate_faults(ring)
        if len(ring) < 4 or ring[0] != ring[-1]:
            faults.append("open ring")
    return faults or _polygon_faults(shape(geometry))


def _coordinate_faults(points: Any) -> list[str]:
    for point in points:
        if not isinstance(point, list) or len(point) != 2 or not all(_is_number(v) for v in point):
            return [f"{point} is not x, y"]
        if any(round(v * 100) / 100 != v for v in point):
            return [f"{point} is off the grid of {GRID_PX} px"]
    return []


def _polygon_faults(polygon: Any) -> list[str]:
    if not polygon.is_valid:
        return [f"invalid polygon: {shapely.is_valid_reason(polygon)}"]
    try:
        snapped = shapely.set_precision(polygon, GRID_PX)
    except shapely.errors.GEOSException as error:
        return [f"cannot be put on the grid: {error}"]
    if snapped.is_empty or snapped.geom_type != "Polygon":
        return [f"becomes an empty or {snapped.geom_type} on the grid"]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _property_faults(properties: dict[str, Any]) -> list[str]:
    faults = []
    if properties.get("objectType") not in OBJECT_TYPES:
        faults.append(f"objectType {properties.get('objectType')!r}: would be read as an annotation")
    for key in ("type", "object_type", "isLocked", "nucleusGeometry", "colorRGB"):
        if key in properties:
            faults.append(f"{key} does not belong in properties")
    if "classification" in properties:
        faults += _class_faults(properties["classification"])
    return faults + _measurement_faults(properties.get("measurements", {}))


def _class_faults(entry: Any) -> list[str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        return ["classification without a name"]
    color = entry.get("color")
    whole = isinstance(color, list) and len(color) == 3 and all(type(v) is int and 0 <= v <= 255 for v in color)
    faults = [] if whole else ["classification without a colour [r, g, b]"]
    return [*faults, "': ' makes a derived class"] if ": " in entry["name"] else faults


def _measurement_faults(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return ["measurements are not a dict"]
    return [f"measurement {name!r} is {value!r}" for name, value in entry.items() if not _is_number(value)]
