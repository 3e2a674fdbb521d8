"""Slides from strangers: each ends in one clear line or is read; the others are done; nothing is written elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cellslide.cli.main import cli
from cellslide.errors import SlideError, one_line
from cellslide.slides import readers
from cellslide.slides.inputs import expand_slides, folder_name
from cellslide.slides.readers import open_reader
from cellslide.slides.slide import open_slide
from tests.painted import paint_slide
from tests.support.fakes import fake_model
from tests.support.hostile_files import bad_slides, odd_slides, tiff, write_png_bomb
from tests.support.watched import run_watched

FLAGS = ("--no-tissue", "--device", "cpu", "--workers", "0", "--no-progress", "--mpp", "0.5", "--log-json")
# Stems "." and "..", a hidden one, control characters, both separators, an escape sequence, another direction.
NAMES = (
    "..tif", "...tif", "....tif", ".hidden.tif", "two words.tif", "Färbung 三 🔬.tif", "line\nbreak.tif", "a\tb.tif",
    "back\\slash.tif", "..\\..\\up.tif", "\x1b[31mred.tif", "turn\u202efit.tif", "=1+1.tif", "-o.tif", "[bold]x.tif",
    "summary.csv.tif", "COHORT.html.tif", "*?.tif", "$(id).tif", "a" * 240 + ".tif", "cafe\u0301.tif", "caf\u00e9.tif",
)  # fmt: skip

SOME_NAMES = (
    "..tif",
    "...tif",
    "line\nbreak.tif",
    "..\\..\\up.tif",
    "\x1b[31mred.tif",
    "[bold]x.tif",
    "summary.csv.tif",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of two nuclei."""
    path = tmp_path_factory.mktemp("whole") / "whole.tif"
    paint_slide(path, 300, 200, 0.5, [(100, 100), (220, 60)], 7.0)
    return path


@pytest.mark.timeout(300)
def test_bad_slides_are_refused_one_by_one_and_the_rest_is_done(whole: Path, tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    for name, content in bad_slides(whole).items():
        (slides / name).write_bytes(content)
    write_png_bomb(slides / "bomb.png")
    (slides / "good.tif").write_bytes(whole.read_bytes())
    before = {p: p.read_bytes() for p in slides.iterdir()}
    done = run_watched(tmp_path, "fake", ["segment", slides, "-o", out, *FLAGS], timeout_s=280)
    assert done.code == 1, done.stderr
    rows = {row["slide"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert len(rows) == len(before)
    assert rows.pop("good")["cells"] == 2
    for slide, row in rows.items():
        assert row["status"] == "failed" and row["cells"] is None, row
        assert len(row["error"].splitlines()) == 1 and "Error:" not in row["error"], f"{slide}: {row['error']}"
    assert "Traceback" not in done.stderr
    assert done.outside(out, tmp_path / "cache", tmp_path / "scratch") == []
    assert done.calls == ()
    assert done.peak_bytes < 1500 << 20
    assert {p: p.read_bytes() for p in slides.iterdir()} == before
    assert {p.name for p in tmp_path.iterdir()} <= {"slides", "out", "cache", "scratch", "report.json"}


def test_odd_slides_are_read(whole: Path, tmp_path: Path) -> None:
    for name, content in odd_slides(whole).items():
        path = tmp_path / name
        path.write_bytes(content)
        with open_slide(path, 0.5) as slide:
            assert slide.thumbnail(32).shape[2] == 3, name


def test_the_error_names_file_and_size(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    path.write_bytes(tiff(65_536, 65_536, tile=65_536))
    with pytest.raises(SlideError, match=r"large\.tif: tiles of 65536 x 65536 px"):
        open_reader(path)
    path.write_bytes(tiff(400_000, 400_000, tile=256))
    with pytest.raises(SlideError, match=r"400000 x 400000 px in [\d,]+ bytes"):
        open_reader(path)


def test_a_slide_of_a_square_kilometre_is_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.slides.slide.MOST_MM2", 0.01)
    with pytest.raises(SlideError, match=r"0 x 0 mm is no slide; check --mpp 0\.5"):
        open_slide(whole)


def test_tiles_of_later_pages_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.painted import write_pyramid
    from tests.slides.test_slide import noise

    write_pyramid(tmp_path / "s.tif", noise(), 0.5, tile_px=64)
    open_reader(tmp_path / "s.tif").close()
    monkeypatch.setattr(readers, "MOST_TILE_PX", 64 * 64 - 1)
    with pytest.raises(SlideError, match="tiles of 64 x 64 px"):
        open_reader(tmp_path / "s.tif")


def test_every_name_is_one_folder_of_its_own(tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    for name in NAMES:
        (slides / name).write_bytes(b"")
    ids = [item.slide_id for item in expand_slides([slides / name for name in NAMES])]
    for slide_id in ids:
        (out / slide_id).mkdir(parents=True)
    assert {p.name for p in out.iterdir()} == set(ids) and len({slide_id.lower() for slide_id in ids}) == len(NAMES)
    assert not any(slide_id.lower() in ("summary.csv", "cohort.html") or slide_id[0] == "." for slide_id in ids)
    assert {"two words", "Färbung 三 🔬", "=1+1", "-o", "[bold]x", "*?", "$(id)"} <= set(ids)


def test_slides_of_such_names_are_done_inside_the_output(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellslide.weights.load_model", lambda *args: fake_model())
    slides, out = tmp_path / "slides", tmp_path / "results" / "out"
    slides.mkdir()
    for name in SOME_NAMES:
        (slides / name).write_bytes(whole.read_bytes())
    before = {p: p.stat().st_mtime_ns for p in slides.iterdir()}
    arguments = ["segment", *(str(p) for p in before), "-o", str(out), *FLAGS, "--format", "zarr"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(SOME_NAMES) and all(row["status"] == "done" and row["cells"] == 2 for row in rows), rows
    folders = {p.name for p in out.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert folders == {row["slide"] for row in rows}
    assert all((out / name / "cells.zarr").is_dir() for name in folders)
    assert {p.name for p in tmp_path.iterdir()} == {"slides", "results"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert {p: p.stat().st_mtime_ns for p in slides.iterdir()} == before
    assert "\x1b" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        (".", "_"), ("..", "__"), ("..a", "__a"), ("a..", "a.."), ("", "slide"), ("a/b\\c", "a_b_c"), ("a\0b", "a_b"),
        ("a\u2029b", "a_b"), ("\udcff", "_"), ("Summary.CSV", "Summary.CSV_"), ("plain 1", "plain 1"),
        ("é" * 150, "é" * 100),
    ],
)  # fmt: skip
def test_folder_names(stem: str, name: str) -> None:
    assert folder_name(stem) == name


def test_a_changed_name_gets_a_hash_and_others_keep_theirs(tmp_path: Path) -> None:
    for name in ("...svs", "plain.svs"):
        (tmp_path / name).write_bytes(b"")
    changed, plain = expand_slides([tmp_path / "...svs", tmp_path / "plain.svs"])
    assert changed.slide_id.startswith("__-") and plain.slide_id == "plain"


def test_a_message_is_one_line_without_control_characters() -> None:
    assert one_line("a\n b\x1b[31m\u202ec\udcff") == "a b\\x1b[31m\\u202ec\\udcff"
    assert one_line("Färbung 三 🔬") == "Färbung 三 🔬"
