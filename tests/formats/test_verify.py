"""`cellslide verify`: finished folders agree, of every kind and in every format; each single damage is named."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from click.testing import CliRunner

from cellslide.classify import classify_table
from cellslide.cli.main import cli
from cellslide.config import OutputConfig, SegmentConfig, TissueConfig
from cellslide.errors import UsageError
from cellslide.formats import geojson
from cellslide.formats.registry import export_table
from cellslide.formats.verify import find_folders, verify_folder
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import segment_slide
from cellslide.slides.inputs import SlideInput
from cellslide.slides.slide import open_slide
from cellslide.store.cell_table import open_table
from cellslide.types import ModelKind
from tests.classify.test_rows import BREAST, INFER, classifier, rule
from tests.painted import DISC, PINK_DISC, grid_centres, paint_slide
from tests.support.fakes import CLASSES, fake_model
from tests.support.random_cells import BOUNDS, as_kind, ellipses, model_spec, slide_info
from tests.support.random_cells import write_table as write_random

FORMATS = ("zarr", "geojson", "parquet", "csv")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a slide that is segmented, in all formats."""
    root = tmp_path_factory.mktemp("verify")
    places = grid_centres(500, 400, 50)
    colors = [(DISC, PINK_DISC)[k % 2] for k in range(len(places))]
    paint_slide(root / "s.tif", 500, 400, 0.5, places, 7.0, disc_color=colors)
    config = SegmentConfig(
        tissue=TissueConfig(enabled=False), infer=INFER, output=OutputConfig(formats=FORMATS, profile="full")
    )
    with open_segmenter(fake_model(classes=CLASSES), config) as segmenter:
        segment_slide(SlideInput(root / "s.tif", slide_id="s"), segmenter, root / "out")
    return root / "out" / "s"


@pytest.fixture
def folder(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done, tmp_path / "out" / "s")
    return tmp_path / "out" / "s"


def test_a_finished_slide_agrees(done: Path) -> None:
    verdict = verify_folder(done)
    assert verdict.faults == [] and verdict.notes == []
    assert verdict.cells == 80
    assert verdict.checked == [
        "run.json", "the slide", "cells.zarr", "cells.geojson.gz", "cells.parquet", "cells.csv.gz",
    ]  # fmt: skip


def test_a_typed_slide_agrees(folder: Path, done: Path) -> None:
    with open_slide(done.parent.parent / "s.tif") as slide:
        classify_table(folder, slide, classifier(), rule(abstain=0.9), BREAST)
    verdict = verify_folder(folder)
    assert verdict.faults == []
    assert "cells.csv.gz" in verdict.checked


@pytest.mark.parametrize(("kind", "origin"), [("mask", "bounds"), ("box", "level0"), ("point", "bounds")])
def test_every_kind_and_origin_agrees(tmp_path: Path, kind: ModelKind, origin: geojson.Origin) -> None:
    table = random_table(tmp_path, kind, 300)
    with table:
        export_table(table, tmp_path, FORMATS, origin)
    assert [fault for fault in verify_folder(tmp_path).faults if not fault.startswith("run.json")] == []


def random_table(folder: Path, kind: ModelKind, n: int):
    cells = as_kind(ellipses(n), kind)
    return write_random(folder, cells, model_spec(kind), slide_info(BOUNDS))


def test_zips_of_many_entries_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geojson, "ENTRY_CELLS", 100)
    monkeypatch.setattr(geojson, "BLOCK_CELLS", 50)
    with random_table(tmp_path, "mask", 330) as table:
        export_table(table, tmp_path, ("geojson",))
    verdict = verify_folder(tmp_path)
    assert "cells.geojson.zip" in verdict.checked
    assert [fault for fault in verdict.faults if not fault.startswith("run.json")] == []


def test_no_cells_agree(tmp_path: Path) -> None:
    with random_table(tmp_path, "mask", 0) as table:
        export_table(table, tmp_path, FORMATS)
    assert [fault for fault in verify_folder(tmp_path).faults if not fault.startswith("run.json")] == []


