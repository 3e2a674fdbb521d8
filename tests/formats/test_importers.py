"""Nuclei of other tools: every format gives the same places, ids and classes; what cannot be used is counted."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cellslide.errors import UsageError
from cellslide.formats.geojson import write_geojson
from cellslide.formats.importers import (
    ForeignNuclei,
    NucleiReport,
    Source,
    drafts,
    import_nuclei,
    json_stream,
    load_alignment,
    read_nuclei,
    tables,
)
from cellslide.geometry.outlines import ring_bounds
from cellslide.slides.slide import slide_from_array
from cellslide.store.cell_table import Categorical, open_table
from cellslide.store.run_record import read_record
from tests.support import random_cells
from tests.support.foreign_files import (
    cellvit_cells,
    cellvit_geojson,
    hovernet_cells,
    hovernext_instances,
    hovernext_polygons,
    instanseg_python,
    polygon,
    qupath_export,
    qupath_feature,
    ring,
    stardist_export,
    uuid_at,
    write_json,
    write_table,
    xenium_boundaries,
    xenium_cells,
)
from tests.support.qupath_rules import file_faults, read_features
from tests.support.random_cells import slide_info

# Two rows of 256 µm (984.6 px of 0.26 µm), in the order of the table to be.
PLACES = [(100.25, 400.5), (300.0, 80.0), (700.5, 90.25), (150.0, 1500.0), (900.0, 1200.75)]
SHUFFLED = [PLACES[k] for k in (4, 0, 2, 3, 1)]
PLAIN = slide_info(bounds=None)
AREA = 12 / 2 * 64 * np.sin(np.pi / 6) * 0.25 * 0.26

JSON_FORMATS: dict[str, Callable[[Any], Any]] = {
    "QuPath detections": qupath_export,
    "QuPath bare array": lambda p: qupath_export(p)["features"],
    "QuPath annotations": lambda p: [qupath_feature(k, polygon(*xy), "annotation") for k, xy in enumerate(p)],
    "StarDist": stardist_export,
    "InstanSeg": instanseg_python,
    "HoVer-NeXt": hovernext_polygons,
    "CellViT GeoJSON": cellvit_geojson,
    "CellViT": cellvit_cells,
    "HoVer-Net": lambda p: hovernet_cells(p, 40),
}
POINT_FORMATS: dict[str, Callable[[Any], Any]] = {
    "QuPath points": lambda p: [qupath_feature(k, {"type": "Point", "coordinates": [*xy]}) for k, xy in enumerate(p)],
    "CellViT points": lambda p: cellvit_geojson(p, points=True),
    "CellViT detection": lambda p: cellvit_cells(p, contours=False),
}


def _check_balance(r: NucleiReport) -> None:
    assert r.read == r.kept + r.outside + r.not_finite + r.duplicates + r.invalid + r.other, r


def _places(nuclei: ForeignNuclei) -> np.ndarray:
    _check_balance(nuclei.report)
    assert len(nuclei) == nuclei.report.kept == len(nuclei.source_id) == len(nuclei.uuid)
    return nuclei.cells.centroid_xy


@pytest.mark.parametrize("ending", [".geojson", ".json.gz"])
@pytest.mark.parametrize("name", JSON_FORMATS)
def test_outlines_of_every_tool(tmp_path: Path, name: str, ending: str) -> None:
    path = write_json(tmp_path / f"cells{ending}", JSON_FORMATS[name](SHUFFLED))
    nuclei = read_nuclei(path, PLAIN)
    assert np.allclose(_places(nuclei), PLACES, atol=1e-4)
    cells = nuclei.cells
    assert cells.contour_xy is not None and cells.contour_start is not None
    assert np.diff(cells.contour_start).tolist() == [12] * 5
    box = ring_bounds(cells.contour_xy, cells.contour_start)
    assert np.allclose(box, [[x - 8, y - 8, x + 8, y + 8] for x, y in PLACES], atol=1e-3)
    assert np.allclose(cells.area_um2, AREA, rtol=1e-4)
    assert cells.row.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", POINT_FORMATS)
def test_points_of_every_tool(tmp_path: Path, name: str) -> None:
    nuclei = read_nuclei(write_json(tmp_path / "cells.json", POINT_FORMATS[name](SHUFFLED)), PLAIN)
    assert np.array_equal(_places(nuclei), PLACES)
    assert nuclei.cells.contour_xy is None


def test_classes_ids_and_scores(tmp_path: Path) -> None:
    def read(content: Any, source: Source | None = None) -> ForeignNuclei:
        return read_nuclei(write_json(tmp_path / "c.json", content), PLAIN, source=source)

    nuclei = read(qupath_export(PLACES))
    assert nuclei.source_id.tolist() == nuclei.uuid.tolist() == [uuid_at(k) for k in range(5)]
    assert nuclei.class_name is not None and nuclei.class_name.names[nuclei.class_name.codes[0]] == "Tumor"
    assert nuclei.cells.score.tolist() == [0.75] * 5 and nuclei.report.other == 1
    cellvit = read(cellvit_cells(PLACES))
    assert cellvit.class_name is not None and cellvit.class_name.names == ("Neo", "Inflammatory")
    assert cellvit.class_name.codes.tolist() == [0, 1, 0, 1, 0]
    assert cellvit.source_id.tolist() == list("01234") and set(cellvit.uuid) == {""}
    older = cellvit_cells(PLACES) | {"type_map": {"Background": 0, "Neo": 1, "Inflammatory": 2}}
    older_names = read(older).class_name
    assert older_names is not None and older_names.names == cellvit.class_name.names
    multi = read(cellvit_geojson(PLACES))
    assert multi.source_id[0] == f"{uuid_at(7000)}#0" and multi.source_id[1] == f"{uuid_at(7001)}#0"
    assert read(instanseg_python(PLACES)).class_name is None
    numbered = read(hovernext_instances([(x / 2, y * 0.26 / 0.5) for x, y in PLACES]), Source(mpp=0.5))
    assert np.allclose(numbered.cells.centroid_xy, PLACES) and numbered.source_id[0] == "10"


def test_magnification_of_hovernet(tmp_path: Path) -> None:
    half = [(x / 2, y / 2) for x, y in PLACES]
    nuclei = read_nuclei(write_json(tmp_path / "c.json", hovernet_cells(half, 20)), PLAIN)
    assert np.allclose(_places(nuclei), PLACES)


def test_class_inst_needs_its_pixel_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--cells-mpp"):
        read_nuclei(write_json(tmp_path / "class_inst.json", hovernext_instances(PLACES)), PLAIN)


@pytest.mark.parametrize("name", ["QuPath detections", "CellViT", "TSV of QuPath", "CSV"])
def test_bounds_are_added_to_what_qupath_shows(tmp_path: Path, name: str) -> None:
    info = slide_info()  # bounds begin at (100, 200)
    in_um = {"Centroid X µm": [x * 0.25 for x, _ in PLACES], "Centroid Y µm": [y * 0.26 for _, y in PLACES]}
    path = {
        "QuPath detections": lambda: write_json(tmp_path / "c.geojson", qupath_export(PLACES)),
        "CellViT": lambda: write_json(tmp_path / "c.json", cellvit_cells(PLACES)),
        "TSV of QuPath": lambda: write_table(tmp_path / "m.tsv", {"Image": ["a"] * 5, **in_um}),
        "CSV": lambda: write_table(tmp_path / "c.csv", {"x": [x for x, _ in PLACES], "y": [y for _, y in PLACES]}),
    }[name]()
    shift = (100, 200) if "QuPath" in name else (0, 0)
    nuclei = read_nuclei(path, info)
    assert np.allclose(np.sort(nuclei.cells.centroid_xy, axis=0), np.sort(np.add(PLACES, shift), axis=0), atol=1e-4)
    level0 = read_nuclei(path, info, origin="level0")
    assert np.allclose(np.sort(level0.cells.centroid_xy, axis=0), np.sort(PLACES, axis=0), atol=1e-4)


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".tsv", ".parquet"])
@pytest.mark.parametrize("unit", ["px", "um"])
def test_tables(tmp_path: Path, ending: str, unit: Any) -> None:
    size = (1, 1) if unit == "px" else (0.25, 0.26)
    columns = {
        "note": ["a"] * 5, "id": [f"n{k}" for k in range(5)], "X": [x * size[0] for x, _ in PLACES],
        "Y": [y * size[1] for _, y in PLACES], "class": ["T", "", "T", "S", "S"], "score": [0.5, 2, 0.5, 1, 0],
    }  # fmt: skip
    nuclei = read_nuclei(write_table(tmp_path / f"cells{ending}", columns), PLAIN, unit=unit)
    assert np.allclose(_places(nuclei), PLACES)
    assert nuclei.source_id.tolist() == columns["id"] and nuclei.class_name is not None
    assert nuclei.class_name.names == ("T", "S") and nuclei.class_name.codes.tolist() == [0, -1, 0, 1, 1]
    assert np.array_equal(nuclei.cells.score, np.array([0.5, np.nan, 0.5, 1, 0], np.float32), equal_nan=True)


def _alignment() -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Return a matrix from the slide's pixels to the assay's, turned and shifted, and PLACES in the assay's µm."""
    matrix = np.array([[0.02, 1.17, 300.0], [-1.17, 0.02, 5000.0], [0, 0, 1]])
    pixels = np.array(PLACES) @ matrix[:2, :2].T + matrix[:2, 2]
    return matrix, [(x, y) for x, y in (pixels * 0.2125).tolist()]


