"""GeoJSON that QuPath reads, and the text columns under it."""

from __future__ import annotations

import copy
import gzip
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from shapely.geometry import shape

from cellslide.formats import geojson
from cellslide.formats.geojson import write_geojson
from cellslide.store.cell_table import Columns, TableExtender, open_table
from cellslide.store.table_writer import NUCLEUS
from cellslide.types import Cells
from tests.support.qupath_rules import collection_faults, file_faults, read_collections, read_features
from tests.support.random_cells import (
    BOUNDS,
    CLASSES,
    as_kind,
    ellipses,
    model_spec,
    run_record,
    slide_info,
    write_table,
)

GOOD: dict[str, Any] = {
    "type": "Feature",
    "id": "7f3c1a52-8f5e-5d29-9a55-0d5f3f9f0a11",
    "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9.25, 0], [9.25, 9], [0, 9], [0, 0]]]},
    "properties": {
        "objectType": "detection",
        "classification": {"name": "Tumor", "color": [200, 0, 0]},
        "measurements": {"probability": 0.5},
    },
}
BOW_TIE = [[0, 0], [9, 9], [9, 0], [0, 9], [0, 0]]
SPIKE = [[0, 0], [9, 0], [9, 9], [20, 20], [9, 9], [0, 9], [0, 0]]


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("id", "cell-1", "not a UUID"),
        ("id", 7, "not a UUID"),
        ("geometry", None, "null"),
        ("nucleusGeometry", None, "null"),
        ("nucleusGeometry", {"type": "Point", "coordinates": [50, 50]}, "leaves its cell"),
        ("geometry/coordinates/0", GOOD["geometry"]["coordinates"][0][:-1], "open ring"),
        ("geometry/coordinates/0", BOW_TIE, "invalid polygon"),
        ("geometry/coordinates/0", SPIKE, "invalid polygon"),
        ("geometry/coordinates/0/1/0", 9.255, "off the grid"),
        ("geometry/coordinates/0/1/0", "9", "not x, y"),
        ("geometry/type", "MultiPolygon", "not a Polygon"),
        ("properties/objectType", "nucleus", "annotation"),
        ("properties/objectType", None, "annotation"),
        ("properties/type", "Tumor", "does not belong"),
        ("properties/nucleusGeometry", {}, "does not belong"),
        ("properties/isLocked", True, "does not belong"),
        ("properties/classification", {"name": "Tumor"}, "colour"),
        ("properties/classification/color", "#ff0000", "colour"),
        ("properties/classification/color", [200, 0, 256], "colour"),
        ("properties/classification/name", "Tumor: Positive", "derived"),
        ("properties/measurements", [{"name": "a", "value": 1}], "not a dict"),
        ("properties/measurements/probability", "NaN", "measurement"),
        ("properties/measurements/probability", float("nan"), "measurement"),
        ("properties/measurements/probability", True, "measurement"),
        ("properties/measurements/probability", None, "null"),
    ],
)
def test_the_rules_see_every_trap(path: str, value: Any, fault: str) -> None:
    feature = copy.deepcopy(GOOD)
    *parents, last = path.split("/")
    place: Any = feature
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    assert collection_faults({"type": "FeatureCollection", "features": [copy.deepcopy(GOOD)]}) == []
    assert fault in " ".join(collection_faults({"type": "FeatureCollection", "features": [feature]}))


def test_the_rules_see_duplicate_ids_bare_nan_and_big_entries(tmp_path: Path) -> None:
    assert "duplicate id" in " ".join(collection_faults({"type": "FeatureCollection", "features": [GOOD, GOOD]}))
    path = tmp_path / "a.geojson"
    path.write_text('{"type":"FeatureCollection","features":[NaN]}')
    assert "not JSON" in " ".join(file_faults(path))
    many = [{**GOOD, "id": str(i)} for i in range(50_001)]
    assert "at most 50000" in " ".join(collection_faults({"type": "FeatureCollection", "features": many}))


@pytest.mark.parametrize("profile", ["lean", "full"])
@pytest.mark.parametrize("kind", ["mask", "box", "point"])
def test_a_file_keeps_every_rule(tmp_path: Path, kind: Any, profile: Any) -> None:
    table = write_table(tmp_path, as_kind(ellipses(300), kind), model_spec(kind))
    path = write_geojson(table, tmp_path, "bounds", profile)
    assert path.name == "cells.geojson.gz"
    assert file_faults(path) == []
    features = read_features(path)
    assert [f["id"] for f in features] == list(table.vector("uuid"))
    assert {f["geometry"]["type"] for f in features} == {"Point" if kind == "point" else "Polygon"}


