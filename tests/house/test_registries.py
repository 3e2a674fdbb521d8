"""A format of outputs and a format of slides, each defined in this file alone, work from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cellslide.batch.local_copy import pieces_of
from cellslide.cli.main import cli
from cellslide.config import OutputConfig
from cellslide.formats import registry
from cellslide.formats.registry import FORMATS, Format
from cellslide.slides import slide_formats
from cellslide.slides.pixel_size import PixelSize
from cellslide.slides.readers.base import SlideReader
from cellslide.slides.readers.plain import ArrayReader
from cellslide.slides.slide_formats import SLIDE_FORMATS, SlideFormat
from cellslide.store.atomic import write_text
from cellslide.store.cell_table import CellTable
from tests.painted import PaintedSlide, grid_centres, paint_slide
from tests.support.fakes import fake_model

QUICK = ("--device", "cpu", "--no-progress", "--no-tissue", "--workers", "0")


def write_toy(table: CellTable, out_dir: Path, output: OutputConfig) -> Path:
    write_text(out_dir / "cells.toy", f"{len(table)} nuclei, {output.profile}\n")
    return out_dir / "cells.toy"


def open_toy(path: Path) -> SlideReader:
    """Open an array of pixels whose size stands in a file beside it."""
    reader = ArrayReader(np.load(path), path, "toy")
    mpp = json.loads(path.with_suffix(".json").read_text())["mpp"]
    reader.header = replace(reader.header, found=PixelSize(mpp, mpp, "vendor", f"{mpp} in its .json"))
    return reader


def toy_files(path: Path) -> list[Path]:
    return [path, path.with_suffix(".json")]


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.weights.load_model", lambda *_: fake_model())
    monkeypatch.setitem(FORMATS, "toy", Format("toy", "cells.toy", write_toy, shaped_by=("profile",), kinds=("mask",)))
    monkeypatch.setitem(SLIDE_FORMATS, "toy", SlideFormat("toy", (".npy",), toy_files, open_toy))


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> PaintedSlide:
    folder = tmp_path_factory.mktemp("slides")
    return paint_slide(folder / "a.tif", 400, 300, 0.5, grid_centres(400, 300, 60.0), 7.0)


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_a_toy_format_is_written_kept_up_and_exported(painted: PaintedSlide, tmp_path: Path) -> None:
    toy = tmp_path / "a" / "cells.toy"
    invoke("segment", painted.path, "-o", tmp_path, "--format", "zarr,toy", *QUICK)
    assert toy.read_text() == f"{len(painted.centres_xy)} nuclei, lean\n"
    # What shapes a format makes it anew where it changes.
    invoke("segment", painted.path, "-o", tmp_path, "--format", "zarr", "--profile", "full", *QUICK)
    assert toy.read_text().endswith("full\n")
    toy.unlink()
    assert str(toy) in invoke("export", tmp_path, "--format", "toy").stdout
    assert toy.read_text().endswith("lean\n")


def test_a_toy_format_refuses_what_it_cannot_hold(
    painted: PaintedSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellslide.weights.load_model", lambda *_: fake_model("point"))
    result = CliRunner().invoke(
        cli, ["segment", str(painted.path), "-o", str(tmp_path / "out"), "--format", "toy", *QUICK]
    )
    assert result.exit_code == 2 and "--format toy" in result.stderr
    assert not (tmp_path / "out" / "a").exists()


def test_a_toy_slide_is_found_in_a_folder_and_read(painted: PaintedSlide, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    np.save(slides / "b.npy", painted.image)
    (slides / "b.json").write_text('{"mpp": 0.5}')
    invoke("segment", slides, "-o", tmp_path / "out", "--format", "zarr", *QUICK)
    record = json.loads((tmp_path / "out" / "b" / "run.json").read_text())
    assert record["counts"]["nuclei"] == len(painted.centres_xy)
    assert record["slide"]["vendor"] == "toy" and record["slide"]["mpp"] == 0.5
    assert json.loads(invoke("info", slides / "b.npy", "--json").stdout)["mpp_x"] == 0.5
    assert [piece.place.name for piece in pieces_of(slides / "b.npy")] == ["b.npy", "b.json"]


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="toy"):
        registry.register(FORMATS["toy"])
    for format in (SlideFormat("toy", (".new",)), SlideFormat("new", (".npy",)), SlideFormat("new", (".tif",))):
        with pytest.raises(ValueError, match="slide format"):
            slide_formats.register(format)