@pytest.mark.parametrize("name", ["cells.parquet", "cells.csv.gz", "nucleus_boundaries.parquet"])
def test_xenium_with_an_alignment(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 20)  # a boundary goes over the end of a batch
    matrix, in_um = _alignment()
    boundaries = "boundaries" in name
    path = write_table(tmp_path / name, xenium_boundaries(in_um, 2.0) if boundaries else xenium_cells(in_um))
    np.savetxt(tmp_path / "matrix.csv", matrix, delimiter=",", fmt="%.17g")
    nuclei = read_nuclei(path, PLAIN, alignment=load_alignment(tmp_path / "matrix.csv"))
    assert np.allclose(_places(nuclei), PLACES, atol=1e-3)
    assert nuclei.source_id.tolist() == [f"aaaa{k:04d}-1" for k in range(5)]
    assert (nuclei.cells.contour_xy is not None) == boundaries
    assert boundaries or nuclei.cells.area_um2.tolist() == [31.5] * 5
    (tmp_path / "experiment.xenium").write_text(json.dumps({"pixel_size": 0.425}))
    doubled = matrix.copy()
    doubled[:2] /= 2
    assert np.allclose(read_nuclei(path, PLAIN, alignment=doubled).cells.centroid_xy, PLACES, atol=1e-3)


