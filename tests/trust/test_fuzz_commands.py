"""Commands with something good beside something that was damaged at random: the good is finished, the bad is named."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import cellslide.pipeline
import cellslide.weights
import cellslide.weights.classifier
from cellslide.cli.main import cli
from cellslide.evaluate.dataset import write_manifest
from cellslide.store.cell_table import open_table
from cellslide.view.answers import Viewer
from tests.painted import DISC, PINK_DISC, paint_slide
from tests.support.fake_classifier import fake_loaded
from tests.support.fakes import fake_model
from tests.support.foreign_files import qupath_export
from tests.support.labelled import add_image, discs

CENTRES = [(x, y) for y in (60, 120) for x in (60, 140, 220)]
TYPING = ("--device", "cpu", "--no-progress")
FINDING = (*TYPING, "--workers", "0")
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, float("nan"), 2**70, "", "x" * 100_000, "../../x", "\x1b[31m\n", [], {}, [1], [[[]]],
    {"a": {"b": 1}},
)  # fmt: skip
# What Python says of a fault of ours; what is written for users names no such thing.
UNFORESEEN = re.compile(
    r"Traceback|unexpected [A-Z]\w+: |: (Type|Key|Index|Attribute|Value|Zero\w+|Assertion|Recursion|Unicode\w+)Error: "
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def fakes() -> Iterator[None]:
    """Put networks that find and type painted discs in place of those that ship."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cellslide.weights, "load_model", lambda *_: fake_model())
        patch.setattr(cellslide.weights.classifier, "load_classifier", lambda *_: fake_loaded())
        yield


def call(*arguments: object) -> Result:
    """Run a command as the shell does; what it ends with must be foreseen."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
    assert result.exit_code in (0, 1, 2, 3), result.output
    found = UNFORESEEN.search(result.output)
    assert not found, f"{arguments[0]}: {result.output[-3000:]}"
    assert all(len(line) < 9_000 for line in result.output.splitlines())
    return result


@pytest.fixture(scope="module")
def made(fakes: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two slides, `good` and `bad`, and `out` with both found and typed."""
    root = tmp_path_factory.mktemp("fuzz")
    colors = [(DISC, PINK_DISC)[k % 2] for k in range(len(CENTRES))]
    for name in ("good", "bad"):
        paint_slide(root / f"{name}.tif", 280, 180, 0.5, CENTRES, 7.0, disc_color=colors, background="tissue")
    slides = [root / "good.tif", root / "bad.tif"]
    assert call("segment", *slides, "-o", root / "out", *FINDING).exit_code == 0
    assert call("classify", root / "out", "--organ", "breast", *TYPING).exit_code == 0
    assert call("export", root / "out", "--format", "csv").exit_code == 0
    return root


def spoil_json(rng: random.Random, path: Path) -> None:
    """Change, drop or nest one value of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    holder, key = content, rng.choice(sorted(content))
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.7:
        holder = holder[key]
        key = rng.choice(sorted(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(ODD)
    path.write_text(json.dumps(content), encoding="utf-8")


def spoil_bytes(rng: random.Random, path: Path) -> None:
    """Cut, flip, put in or empty bytes."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content) + 1)
    match rng.randrange(5):
        case 0:
            del content[at:]
        case 1:
            for _ in range(8):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case 2:
            content[at:at] = rng.randbytes(rng.randrange(1, 40))
        case 3:
            content = bytearray(rng.randbytes(rng.randrange(200)))
        case _:
            content[at : at + 40] = b'{"a":' * 5_000
    path.write_bytes(bytes(content))


def spoil_kind(rng: random.Random, path: Path) -> None:
    """Put a folder, a link that leads out, a pipe or nothing in the place of a file."""
    path.unlink()
    match rng.randrange(4):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path.parents[2] / "elsewhere")
        case 2 if hasattr(os, "mkfifo"):
            os.mkfifo(path)
        case _:
            pass


def spoil(rng: random.Random, path: Path) -> str:
    """Damage one file and say how."""
    ways: list[Callable[[random.Random, Path], None]] = [spoil_bytes, spoil_kind]
    if path.suffix == ".json":
        ways += [spoil_json] * 4
    way = rng.choice(ways)
    way(rng, path)
    return f"{way.__name__} {path}"