def edit_record(folder: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads((folder / "run.json").read_text())
    edit(content)
    (folder / "run.json").write_text(json.dumps(content))


def edit_geojson(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / "cells.geojson.gz"
    content = json.loads(gzip.decompress(path.read_bytes()))
    edit(content)
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


def edit_csv(folder: Path, edit: Callable[[list[str]], object]) -> None:
    path = folder / "cells.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    edit(lines)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def rename_first(lines: list[str]) -> None:
    lines[1] = lines[1].replace("blue", "green").replace("pink", "green")


def edit_parquet(folder: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    path = folder / "cells.parquet"
    table = pq.read_table(path)
    path.unlink()
    pq.write_table(edit(table), path)


def set_obs(folder: Path, name: str, row: int, value: object) -> None:
    zarr.open_group(folder / "cells.zarr", mode="r+")[f"tables/cells/obs/{name}"][row] = value


def set_column(table: pa.Table, name: str, values: object) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "count in the record": (lambda f: edit_record(f, lambda c: c["counts"].update(nuclei=79)), "run.json says 79"),
    "setting in the record": (lambda f: edit_record(f, lambda c: c["config"]["spec"].update(mpp=0.25)), "spec.mpp"),
    "hash in the record": (
        lambda f: edit_record(f, lambda c: c["weights"][0].update(sha256="0" * 63 + "1")), "weights.0.sha256",
    ),
    "no hash": (lambda f: edit_record(f, lambda c: c["weights"][0].update(sha256="")), "weights fake have no hash"),
    "not complete": (lambda f: edit_record(f, lambda c: c.update(status="interrupted")), "status interrupted"),
    "no record": (lambda f: (f / "run.json").unlink(), "run.json: missing"),
    "no JSON": (lambda f: (f / "run.json").write_text("{"), "run.json: cannot be read"),
    "a place in the table": (lambda f: set_obs(f, "x", 3, 77.5), "uuid cannot be right in 1 rows"),
    "a number in the table": (lambda f: set_obs(f, "cell_id", 3, 5), "cell_id cannot be right in 1 rows"),
    "a share in the table": (lambda f: set_obs(f, "class_prob", 0, 1.5), "class_prob cannot be right in 1 rows"),
    "a score in the table": (lambda f: set_obs(f, "score", 0, 0.25), "score differs in 1 rows"),
    "an outline": (lambda f: (f / "cells.zarr/shapes/nuclei/shapes.parquet").unlink(), "cells.zarr: cannot be read"),
    "the table": (lambda f: shutil.rmtree(f / "cells.zarr"), "cells.zarr: cannot be read"),
    "a feature less": (lambda f: edit_geojson(f, lambda c: c["features"].pop()), "79 features, cells.zarr has 80"),
    "a feature more": (lambda f: edit_geojson(f, lambda c: c["features"].append({})), "81 features"),
    "an id": (lambda f: edit_geojson(f, lambda c: c["features"][2].update(id="x")), "id differs in 1 features"),
    "a class": (
        lambda f: edit_geojson(f, lambda c: c["features"][2]["properties"]["classification"].update(name="green")),
        "class differs in 1 features",
    ),
    "a place": (
        lambda f: edit_geojson(f, lambda c: c["features"][2]["geometry"]["coordinates"][0][0].reverse()),
        "1 features lie elsewhere",
    ),
    "a cut file": (lambda f: cut(f / "cells.geojson.gz"), "cells.geojson.gz: cannot be read"),
    "both files": (lambda f: shutil.copy(f / "cells.geojson.gz", f / "cells.geojson.zip"), "left from an earlier run"),
    "a line less": (lambda f: edit_csv(f, lambda lines: lines.pop()), "79 rows, cells.zarr has 80"),
    "a line twice": (lambda f: edit_csv(f, lambda lines: lines.append(lines[-1])), "81 rows"),
    "a word": (lambda f: edit_csv(f, rename_first), "class differs in 1 rows"),
    "a cut table": (lambda f: cut(f / "cells.csv.gz"), "cells.csv.gz: cannot be read"),
    "a column less": (lambda f: edit_parquet(f, lambda t: t.drop_columns(["uuid"])), "its columns are not those"),
    "a value": (
        lambda f: edit_parquet(f, lambda t: set_column(t, "area_um2", np.float32(t["area_um2"].to_numpy()) + 1)),
        "area_um2 differs in 80 rows",
    ),
    "a shape": (
        lambda f: edit_parquet(f, lambda t: set_column(t, "geometry", t["geometry"].to_pylist()[::-1])),
        "geometry differs in 80 rows",
    ),
}  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_named(folder: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(folder)
    faults = verify_folder(folder).faults
    assert any(words in fault for fault in faults), faults


def test_another_slide_under_the_name_is_seen(done: Path, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "s.tif"
    shutil.copy(done.parent.parent / "s.tif", other)
    for place in (folder / "run.json",):
        place.write_text(place.read_text().replace(str(done.parent.parent / "s.tif"), str(other)))
    other.write_bytes(other.read_bytes() + b"x")
    assert any("the slide" in fault and "another slide" in fault for fault in verify_folder(folder).faults)
    other.unlink()
    verdict = verify_folder(folder)
    assert not any("the slide" in fault for fault in verdict.faults)
    assert any("not here" in note for note in verdict.notes)


def test_the_command_looks_at_all_and_ends_with_1(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out" / "bad")
    edit_geojson(tmp_path / "out" / "bad", lambda c: c["features"].pop())
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "bad  differs  80 nuclei" in result.stdout and "s  agrees  80 nuclei" in result.stdout
    assert "1 of 2 slides" in result.stderr and len(result.stderr.splitlines()) == 1
    lines = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--json"]).stdout.splitlines()
    assert [json.loads(line)["agrees"] for line in lines] == [False, True]
    assert CliRunner().invoke(cli, ["verify", str(folder)]).exit_code == 0
    assert CliRunner().invoke(cli, ["verify", str(tmp_path)]).exit_code == 2


def test_verifying_changes_nothing(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*")}
    verify_folder(folder)
    assert {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*")} == before


def test_folders_are_found_once(folder: Path, tmp_path: Path) -> None:
    assert find_folders([folder.parent, folder]) == [folder]
    with pytest.raises(UsageError, match="no folder of a slide"):
        find_folders([tmp_path / "nothing"])


def test_left_behind_by_a_killed_run_is_told(folder: Path) -> None:
    (folder / "cells.zarr.tmp-1").mkdir()
    (folder / ".run.json.0123.tmp").touch()
    verdict = verify_folder(folder)
    assert verdict.agrees and all(any(name in note for note in verdict.notes) for name in ("tmp-1", ".run.json.0123"))


def test_the_table_is_what_is_compared_with(folder: Path) -> None:
    with open_table(folder / "cells.zarr") as table:
        export_table(table, folder, ("geojson",), profile="lean")
    assert verify_folder(folder).agrees
