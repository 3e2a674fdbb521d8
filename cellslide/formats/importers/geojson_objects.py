"""GeoJSON objects as QuPath, StarDist, InstanSeg, HoVer-NeXt, CellViT and TIAToolbox write them.

A Feature is a nucleus, its `nucleusGeometry` going before its `geometry` (QuPath's cells). Annotations may hold many:
CellViT writes one MultiPolygon, or MultiPoint, a class. `objectType` (also in snake case, also outside `properties`)
tells nuclei from regions; see `records`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cellslide.formats.importers.drafts import Draft, number, point
from cellslide.formats.importers.json_stream import JsonText
from cellslide.formats.importers.records import MARK, NUCLEUS, REGION, TILE, NucleiReport

KINDS = {"detection": NUCLEUS, "cell": NUCLEUS, "nucleus": NUCLEUS, "tile": TILE, "annotation": MARK}
REGIONS = {"root", "tma_core", "tmacore", "image"}
# Where tools put a class, the best first; the last ones only as a text, since a label may be a number of its own.
CLASS_KEYS = (
    "class", "class_name", "className", "cell_type", "cellType", "celltype", "type", "predicted_class", "prediction",
    "pred_class", "predicted_label", "category", "label",
)  # fmt: skip
TEXT_ONLY = ("prediction", "category", "label")
SCORES = ("Detection probability", "score", "probability", "Probability")


def feature_drafts(feature: dict[str, Any], place: int, report: NucleiReport) -> Iterator[Draft]:
    """Yield the nuclei of a Feature, usually one; `place` is its number in the file, its id where it has none."""
    properties = feature.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    geometry = feature.get("nucleusGeometry") or properties.get("nucleusGeometry") or feature.get("geometry")
    kind, name = object_kind(feature, properties), class_name(properties) or class_name({**feature, "type": None})
    source_id = _source_id(feature, properties, place)
    score = _score(properties)
    parts = list(geometry_parts(geometry)) or [(None, point(None))]
    if len(parts) > 1 and kind != MARK:
        report.multipart += 1
        parts = [max(parts, key=lambda part: _size(part[0]))]
    for k, (ring, centroid) in enumerate(parts):
        text = source_id if len(parts) == 1 else f"{source_id}#{k}"
        yield Draft(text, ring, centroid, kind, name, score)


def _source_id(feature: dict[str, Any], properties: dict[str, Any], place: int) -> str:
    for value in (feature.get("id"), properties.get("id"), properties.get("object_id"), properties.get("cell_id")):
        if isinstance(value, (str, int, float)) and value != "":
            return str(value)
    return str(place)


def object_kind(feature: dict[str, Any], properties: dict[str, Any]) -> int:
    """Return NUCLEUS, TILE, MARK (an annotation, or nothing said) or REGION for what is never a nucleus."""
    for holder in (properties, feature):
        for key in ("objectType", "object_type", "type"):
            word = str(holder.get(key, "")).lower()
            if word in KINDS:
                return KINDS[word]
            if word in REGIONS:
                return REGION
    return MARK


def class_name(properties: dict[str, Any]) -> str:
    """Return the class of an object: QuPath's classification in any of its forms, or a plain property; "" is none."""
    keys = ("classification", "Classification", *CLASS_KEYS)
    for key in keys:
        value = properties.get(key)
        if isinstance(value, dict):
            names = value.get("names")
            joined = ": ".join(map(str, names)) if isinstance(names, list) else None
            value = value.get("name") or joined or value.get("class") or value.get("label")
        kinds = (str,) if key in TEXT_ONLY else (str, int)
        if isinstance(value, kinds) and not isinstance(value, bool) and value != "" and not _is_kind(str(value)):
            return str(value)
    return ""


def _is_kind(word: str) -> bool:
    return word.lower() in KINDS or word.lower() in REGIONS or word in ("Feature", "FeatureCollection")


def _score(properties: dict[str, Any]) -> float:
    """Return the detector's probability, from measurements given as a mapping or as a list of name and value."""
    entry = properties.get("measurements")
    if isinstance(entry, list):
        entry = {m.get("name"): m.get("value") for m in entry if isinstance(m, dict)}
    entry = entry if isinstance(entry, dict) else {}
    for key in SCORES:
        value = number(entry.get(key, properties.get(key)))
        if 0 <= value <= 1:
            return value
    return float("nan")


def geometry_parts(geometry: Any) -> Iterator[tuple[Any, tuple[float, float]]]:
    """Yield (outer ring or None, point or NaN) for every polygon and point of a geometry; nothing for other kinds."""
    waiting = [geometry]  # collections may hold collections, as deep as a stranger likes
    while waiting:
        part = waiting.pop()
        held = part.get("geometries") if isinstance(part, dict) and part.get("type") == "GeometryCollection" else None
        if isinstance(held, list):
            waiting += reversed(held)
        else:
            yield from _simple_parts(part)


def _simple_parts(geometry: Any) -> Iterator[tuple[Any, tuple[float, float]]]:
    if not isinstance(geometry, dict):
        return
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if not isinstance(coordinates, list):
        return
    if kind == "Point":
        yield None, point(coordinates)
    elif kind == "MultiPoint":
        yield from ((None, point(xy)) for xy in coordinates)
    elif kind == "Polygon":
        yield _outer(coordinates), point(None)
    elif kind == "MultiPolygon":
        yield from ((_outer(rings), point(None)) for rings in coordinates)
    elif kind == "LineString" and _is_closed(coordinates):
        yield coordinates, point(None)
    elif kind == "MultiLineString":
        yield from ((line, point(None)) for line in coordinates if isinstance(line, list) and _is_closed(line))


def _is_closed(line: list[Any]) -> bool:
    """Tell whether a line ends where it begins: the outline of an area, as some tools write it."""
    return len(line) > 3 and line[0] == line[-1]


def _outer(rings: Any) -> Any:
    return rings[0] if isinstance(rings, list) and rings and isinstance(rings[0], (list, np.ndarray)) else None


def _size(ring: Any) -> float:
    """Return the area of a ring, 0 for what is none."""
    try:
        x, y = np.asarray(ring, np.float64)[:, :2].T
    except (TypeError, ValueError, IndexError):
        return 0.0
    return abs(float(np.dot(x - x[0], np.roll(y, -1) - np.roll(y, 1)))) / 2


def walk_feature(text: JsonText) -> dict[str, Any]:
    """Read a Feature key by key that is too long for one piece; its rings are packed as arrays as they come."""
    feature: dict[str, Any] = {}
    for key in text.members():
        long = key in ("geometry", "nucleusGeometry") and text.peek() == "{"
        feature[key] = _walk_geometry(text) if long else text.value()
    return feature


def _walk_geometry(text: JsonText) -> dict[str, Any]:
    geometry: dict[str, Any] = {}
    for key in text.members():
        long = key == "coordinates" and text.peek() == "["
        geometry[key] = [_packed(element) for element in text.elements()] if long else text.value()
    return geometry


def _packed(polygon: Any) -> Any:
    """Return [outer ring as an array] for one polygon of many; anything else as it is."""
    try:
        ring = np.array(polygon[0], np.float64)
    except (TypeError, ValueError, IndexError):
        return polygon
    return [ring] if ring.ndim == 2 and ring.shape[1] == 2 else polygon