@pytest.mark.parametrize(("origin", "shift"), [("bounds", BOUNDS[:2]), ("level0", (0, 0))])
def test_places_are_level0_less_the_bounds(tmp_path: Path, origin: Any, shift: tuple[int, int]) -> None:
    cells = ellipses(40)
    features = read_features(write_geojson(write_table(tmp_path, cells), tmp_path, origin))
    for i, feature in enumerate(features):
        ring = np.array(feature["geometry"]["coordinates"][0])[:-1] + shift
        assert cells.contour_xy is not None and cells.contour_start is not None
        wanted = cells.contour_xy[cells.contour_start[i] : cells.contour_start[i + 1]]
        assert np.abs(ring - wanted).max() <= 0.005 + 1e-9


def test_a_slide_without_bounds_keeps_its_frame(tmp_path: Path) -> None:
    table = write_table(tmp_path, as_kind(ellipses(3), "point"), model_spec("point"), slide_info(bounds=None))
    points = [f["geometry"]["coordinates"] for f in read_features(write_geojson(table, tmp_path))]
    assert np.allclose(points, ellipses(3).centroid_xy, atol=0.0051)


def test_measurements_and_classes(tmp_path: Path) -> None:
    cells = ellipses(50)
    table = write_table(tmp_path, cells)
    lean = read_features(write_geojson(table, tmp_path))
    full = read_features(write_geojson(table, tmp_path, profile="full"))
    assert cells.class_prob is not None
    for i, (a, b) in enumerate(zip(lean, full, strict=True)):
        top = int(cells.class_prob[i].argmax())
        assert a["properties"]["classification"] == {"name": CLASSES[top].name, "color": list(CLASSES[top].color)}
        assert a["properties"]["measurements"].keys() == {"probability", "score", "area µm²"}
        assert a["properties"]["measurements"]["probability"] == pytest.approx(cells.class_prob[i].max(), abs=5.1e-5)
        measured = b["properties"]["measurements"]
        assert [measured[f"prob: {c.name}"] for c in CLASSES] == pytest.approx(cells.class_prob[i], abs=5.1e-5)
        assert measured["perimeter µm"] == pytest.approx(table.matrix("X")[i, 1], abs=5.1e-5)


def test_a_model_without_types_writes_nuclei_of_one_color(tmp_path: Path) -> None:
    table = write_table(tmp_path, ellipses(20, classes=0), model_spec(classes=()))
    features = read_features(write_geojson(table, tmp_path))
    assert {json.dumps(f["properties"]["classification"]) for f in features} == {
        json.dumps({"name": NUCLEUS.name, "color": list(NUCLEUS.color)})
    }
    assert "probability" not in features[0]["properties"]["measurements"]


def test_gate_joins_after_typing_and_gaps_are_left_out(tmp_path: Path) -> None:
    table = write_table(tmp_path, ellipses(4))
    extender = TableExtender(table)
    gate = np.array([0.25, np.nan, np.inf, 1.0], np.float32)
    extender.append(Columns({"gate": gate, "abstained": np.array([True, False, False, True])}))
    extender.close(run_record())
    path = write_geojson(open_table(tmp_path / "cells.zarr"), tmp_path, profile="full")
    assert file_faults(path) == []
    measured = [f["properties"]["measurements"] for f in read_features(path)]
    assert [m.get("gate") for m in measured] == [0.25, None, None, 1]
    assert [m["abstained"] for m in measured] == [1, 0, 0, 1]


def _with_rings(cells: Cells, rings: list[Any]) -> Cells:
    assert cells.contour_xy is not None and cells.contour_start is not None
    parts = np.split(cells.contour_xy, cells.contour_start[1:-1])
    for i, ring in enumerate(rings):
        parts[i] = np.array(ring, np.float64)
    start = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return replace(cells, contour_xy=np.concatenate(parts), contour_start=start)


def test_one_bad_outline_does_not_cost_the_slide(tmp_path: Path) -> None:
    speck = [[5, 5], [5.001, 5], [5, 5.001]]
    line = [[5, 5], [9, 5], [7, 5]]
    rings = [BOW_TIE[:-1], SPIKE[:-1], speck, line, [[0, 0], [9, 0], [9, 0.001], [9, 9], [0, 9]]]
    table = write_table(tmp_path, _with_rings(ellipses(30), rings))
    path = write_geojson(table, tmp_path, "level0")
    assert file_faults(path) == []
    features = read_features(path)
    assert len(features) == 30
    areas = [shape(f["geometry"]).area for f in features[:5]]
    assert areas == pytest.approx([20.25, 81, 1, 1, 81])


