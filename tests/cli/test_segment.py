"""`cellslide segment` as users call it: files, exit codes, JSON lines, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cellslide.cli.main import cli
from cellslide.store.cell_table import open_table
from cellslide.types import ModelSpec
from cellslide.weights import LoadedModel
from tests.conftest import CHECKOUT
from tests.painted import paint_slide
from tests.support.fakes import fake_model

FLAGS = ("--no-tissue", "--device", "cpu", "--workers", "0", "--no-progress")


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """The fake network stands for the one that ships."""
    loaded = fake_model()
    monkeypatch.setattr("cellslide.weights.load_model", lambda *args: loaded)
    return loaded


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    path = tmp_path / "two.tif"
    paint_slide(path, 400, 300, 0.5, [(100, 100), (250, 200)], 7.0)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["segment", *map(str, arguments)])


def test_one_slide_gives_its_folder(slide: Path, tmp_path: Path) -> None:
    result = run(slide, "-o", tmp_path / "out", *FLAGS, "--format", "zarr,geojson,csv")
    assert result.exit_code == 0, result.output
    names = {p.name for p in (tmp_path / "out" / "two").iterdir()}
    assert names == {"cells.zarr", "cells.geojson.gz", "cells.csv.gz", "tissue.geojson", "run.json", "report.html"}
    assert open_table(tmp_path / "out" / "two" / "cells.zarr").n == 2
    assert "two" in result.stdout and "done" in result.stdout
    assert "skipped" in run(slide, "-o", tmp_path / "out", *FLAGS).stdout


def test_json_lines_are_all_there_is_on_stdout(slide: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"no slide")
    out = tmp_path / "out"
    first = run(bad, slide, "-o", out, *FLAGS, "--log-json")
    lines = [json.loads(line) for line in first.stdout.splitlines()]
    assert [(o["slide"], o["status"], o["cells"]) for o in lines] == [("bad", "failed", None), ("two", "done", 2)]
    assert set(lines[0]) == {"slide", "status", "cells", "seconds", "error", "verdict"}
    assert lines[0]["error"] and lines[1]["error"] is None
    assert first.exit_code == 1 and "cellslide: bad: " in first.stderr and "Traceback" not in first.stderr
    second = run(bad, slide, "-o", out, *FLAGS, "--log-json", "-q")
    assert [json.loads(line)["status"] for line in second.stdout.splitlines()] == ["failed", "skipped"]


def test_unknown_pixel_size_is_exit_2_and_the_flag_mends_it(tmp_path: Path) -> None:
    path = tmp_path / "nompp.tif"
    paint_slide(path, 300, 200, None, [(100, 100)], 7.0)
    result = run(path, "-o", tmp_path / "out", *FLAGS)
    assert result.exit_code == 2 and "--mpp" in result.stderr and "nompp" in result.stderr
    assert run(path, "-o", tmp_path / "out", *FLAGS, "--mpp", "0.5").exit_code == 0
    content = json.loads((tmp_path / "out" / "nompp" / "run.json").read_text())
    assert content["status"] == "done" and content["slide"]["mpp_source"] == "flag"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tile-size", "250"), "multiple of 16"),
        (("--tile-size", "10"), "--tile-size 10: must be 64 to 8192 px"),
        (("--overlap", "200"), "--overlap"),
        (("--mpp", "7"), "0.05 to 2"),
        (("--batch-size", "many"), "neither auto nor"),
        (("--shard", "3/2"), "I from 1 to N"),
        (("--format", "xml"), "must be among"),
        (("--device", "gpu"), "--device gpu"),
        (("--precision", "fp16", "--engine", "onnx"), "fp32 only"),
    ],
)
def test_wrong_usage_is_exit_2_and_says_why(
    slide: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = run(slide, "-o", tmp_path / "out", *FLAGS, *arguments)
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_missing_slides_and_devices(slide: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "none.svs", "-o", tmp_path / "out").exit_code == 2
    result = run(slide, "-o", tmp_path / "out", "--device", "cuda:99")
    assert result.exit_code == 3 and "cuda:99" in result.stderr


def test_settings_come_from_a_file_and_flags_win(slide: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "tile-size: 512\noverlap: 32\nno-tissue: true\ndevice: cpu\nworkers: 0\nformat: [zarr]\nbatch-size: 3\n"
    )
    assert run(slide, "-o", tmp_path / "out", "--config", config, "--overlap", "96", "--no-progress").exit_code == 0
    content = json.loads((tmp_path / "out" / "two" / "run.json").read_text())["config"]
    assert content["tiles"] == {"size_px": 512, "overlap_px": 96}
    assert content["tissue"]["enabled"] is False and content["infer"]["batch_size"] == 3
    assert content["output"]["formats"] == ["zarr"]
    config.write_text("tile-sise: 512\n")
    result = run(slide, "-o", tmp_path / "out", "--config", config)
    assert result.exit_code == 2 and "no option --tile-sise" in result.stderr


def test_dry_run_writes_nothing(slide: Path, tmp_path: Path) -> None:
    result = run(slide, "-o", tmp_path / "out", *FLAGS, "--dry-run")
    assert (
        result.exit_code == 0
        and "two  4 tiles  about" in result.stdout
        and "4 tiles of 256 px at 0.5 µm/px" in result.stdout
    )
    assert not (tmp_path / "out").exists()


def test_shards_share_the_slides(tmp_path: Path) -> None:
    for k in range(5):
        paint_slide(tmp_path / f"s{k}.tif", 100, 80, 0.5, [(50, 40)], 7.0, (1,))
    seen = []
    for number in (1, 2):
        result = run(tmp_path / "s*.tif", "-o", tmp_path / "out", *FLAGS, "--shard", f"{number}/2", "--log-json")
        seen.append({json.loads(line)["slide"] for line in result.stdout.splitlines()})
    assert seen[0] | seen[1] == {f"s{k}" for k in range(5)} and not seen[0] & seen[1]


def test_a_slide_without_tissue_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "blank.tif"
    paint_slide(path, 900, 700, 0.5)
    result = run(path, "-o", tmp_path / "out", "--device", "cpu", "--no-progress")
    assert result.exit_code == 0 and "blank: no nuclei" in caplog.text


def test_a_region_has_the_origin_of_the_geojson(slide: Path, tmp_path: Path) -> None:
    roi = tmp_path / "roi.geojson"
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [[[0, 0], [150, 0], [150, 150], [0, 150], [0, 0]]]}))
    run(slide, "-o", tmp_path / "out", *FLAGS, "--roi", roi, "--geojson-origin", "level0")
    assert open_table(tmp_path / "out" / "two" / "cells.zarr").n == 1
    content = json.loads((tmp_path / "out" / "two" / "run.json").read_text())
    assert content["config"]["tissue"]["roi_origin"] == content["config"]["output"]["geojson_origin"] == "level0"


def test_help_has_units_defaults_and_examples() -> None:
    text = " ".join(run("--help-all").stdout.split())
    for words in (
        "in µm",
        "[default: auto]",
        "[default: cellslide-out]",
        "cellslide segment slide.svs -o out",
        "--shard I/N",
    ):
        assert words in text, words


SLOW_RUN = """
import sys, time
import cellslide.weights
from tests.support.fakes import FakeMask, fake_model

