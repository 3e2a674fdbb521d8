"""Files of nuclei as other tools write them, for nuclei at given places; each function follows its tool's format."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Points = list[tuple[float, float]]


def uuid_at(k: int) -> str:
    """Return the k-th of some UUIDs."""
    return str(UUID(int=(0xA1 << 120) | (0x4 << 76) | (0x8 << 60) | k))


def ring(x: float, y: float, r: float = 8.0, n: int = 12) -> list[list[float]]:
    """Return a closed circle about (x, y), [x, y] a vertex."""
    angle = np.arange(n) * 2 * np.pi / n
    points = np.round(np.stack([x + r * np.cos(angle), y + r * np.sin(angle)], axis=1), 4).tolist()
    return [*points, points[0]]


def polygon(x: float, y: float, r: float = 8.0) -> dict[str, Any]:
    """Return a GeoJSON polygon."""
    return {"type": "Polygon", "coordinates": [ring(x, y, r)]}


def qupath_feature(k: int, geometry: dict[str, Any], kind: str = "detection", **more: Any) -> dict[str, Any]:
    """Return an object as QuPath 0.4 and later exports it; `more` goes beside the geometry."""
    properties = {
        "objectType": kind,
        "classification": {"name": "Tumor", "color": [200, 0, 0]},
        "measurements": {"Detection probability": 0.75, "Nucleus: Area µm^2": 31.4},
    }
    return {"type": "Feature", "id": uuid_at(k), "geometry": geometry, **more, "properties": properties}


def qupath_export(places: Points) -> dict[str, Any]:
    """Return QuPath's export as a FeatureCollection: a tissue annotation and, inside it, detections."""
    tissue = qupath_feature(999, polygon(500, 500, 480), "annotation")
    cells = [qupath_feature(k, polygon(x, y)) for k, (x, y) in enumerate(places)]
    return {"type": "FeatureCollection", "features": [tissue, *cells]}


def stardist_export(places: Points) -> dict[str, Any]:
    """Return QuPath's export after its StarDist extension: cells, the nucleus beside the cell, measurements a list."""
    features = []
    for k, (x, y) in enumerate(places):
        cell = qupath_feature(k, polygon(x + 2, y, 20), "cell", nucleusGeometry=polygon(x, y))
        cell["properties"]["measurements"] = [{"name": "Detection probability", "value": 0.75}]
        features.append(cell)
    return {"type": "FeatureCollection", "features": features}


def instanseg_python(places: Points) -> list[dict[str, Any]]:
    """Return what InstanSeg's Python writes: a bare array, `object_type` in snake case, no ids, no class."""
    return [
        {"type": "Feature", "geometry": polygon(x, y), "properties": {"object_type": "detection"}} for x, y in places
    ]


def hovernext_polygons(places: Points) -> dict[str, Any]:
    """Return HoVer-NeXt's poly.geojson: tiles with one-hot measurements."""
    features = [
        {
            "type": "Feature",
            "id": uuid_at(k),
            "geometry": polygon(x, y),
            "properties": {
                "objectType": "tile",
                "classification": {"name": "lymphocyte", "color": [0, 0, 255]},
                "measurements": [{"name": "lymphocyte", "value": 1}, {"name": "epithelial-cell", "value": 0}],
            },
        }
        for k, (x, y) in enumerate(places)
    ]
    return {"type": "FeatureCollection", "features": features}


def cellvit_geojson(places: Points, points: bool = False) -> list[dict[str, Any]]:
    """Return CellViT's GeoJSON: a bare array with one annotation a class, all its nuclei in one geometry."""
    shapes = [list(place) for place in places] if points else [[ring(x, y)] for x, y in places]
    return [
        {
            "type": "Feature",
            "id": uuid_at(7000 + c),
            "geometry": {"type": "MultiPoint" if points else "MultiPolygon", "coordinates": shapes[c::2]},
            "properties": {"objectType": "annotation", "classification": {"name": name, "color": [255, 0, 0]}},
        }
        for c, name in enumerate(("Neoplastic", "Inflammatory"))
    ]


def cellvit_cells(places: Points, contours: bool = True) -> dict[str, Any]:
    """Return CellViT's cells.json, or without contours cell_detection.json; bbox is [row, col], all else x, y."""
    cells = []
    for k, (x, y) in enumerate(places):
        cell: dict[str, Any] = {"bbox": [[y - 8, x - 8], [y + 8, x + 8]], "centroid": [x, y], "type": 1 + k % 2}
        if contours:
            cell |= {"contour": ring(x, y)[:-1], "type_prob": 0.9, "patch_coordinates": [0, 0], "cell_status": 0}
        cells.append(cell)
    metadata = {"base_mpp": 0.25, "target_patch_mpp": 0.25, "patch_size": 1024}
    return {"wsi_metadata": metadata, "type_map": {"0": "Background", "1": "Neo", "2": "Inflammatory"}, "cells": cells}


def hovernet_cells(places: Points, magnification: float) -> dict[str, Any]:
    """Return HoVer-Net's JSON of a slide: cells by number, in pixels of the magnification it ran at."""
    nuclei = {
        str(k + 1): {
            "bbox": [[int(y) - 8, int(x) - 8], [int(y) + 8, int(x) + 8]],
            "centroid": [x, y],
            "contour": ring(x, y)[:-1],
            "type_prob": 0.8,
            "type": 1,
        }
        for k, (x, y) in enumerate(places)
    }
    return {"mag": magnification, "nuc": nuclei}


def hovernext_instances(places: Points) -> dict[str, Any]:
    """Return HoVer-NeXt's class_inst.json: id -> [class, [y, x]]."""
    return {str(10 + k): [3, [y, x]] for k, (x, y) in enumerate(places)}


def write_json(path: Path, content: Any) -> Path:
    """Write JSON, packed where the name ends in .gz; NaN stays the bare word that ujson and others write."""
    raw = json.dumps(content).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def write_table(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write columns as parquet, CSV or TSV, packed where the name ends in .gz."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
        return path
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if ".tsv" in path.name else ",")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    raw = text.getvalue().encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def xenium_cells(places: Points) -> dict[str, list[Any]]:
    """Return the columns of Xenium's cells.parquet and cells.csv.gz; `places` in µm."""
    n = len(places)
    return {
        "cell_id": [f"aaaa{k:04d}-1" for k in range(n)],
        "x_centroid": [x for x, _ in places],
        "y_centroid": [y for _, y in places],
        "transcript_counts": [120] * n,
        "cell_area": [90.5] * n,
        "nucleus_area": [31.5] * n,
    }


def xenium_boundaries(places: Points, r: float) -> dict[str, list[Any]]:
    """Return the columns of Xenium's nucleus_boundaries: a row a vertex, µm, rings closed."""
    ids, xs, ys = [], [], []
    for k, (x, y) in enumerate(places):
        for vx, vy in ring(x, y, r):
            ids.append(f"aaaa{k:04d}-1")
            xs.append(vx)
            ys.append(vy)
    return {"cell_id": ids, "vertex_x": xs, "vertex_y": ys}