def files_of(folder: Path) -> list[Path]:
    """Return what may be damaged: the record as often as all the rest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    rest = [p for p in files if p.name != "report.html"]
    return [folder / "run.json"] * (len(rest) // 3) + rest


def check_good(result: Result, out: Path, where: str) -> None:
    """Fail unless the command went through, and named what is bad where it did not end well."""
    assert result.exit_code in (0, 1), f"{where}: {result.output[-2000:]}"
    if result.exit_code:
        assert str(out / "bad") in result.output, f"{where}: {result.output[-2000:]}"


@pytest.mark.parametrize("seed", range(16))
def test_a_damaged_folder_beside_a_good_one(
    seed: int, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng, out = random.Random(seed), tmp_path / "out"
    shutil.copytree(made / "out", out)
    whole = (out / "good" / "cells.csv.gz").read_bytes()
    where = spoil(rng, rng.choice(files_of(out / "bad")))
    for name in ("cells.csv.gz", "report.html"):
        (out / "good" / name).unlink()
    check_good(call("export", out, "--format", "csv"), out, where)
    assert (out / "good" / "cells.csv.gz").read_bytes() == whole, where
    check_good(call("report", out), out, where)
    assert (out / "good" / "report.html").is_file(), where
    agreed = call("verify", out)
    assert agreed.exit_code in (0, 1) and re.search(r"^good  agrees", agreed.output, re.MULTILINE), where
    with caplog.at_level(logging.ERROR):
        viewer = Viewer(out)
        assert viewer.answer("/s/good/facts.json").status == 200, where
        if "bad" in viewer.folders:
            assert viewer.answer("/s/bad/facts.json").status in (200, 400, 500), where
        viewer.scenes.close()
    check_good(call("classify", out, "--regate", "--gate", "local", "--no-progress"), out, where)
    with open_table(out / "good" / "cells.zarr") as table:
        assert table.run.config["classify"]["rule"]["decision"]["gate"] == "local", where
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_slide_in_a_list(seed: int, made: Path, tmp_path: Path) -> None:
    rng = random.Random(1_000 + seed)
    for name in ("good", "bad"):
        shutil.copyfile(made / f"{name}.tif", tmp_path / f"{name}.tif")
    (spoil_kind if seed % 6 == 5 else spoil_bytes)(rng, tmp_path / "bad.tif")
    (tmp_path / "list.csv").write_text("path,mpp\ngood.tif,\nbad.tif,\n")
    result = call("segment", tmp_path / "list.csv", "-o", tmp_path / "out", *FINDING)
    # A list that names what is not there is wrong input, refused before anything is done.
    assert result.exit_code in ((0, 1, 2) if seed % 6 == 5 else (0, 1))
    if result.exit_code:
        assert "bad" in result.output
    if result.exit_code != 2:
        with open_table(tmp_path / "out" / "good" / "cells.zarr") as table:
            assert len(table) == len(CENTRES)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_cells_regions_and_masks_for_a_good_slide(seed: int, made: Path, tmp_path: Path) -> None:
    rng, slide = random.Random(2_000 + seed), made / "good.tif"
    cells, roi, mask = tmp_path / "cells.geojson", tmp_path / "roi.json", tmp_path / "mask.png"
    text = json.dumps(qupath_export([(float(x), float(y)) for x, y in CENTRES]))
    for path in (cells, roi):
        path.write_text(text)
    Image.fromarray(np.full((90, 140), 255, np.uint8)).save(mask)
    for path in (cells, roi, mask):
        where = (spoil_json if path is roi else spoil_bytes)(rng, path)
        flag = {cells: "--cells", roi: "--roi", mask: "--tissue-mask"}[path]
        command = "classify" if path is cells else "segment"
        result = call(command, slide, "-o", tmp_path / path.stem, flag, path, *(TYPING if path is cells else FINDING))
        assert result.exit_code == 0 or path.name in result.output, (where, result.output)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_manifests_masks_and_entries(
    seed: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "cache"))
    rng, data = random.Random(3_000 + seed), tmp_path / "data"
    labels = discs((96, 96), [(30, 30), (60, 60)], 9)
    rows = [add_image(data, name, labels, split="val", mpp="0.5") for name in ("one", "two")]
    write_manifest(data, rows)
    bad = rng.choice([data / "manifest.csv", data / rows[1]["mask"], data / rows[1]["file"]])
    spoil_bytes(rng, bad)
    result = call("evaluate", "--model", "classical", data)
    assert result.exit_code == 0 or str(data) in result.output, result.output
    entry = tmp_path / "model.yaml"
    entry.write_text("id: m\ntask: segment\narch: cellvit_256\nfile: w.safetensors\nmpp: 0.5\ntile_px: 256\n")
    (tmp_path / "w.safetensors").write_bytes(b"\0" * 64)
    spoil_bytes(rng, entry)
    result = call("weights", "add", entry)
    assert result.exit_code == 0 or "model.yaml" in result.output, result.output
