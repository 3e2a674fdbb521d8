"""Nuclei, lists, regions, weights and manifests from strangers: a clear error, or read; never code that runs."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import re
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cellslide.cli.main import cli
from cellslide.errors import CellslideError, UsageError, WeightsError
from cellslide.evaluate.dataset import read_dataset
from cellslide.formats.arrow_files import write_csv
from cellslide.formats.csv_text import as_written, harmless, harmless_column
from cellslide.formats.importers import import_nuclei, json_stream, read_nuclei
from cellslide.geometry.outlines import is_tangled, valid_rings
from cellslide.slides.inputs import expand_slides
from cellslide.slides.slide import Slide, slide_from_array
from cellslide.slides.tissue import load_roi
from cellslide.store.cell_table import open_table
from cellslide.types import ClassSpec
from cellslide.weights import load_model
from cellslide.weights.manifest import Manifest, read_entry
from tests.support.foreign_files import polygon, qupath_export, qupath_feature, write_json
from tests.support.hostile_files import Evil, bad_nuclei
from tests.support.random_cells import ellipses, model_spec, slide_info, write_table

PLACES = [(300.0, 300.0), (400.0, 420.0)]
BAD_NUCLEI = bad_nuclei()
FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\tx", "'=quoted", "''+two")


def nest(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def refused(path: Path, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read_nuclei(path, slide_info(None))
    assert path.name in str(caught.value)


DEEP = {
    "arrays": nest(200_000),
    "objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "in a feature": '{"type":"FeatureCollection","features":[{"geometry":' + nest(200_000) + "}]}",
    "a key": '{"rest":' + nest(200_000) + ',"features":[]}',
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_nesting_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "deep.geojson"
    path.write_text(DEEP[name])
    refused(path, "nested too deeply")
    with pytest.raises(UsageError, match="not GeoJSON"):
        load_roi(path, slide_info(None))


def test_collections_within_collections_are_read(tmp_path: Path) -> None:
    geometry: dict[str, Any] = polygon(300, 300)
    for _ in range(150):
        geometry = {"type": "GeometryCollection", "geometries": [geometry]}
    path = write_json(tmp_path / "deep.geojson", [qupath_feature(1, geometry)])
    assert len(read_nuclei(path, slide_info(None))) == 1


def circle(n: int, radius: float = 400.0) -> list[list[float]]:
    angle = np.arange(n) * 2 * np.pi / n
    ring = np.stack([1000 + radius * np.cos(angle), 1000 + radius * np.sin(angle)], axis=1).round(6).tolist()
    return [*ring, ring[0]]


def scribble(n: int) -> list[list[float]]:
    ring = np.random.default_rng(0).uniform(100, 2000, (n, 2)).round(2).tolist()
    return [*ring, ring[0]]


@pytest.mark.parametrize("tangled", [False, True])
def test_a_million_vertices(tmp_path: Path, tangled: bool) -> None:
    ring = scribble(1_000_000) if tangled else circle(1_000_000)
    big = qupath_feature(5, {"type": "Polygon", "coordinates": [ring]})
    path = write_json(tmp_path / "big.geojson", [big, *qupath_export(PLACES)["features"]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nuclei = read_nuclei(path, slide_info(None))
    assert nuclei.report.invalid == tangled
    assert nuclei.report.kept == 3 - tangled
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_a_region_of_many_vertices_is_taken_and_a_scribble_refused(tmp_path: Path) -> None:
    for name, ring in (("round", circle(30_000)), ("wild", scribble(100_000))):
        write_json(tmp_path / f"{name}.geojson", {"type": "Polygon", "coordinates": [ring]})
    roi = load_roi(tmp_path / "round.geojson", slide_info(None))
    assert roi.area == pytest.approx(np.pi * 400**2, rel=1e-3)
    with pytest.raises(UsageError, match="crosses itself too often"):
        load_roi(tmp_path / "wild.geojson", slide_info(None))


def test_lines_around_cells_are_not_tangled() -> None:
    import shapely

    rng = np.random.default_rng(1)
    angle, radius = np.arange(200_000) * 2 * np.pi / 200_000, rng.uniform(9_990, 10_010, 200_000)
    assert not is_tangled(shapely.Polygon(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)))
    eight = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    assert not is_tangled(eight)
    xy, start, alive = valid_rings(np.array([[0.0, 0], [10, 10], [10, 0], [0, 10]]), np.array([0, 4]))
    assert alive.all() and len(xy) == start[-1] == 3
    assert is_tangled(shapely.Polygon(scribble(5000)))


def test_a_value_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MOST_CHARS", 8 << 20)
    path = tmp_path / "bomb.geojson.gz"
    path.write_bytes(gzip.compress(b'{"type":"FeatureCollection","note":"' + b"0" * (64 << 20)))
    refused(path, "one value of more than")


@pytest.mark.parametrize("name", BAD_NUCLEI)
def test_damaged_files_of_nuclei_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BAD_NUCLEI[name])
    refused(tmp_path / name, re.escape(name))


def test_zip_entries_that_climb_out_are_only_read(tmp_path: Path) -> None:
    path = tmp_path / "in" / "up.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../up.geojson", json.dumps(qupath_export(PLACES)))
    assert len(read_nuclei(path, slide_info(None))) == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "up.zip"]


def test_formulas_in_a_csv_are_names_and_stay_so(tmp_path: Path) -> None:
    rows = [[f"{300 + 20 * k}", "300", name] for k, name in enumerate(FORMULAS)]
    with (tmp_path / "nuclei.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["x", "y", "class"], *([x, y, harmless(name)] for x, y, name in rows)])
    with slide_from_array(np.zeros((600, 600, 3), np.uint8), 0.25) as slide:
        assert imported_classes(slide, tmp_path / "nuclei.csv", tmp_path / "first") == list(FORMULAS)
        with open_table(tmp_path / "first" / "cells.zarr") as table:
            written = write_csv(table, tmp_path / "first")
        for row in csv.reader(gzip.decompress(written.read_bytes()).decode().splitlines()):
            assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in row if not is_number(cell)), row
        assert imported_classes(slide, written, tmp_path / "second", column="source_class") == list(FORMULAS)


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def imported_classes(slide: Slide, path: Path, folder: Path, column: str = "class") -> list[str]:
    """Import a CSV, whose classes stand in `column`, and return the source's class of each nucleus."""
    if column != "class":
        text = gzip.decompress(path.read_bytes()).decode()
        head, _, rest = text.partition("\n")
        path = folder.with_suffix(".csv")
        path.write_text(head.replace('"class"', '"own"').replace(f'"{column}"', '"class"') + "\n" + rest)
    import_nuclei(path, slide, folder)
    with open_table(folder / "cells.zarr") as table:
        found = table.column("source_class")
    return [found.names[code] for code in found.codes]