@pytest.mark.parametrize("spread_px", [0.05, 4.0])
def test_random_stars_survive_the_grid(tmp_path: Path, spread_px: float) -> None:
    rng = np.random.default_rng(1)
    rings = [rng.normal(500, spread_px, (9, 2)) for _ in range(400)]
    path = write_geojson(write_table(tmp_path, _with_rings(ellipses(400), rings)), tmp_path)
    assert file_faults(path) == []


def test_many_cells_go_into_entries_of_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path, ellipses(230))
    small = write_geojson(table, tmp_path)
    whole = read_features(small)
    monkeypatch.setattr(geojson, "ENTRY_CELLS", 100)
    monkeypatch.setattr(geojson, "BLOCK_CELLS", 20)
    path = write_geojson(table, tmp_path)
    assert path.name == "cells.geojson.zip" and not small.exists()
    assert file_faults(path) == []
    assert [(name, len(c["features"])) for name, c in read_collections(path)] == [
        ("cells-000.geojson", 100),
        ("cells-001.geojson", 100),
        ("cells-002.geojson", 30),
    ]
    assert read_features(path) == whole
    monkeypatch.setattr(geojson, "ENTRY_CELLS", 50_000)
    assert write_geojson(table, tmp_path) == small
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.geojson.gz", "cells.zarr"]


def test_a_rerun_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [write_table(tmp_path / name, ellipses(60)) for name in ("a", "b")]
    first, second = (write_geojson(table, table.path.parent).read_bytes() for table in tables)
    assert first == second
    monkeypatch.setattr(geojson, "ENTRY_CELLS", 50)
    monkeypatch.setattr(geojson, "BLOCK_CELLS", 10)
    first, second = (write_geojson(table, table.path.parent).read_bytes() for table in tables)
    assert first == second
    with zipfile.ZipFile(tmp_path / "a" / "cells.geojson.zip") as archive:
        assert archive.infolist()[0].compress_size < archive.infolist()[0].file_size / 2


def test_no_cells_is_an_empty_collection(tmp_path: Path) -> None:
    path = write_geojson(write_table(tmp_path, ellipses(0)), tmp_path)
    assert read_collections(path)[0][1] == {"type": "FeatureCollection", "features": []}


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path, ellipses(5))
    before = write_geojson(table, tmp_path).read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(geojson, "_features", fail)
    with pytest.raises(OSError, match="disk full"):
        write_geojson(table, tmp_path)
    assert (tmp_path / "cells.geojson.gz").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.geojson.gz", "cells.zarr"]


def test_coordinates_have_two_decimals_and_measurements_four(tmp_path: Path) -> None:
    cells = _with_rings(ellipses(3), [[[-0.051, 30], [40.004, -2], [123_456.789, 0.07]]])
    cells.score[:] = [0.123456, 1.0, np.nan]
    text = gzip.decompress(write_geojson(write_table(tmp_path, cells), tmp_path, "level0").read_bytes())
    assert b"[[[-0.05,30.0],[40.0,-2.0],[123456.79,0.07],[-0.05,30.0]]]" in text
    assert b'"score":0.1235,' in text and b'"score":1.0,' in text and text.count(b'"score"') == 2


def test_outlines_keep_their_area(tmp_path: Path) -> None:
    cells = ellipses(100)
    features = read_features(write_geojson(write_table(tmp_path, cells), tmp_path))
    assert cells.contour_xy is not None and cells.contour_start is not None
    rings = np.split(cells.contour_xy, cells.contour_start[1:-1])
    wanted = shapely.area([shapely.Polygon(ring) for ring in rings])
    assert np.allclose([shape(f["geometry"]).area for f in features], wanted, rtol=0.005)


def test_zlib_serves_where_there_is_no_faster_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path, ellipses(120))
    text = gzip.decompress(write_geojson(table, tmp_path).read_bytes())
    monkeypatch.setitem(sys.modules, "isal", None)
    assert gzip.decompress(write_geojson(table, tmp_path).read_bytes()) == text
    monkeypatch.setattr(geojson, "ENTRY_CELLS", 100)
    monkeypatch.setattr(geojson, "BLOCK_CELLS", 20)
    path = write_geojson(table, tmp_path)
    assert file_faults(path) == [] and len(read_features(path)) == 120


def test_a_place_too_large_for_a_slide_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path, _with_rings(ellipses(3), [[[0, 0], [1e9, 0], [0, 1e9]]]))
    with pytest.raises(ValueError, match="too large"):
        write_geojson(table, tmp_path)
