"""Whether a GeoJSON file of ours holds the cells of a table: their ids in order, their classes, their places."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.formats.importers.geojson_objects import class_name, geometry_parts
from cellslide.formats.importers.json_files import open_texts
from cellslide.formats.importers.json_stream import JsonText
from cellslide.store.cell_table import CellChunk, CellTable
from cellslide.store.shapes import ring_boxes
from cellslide.types import Float64

# A mended outline lies inside the one that crossed itself; one of no area is drawn as a pixel about its centroid.
NEAR_PX = 1.0


def compare_geojson(path: Path, table: CellTable) -> Iterator[str]:
    """Yield where the features of a file are not the cells of the table; raises UsageError for what is no GeoJSON."""
    features = _features(path)
    shifts = [np.array(corner, np.float64) for corner in {(0, 0), (table.slide.bounds or (0, 0))[:2]}]
    wrong, n = {"id": 0, "class": 0}, 0
    far = [0] * len(shifts)
    words = np.array(["", *table.decisions], object)
    for chunk in table.iter_chunks(10_000):
        found = list(islice(features, len(chunk)))
        n += len(found)
        if len(found) < len(chunk):
            break
        wrong["id"] += int((np.array([str(f.get("id")) for f in found], object) != chunk.uuid).sum())
        names = words[np.asarray(chunk.class_index, np.int64) + 1]
        told = np.array([class_name(_mapping(f.get("properties"))) for f in found], object)
        wrong["class"] += int((told != names).sum())
        boxes = np.array([_box(feature) for feature in found]).reshape(-1, 4)
        for k, shift in enumerate(shifts):
            far[k] += _far(chunk, boxes, shift)
    n += sum(1 for _ in features)
    if n != len(table):
        yield f"{n} features, cells.zarr has {len(table)}"
    yield from (f"{name} differs in {count} features from cells.zarr" for name, count in wrong.items() if count)
    if min(far):
        yield f"{min(far)} features lie elsewhere than in cells.zarr"


def _features(path: Path) -> Iterator[dict[str, Any]]:
    for name, stream in open_texts(path):
        text = JsonText(stream, name)
        for key in text.members():
            if key == "features":
                yield from (_mapping(feature) for feature in text.elements())
            else:
                text.value()


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _box(feature: dict[str, Any]) -> tuple[float, float, float, float]:
    """Return the box xyxy of a feature, NaN where it has no shape."""
    nan = float("nan")
    for ring, (x, y) in geometry_parts(feature.get("geometry")):
        if ring is None:
            return x, y, x, y
        xy = np.asarray(ring, np.float64).reshape(-1, 2)
        (x0, y0), (x1, y1) = xy.min(axis=0).tolist(), xy.max(axis=0).tolist()
        return x0, y0, x1, y1
    return nan, nan, nan, nan


def _far(chunk: CellChunk, boxes: Float64, shift: Float64) -> int:
    """Return how many boxes do not lie in those of their cells, less `shift`."""
    cells = chunk.cells
    if cells.contour_xy is None or cells.contour_start is None:
        home = np.concatenate([cells.centroid_xy, cells.centroid_xy], axis=1)
    else:
        home = ring_boxes(cells.contour_xy, cells.contour_start)
    home = home - np.concatenate([shift, shift])
    near = (boxes[:, :2] >= home[:, :2] - NEAR_PX) & (boxes[:, 2:] <= home[:, 2:] + NEAR_PX)
    return int((~near.all(axis=1)).sum())