def test_alignment_the_other_way_and_none(tmp_path: Path) -> None:
    matrix, in_um = _alignment()
    path = write_table(tmp_path / "cells.parquet", xenium_cells(in_um))
    backwards = np.linalg.inv(matrix) @ np.diag([1 / 0.2125, 1 / 0.2125, 1])
    turned = Source(alignment=backwards, direction="cells-to-slide")
    assert np.allclose(read_nuclei(path, PLAIN, source=turned).cells.centroid_xy, PLACES, atol=1e-6)
    same = write_table(tmp_path / "cells.csv.gz", xenium_cells([(x * 0.25, y * 0.26) for x, y in PLACES]))
    assert np.allclose(read_nuclei(same, PLAIN).cells.centroid_xy, PLACES)


@pytest.mark.parametrize("text", ["1,0\n0,1\n", "a,b,c\n", "1,0,0\n1,0,0\n0,0,1\n", "1,0,0\n0,1,0\n1,1,1\n"])
def test_a_bad_alignment_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(UsageError, match=r"m\.csv: .*matrix.*expected 3 rows of 3"):
        load_alignment(tmp_path / "m.csv")


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    bow_tie = [[500, 500], [520, 520], [520, 500], [500, 520], [500, 500]]
    two = {"type": "MultiPolygon", "coordinates": [[ring(600, 600, 3)], [ring(640, 600)]]}
    features = [
        qupath_feature(0, polygon(100, 100)),
        qupath_feature(1, polygon(100, 100)),
        qupath_feature(0, polygon(200, 100)),
        qupath_feature(3, polygon(5000, 100)),
        qupath_feature(4, polygon(-20, 100)),
        qupath_feature(5, {"type": "Point", "coordinates": [float("nan"), 3.0]}),
        qupath_feature(6, {"type": "Polygon", "coordinates": [[[1, 1], [None, 2], [3, 3], [1, 1]]]}),
        qupath_feature(7, {"type": "Polygon", "coordinates": [[[1, 1], [9, 9], [1, 1]]]}),
        qupath_feature(8, {"type": "Polygon", "coordinates": [bow_tie]}),
        qupath_feature(9, two),
        qupath_feature(10, {"type": "LineString", "coordinates": [[1, 1], [2, 2]]}),
        {"type": "Feature", "id": "x", "geometry": None, "properties": None},
        qupath_feature(12, {"type": "Point", "coordinates": [700, 700]}),
        qupath_feature(13, polygon(800, 800), "annotation"),
        "no feature",
    ]
    nuclei = read_nuclei(write_json(tmp_path / "c.json", features), PLAIN)
    _places(nuclei)
    report = nuclei.report
    assert (report.read, report.kept, report.outside, report.duplicates) == (15, 5, 2, 1)
    assert (report.not_finite, report.invalid, report.other) == (5, 1, 1)
    assert (report.repaired, report.multipart, report.repeated_ids) == (1, 1, 1)
    assert nuclei.source_id.tolist().count(uuid_at(0)) == 2 and nuclei.uuid.tolist().count(uuid_at(0)) == 1
    assert [640.0, 600.0] in np.round(nuclei.cells.centroid_xy).tolist()
    assert nuclei.cells.contour_start is not None and 8 in np.diff(nuclei.cells.contour_start)  # the point
    assert report.in_words().startswith("5 of 15 nuclei taken (2 outside the slide; 5 without finite coordinates")