class Slow(FakeMask):
    def forward(self, x):
        time.sleep(0.1)
        return super().forward(x)

model = fake_model()
cellslide.weights.load_model = lambda *args: type(model)(model.spec, Slow(), None)
from cellslide.batch import run
from cellslide.cli.main import cli

run.STOP_S, run.END_S = 60, 80  # Longer than a loaded machine takes for one tile.
cli(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_cleanly_and_the_same_command_goes_on(tmp_path: Path, number: int, code: int) -> None:
    path, out = tmp_path / "long.tif", tmp_path / "out"
    places = [(x, y) for x in range(50, 1800, 100) for y in range(50, 1800, 100)]
    paint_slide(path, 1800, 1800, 0.5, places, 7.0)
    arguments = [
        "segment",
        str(path),
        "-o",
        str(out),
        *FLAGS[:-3],
        "--workers",
        "1",
        "--no-progress",
        "--batch-size",
        "1",
    ]
    command = [sys.executable, "-c", SLOW_RUN, *arguments]
    process = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
    record = out / "long" / "run.json"
    deadline = time.monotonic() + 100
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert "finished tiles are kept" in errors and "Traceback" not in errors
    assert json.loads(record.read_text())["status"] == "interrupted"
    assert list((out / "long" / ".parts").glob("part-*.npz")) and not (out / "long" / "cells.zarr").exists()
    result = run(*arguments[1:])
    assert result.exit_code == 0, result.output
    assert open_table(out / "long" / "cells.zarr").n == len(places)
    assert not (out / "long" / ".parts").exists()


def test_model_and_weights_reach_the_loader(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    loaded = fake_model()

    def load(*args: object) -> LoadedModel:
        asked.append(args)
        return loaded

    monkeypatch.setattr("cellslide.weights.load_model", load)
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"x")
    run(slide, "-o", tmp_path / "out", *FLAGS, "--model", "cellslide-nuclei-small", "--weights", weights)
    assert asked == [("cellslide-nuclei-small", weights)]
    assert isinstance(loaded.spec, ModelSpec)