def test_quoting_is_exact_both_ways() -> None:
    import pyarrow as pa

    for text in (*FORMULAS, "plain", "'plain", "", "''", "a=b"):
        assert as_written(harmless(text)) == text
        assert not harmless(text).startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
        assert harmless_column(pa.array([text, "x", None])).to_pylist() == [harmless(text), "x", None]


def test_class_names_of_weights_are_no_formulas_either(tmp_path: Path) -> None:
    spec = model_spec(classes=tuple(ClassSpec(name, (k, 0, 0)) for k, name in enumerate(FORMULAS[:3])))
    with write_table(tmp_path, ellipses(50), spec) as table:
        text = gzip.decompress(write_csv(table, tmp_path, "full").read_bytes()).decode()
    head, *rows = csv.reader(text.splitlines())
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in head)
    assert {row[head.index("class")] for row in rows} <= {harmless(name) for name in FORMULAS}


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.ckpt", "w.bin", "old.pth", "plain.pth"])
@pytest.mark.parametrize("place", ["beside", "as a tensor"])
def test_code_in_weights_does_not_run(tmp_path: Path, name: str, place: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / name
    evil = Evil(marker)
    content = {"a": torch.zeros(1), "b": evil} if place == "as a tensor" else {"model_state_dict": {"a": 1}, "b": evil}
    if name == "plain.pth":
        path.write_bytes(pickle.dumps(content if place == "beside" else evil))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name != "old.pth")
    with pytest.raises(WeightsError, match=name):
        load_model(None, path)
    slide = tmp_path / "s.tif"
    slide.write_bytes(b"")
    done = CliRunner().invoke(cli, ["segment", str(slide), "-o", str(tmp_path / "out"), "--weights", str(path)])
    assert done.exit_code == 3 and len(done.stderr.strip().splitlines()) == 1
    assert not marker.exists()
    if name != "plain.pth":
        torch.load(path, weights_only=False).clear()  # the file is a trap indeed
        assert marker.exists()


@pytest.mark.parametrize("file", ["../secret.pth", "/etc/passwd", "a/../../secret.pth", "link.pth"])
def test_weights_entries_do_not_climb_out(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (tmp_path / "secret.pth").write_bytes(b"secret")
    (folder / "link.pth").symlink_to(tmp_path / "secret.pth")
    (folder / "model.yaml").write_text(f"id: evil\ntask: segment\narch: cellvta\nfile: {file}\n")
    with pytest.raises(CellslideError):
        from cellslide.weights.cache import require_file

        require_file(read_entry(folder / "model.yaml"))


@pytest.mark.parametrize("column", ["file", "mask", "points"])
@pytest.mark.parametrize("target", ["../secret.png", "/etc/hostname", "images/../../secret.png", "images/link.png"])
def test_manifests_of_data_sets_do_not_climb_out(tmp_path: Path, column: str, target: str) -> None:
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "images" / "a.png").write_bytes(b"")
    row = {"file": "images/a.png", "mask": "", "points": "", "width": "4", "height": "4"} | {column: target}
    (root / "manifest.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    with pytest.raises(UsageError, match="lies outside the data set folder"):
        read_dataset(root)


def test_yaml_runs_nothing(tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "run.yaml"
    file.write_text(f"model: !!python/object/apply:os.system ['touch {marker}']\n")
    done = CliRunner().invoke(cli, ["segment", "x.svs", "--config", str(file)])
    assert done.exit_code == 2 and "not valid YAML" in done.stderr
    with pytest.raises(WeightsError):
        Manifest.load(file)
    assert not marker.exists()


def test_lists_may_name_files_anywhere_but_only_for_reading(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    (tmp_path / "up.svs").write_bytes(b"")
    (folder / "list.csv").write_text('path,mpp\n"../up.svs",0.5\n')
    (item,) = expand_slides([folder / "list.csv"])
    assert item.slide_id == "up"
    (folder / "list.csv").write_text("path\n=1+1\n../gone/..\n../up.svs\n")
    ids = {item.slide_id for item in expand_slides([folder / "list.csv"])}
    assert "=1+1" in ids and ".." not in ids and "up" in ids