def test_bad_rows_of_a_table_are_counted(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,x,y\na,10,20\nb,nan,3\nc,text,3\nd,,\ne,10,20\nf,1,2,3\ng,-1,5\n")
    report = read_nuclei(tmp_path / "c.csv", PLAIN).report
    _check_balance(report)
    assert (report.read, report.kept, report.not_finite) == (7, 1, 3)
    assert (report.duplicates, report.invalid, report.outside) == (1, 1, 1)


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.geojson", b'{"type": "FeatureCollection", "features": [{"type": "Fea', "not valid JSON at character"),
        ("a.geojson", b'[{"type": "Feature"} {"type": "Feature"}]', "not valid JSON at character 21"),
        ("a.json", b'{"hello": 1}', "expected GeoJSON"),
        ("a.json", b"hello", "expected GeoJSON"),
        ("a.json", b"", "expected GeoJSON"),
        ("a.json", b"[\xff\xfe]", "cannot be read as text"),
        ("a.geojson.gz", b"no gzip", "cannot be"),
        ("a.geojson.gz", gzip.compress(b"[" + b'{"a": 1},' * 9000, mtime=0)[:60], "is the file complete"),
        ("a.zip", b"no zip", "cannot be unpacked"),
        ("a.json.snappy", b"\x05ab", "not compressed by snappy"),
        ("a.csv", b"left,right\n1,2\n", "columns left, right; expected columns x and y"),
        ("a.csv", b"", "expected columns x and y"),
        ("a.parquet", b"PAR1no", "cannot be read as a table"),
        ("a.dat", b"", "pickle"),
        ("a.xyz", b"", "--cells takes GeoJSON"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, raw: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UsageError) as error:
        read_nuclei(tmp_path / name, PLAIN)
    text = str(error.value)
    assert name in text and words in text and "\n" not in text


def test_all_outside_names_the_flags(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not one of 1 nuclei lies on the slide; check --cells-unit"):
        read_nuclei(write_table(tmp_path / "c.csv", {"x": [9e5], "y": [9e5]}), PLAIN)


def test_an_empty_file_gives_no_nuclei(tmp_path: Path) -> None:
    nuclei = read_nuclei(write_json(tmp_path / "c.json", {"type": "FeatureCollection", "features": []}), PLAIN)
    assert len(nuclei) == 0 and nuclei.report == NucleiReport()


def test_packed_and_line_by_line(tmp_path: Path) -> None:
    content = json.dumps(qupath_export(SHUFFLED))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("cells-000.geojson", content)
        archive.writestr("readme.txt", "not read")
    (tmp_path / "c.json.snappy").write_bytes(pa.Codec("snappy").compress(content.encode(), asbytes=True))
    features = qupath_export(SHUFFLED)["features"]
    (tmp_path / "c.geojsonl").write_text("\n".join(json.dumps(f) for f in features))
    for name in ("c.zip", "c.json.snappy", "c.geojsonl"):
        assert np.allclose(read_nuclei(tmp_path / name, PLAIN).cells.centroid_xy, PLACES, atol=1e-4), name


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_windows_and_blocks_do_not_show(tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window shorter than an object makes every object be walked key by key, as CellViT's large ones are."""
    for k, name in enumerate(["QuPath detections", "CellViT GeoJSON", "CellViT"]):
        path = write_json(tmp_path / f"{k}.json", JSON_FORMATS[name](SHUFFLED))
        monkeypatch.undo()
        whole = read_nuclei(path, PLAIN)
        monkeypatch.setattr(json_stream, "WINDOW_CHARS", window)
        monkeypatch.setattr(drafts, "BLOCK_ROWS", 2)
        pieces = read_nuclei(path, PLAIN)
        for field in ("centroid_xy", "contour_xy", "contour_start", "area_um2", "score"):
            a, b = (np.asarray(getattr(n.cells, field)) for n in (whole, pieces))
            assert np.array_equal(a, b, equal_nan=True), (name, field)
        assert whole.source_id.tolist() == pieces.source_id.tolist() and whole.report == pieces.report


def _import(tmp_path: Path, path: Path, **given: Any) -> Path:
    slide = slide_from_array(np.full((1600, 1000, 3), 255, np.uint8), 0.25)
    import_nuclei(path, slide, tmp_path / "out", **given)
    return tmp_path / "out"


def test_ids_survive_the_round_trip_through_qupath(tmp_path: Path) -> None:
    out = _import(tmp_path, write_json(tmp_path / "c.geojson", qupath_export(PLACES)))
    with open_table(out / "cells.zarr") as table:
        assert list(table.vector("uuid")) == list(table.vector("source_id"))
        assert set(table.vector("uuid")) == {uuid_at(k) for k in range(5)}
        word = table.column("source_class")
        assert isinstance(word, Categorical) and set(np.array(word.names)[word.codes]) == {"Tumor"}
        exported = write_geojson(table, out)
    assert file_faults(exported) == []
    by_id = {f["id"]: np.mean(f["geometry"]["coordinates"][0][:-1], axis=0) for f in read_features(exported)}
    assert all(np.allclose(by_id[uuid_at(k)], place, atol=0.01) for k, place in enumerate(PLACES))
    again = read_nuclei(exported, slide_info(None, 1000, 1600))
    assert set(again.uuid) == {uuid_at(k) for k in range(5)}


def test_other_ids_stand_in_their_own_column(tmp_path: Path) -> None:
    columns = {"id": ["n0", "n1", uuid_at(5)], "x": [10.0, 20.0, 30.0], "y": [10.0, 10.0, 10.0]}
    path = write_table(tmp_path / "c.csv", columns)
    out = _import(tmp_path, path)
    record = read_record(out)
    assert record is not None and record.status == "done" and record.counts.nuclei == 3
    assert record.config["cells_report"]["kept"] == 3 and record.config["cells"]["unit"] == "px"
    with open_table(out / "cells.zarr") as table:
        assert table.kind == "point" and list(table.vector("source_id")) == columns["id"]
        uuids = list(table.vector("uuid"))
        assert uuids[2] == uuid_at(5) and len(set(uuids)) == 3 and all(len(text) == 36 for text in uuids)
    _import(tmp_path, path)
    with open_table(out / "cells.zarr") as table:
        assert list(table.vector("uuid")) == uuids
    assert not list(out.glob(".cells*"))


def test_a_table_of_ours_keeps_everything(tmp_path: Path) -> None:
    cells = random_cells.ellipses(60, width=1000, height=1600)
    info = slide_info(None, 1000, 1600)
    with random_cells.write_table(tmp_path, cells, slide=info) as table:
        uuids, classes = list(table.vector("uuid")), table.column("class")
    nuclei = read_nuclei(tmp_path / "cells.zarr", info)
    assert np.array_equal(nuclei.cells.centroid_xy, cells.centroid_xy)
    assert np.array_equal(nuclei.cells.contour_xy, cells.contour_xy)
    assert nuclei.source_id.tolist() == [str(k) for k in range(60)] and list(nuclei.uuid) == uuids
    assert isinstance(classes, Categorical) and nuclei.class_name is not None
    assert np.array_equal(nuclei.class_name.codes, classes.codes) and nuclei.class_name.names == classes.names
    with pytest.raises(UsageError, match=r"made for a slide of \(1000, 1600\) px"):
        read_nuclei(tmp_path / "cells.zarr", PLAIN)
    (tmp_path / "cells.zarr").rename(tmp_path / "other")
    with pytest.raises(UsageError, match=r"no cells\.zarr of cellslide"):
        read_nuclei(tmp_path, info)


def test_exports_of_ours_are_read_again(tmp_path: Path) -> None:
    from cellslide.formats.registry import export_table

    with random_cells.write_table(tmp_path, random_cells.ellipses(40), slide=slide_info()) as table:
        files = export_table(table, tmp_path, ("geojson", "parquet", "csv"))
        xy, uuids = table.matrix("spatial"), sorted(table.vector("uuid"))
    for name, path in files.items():
        nuclei = read_nuclei(path, slide_info())
        assert sorted(nuclei.uuid) == uuids, name
        error = np.abs(np.sort(nuclei.cells.centroid_xy, axis=0) - np.sort(xy, axis=0)).max()
        assert error < (0.5 if name == "geojson" else 1e-9), name
        assert (nuclei.cells.contour_xy is None) == (name == "csv")


def test_a_failed_import_leaves_what_was_there(tmp_path: Path) -> None:
    out = _import(tmp_path, write_table(tmp_path / "c.csv", {"x": [10.0], "y": [10.0]}))
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError):
        _import(tmp_path, tmp_path / "bad.csv")
    with open_table(out / "cells.zarr") as table:
        assert len(table) == 1
