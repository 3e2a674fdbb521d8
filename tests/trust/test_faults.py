"""Runs that are killed, disks that are full, read-only or gone: what was done stays, and the next run ends the same."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellslide.batch.run import SlideOutcome, StopOnSignal
from cellslide.errors import UsageError, trouble
from cellslide.inference import search
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import segment_slide
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import read_record
from cellslide.store.table_writer import CellTableWriter
from tests.conftest import CHECKOUT
from tests.painted import PaintedSlide, grid_centres, paint_slide
from tests.support.fakes import fake_model
from tests.test_pipeline import BASE, assert_same, columns, segment, segment_slides, source

ROUNDS = os.environ.get("CELLSLIDE_KILL_RUNS", "6")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> PaintedSlide:
    path = tmp_path_factory.mktemp("slides") / "s.tif"
    return paint_slide(path, 500, 300, 0.5, grid_centres(500, 300, 50), 7.0, (1,))


@pytest.mark.timeout(600)
def test_killed_runs_go_on_to_the_same_bytes() -> None:
    """Some rounds of the campaign in benchmarks/faults; CELLSLIDE_KILL_RUNS asks for more."""
    command = [sys.executable, "-m", "benchmarks.faults.kills", "--runs", ROUNDS, "--json", "--seed", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=environment)
    tally = json.loads(answer.stdout)
    assert tally["runs"] >= int(ROUNDS) and tally["killed"] >= 2 and min(tally["steps"].values()) > 10
    assert (tally["lost_cells"], tally["corrupted"], tally["words"]) == (0, 0, []), tally


def test_the_campaign_sees_a_part_that_is_lost(slide: PaintedSlide, tmp_path: Path) -> None:
    from benchmarks.faults.kills import digests, uuids

    segment(slide.path, tmp_path / "a")
    segment(slide.path, tmp_path / "b")
    a, b = tmp_path / "a" / "s", tmp_path / "b" / "s"
    assert digests(a) == digests(b) and uuids(a) == uuids(b) and len(uuids(a)) == 60
    chunk = next(p for p in (b / "cells.zarr/tables/cells/obs/x").rglob("*") if p.is_file() and p.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[::-1])
    assert digests(a) != digests(b)


@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_slide() -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "--cells", "7000", "--tile-size", "256", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=environment)
    found = json.loads(answer.stdout)
    assert found["tiles"][1] >= 10 * found["tiles"][0] and 0 <= found["grown_mib"] < 300, found
    assert answer.returncode == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_warning_of_slurm_asks_for_a_clean_stop(name: str) -> None:
    with StopOnSignal() as stop:
        assert stop() is None
        os.kill(os.getpid(), getattr(signal, name))
        assert stop() == 143


def test_a_warning_before_the_work_begins_ends_as_sigterm_does() -> None:
    code = (
        "import os, signal, click\nfrom cellslide.cli import main\n"
        "main.LazyGroup.get_command = lambda *a: click.Command('info', callback=lambda: os.kill(os.getpid(), "
        "signal.SIGUSR1))\nmain.cli(['info'])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, timeout=60, check=False).returncode == 143


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_is_told_in_words_and_what_was_done_stays(
    slide: PaintedSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = columns(segment(slide.path, tmp_path / "whole")[1])
    saved, real = [0], np.savez

    def full(*args: object, **arrays: object) -> None:
        saved[0] += 1
        if saved[0] > 2:
            raise OSError(number, os.strerror(number))
        real(*args, **arrays)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "PART_TILES", 1)
    monkeypatch.setattr(np, "savez", full)
    first = tried(slide, tmp_path)
    words = {errno.ENOSPC: "the disk is full", errno.EROFS: "--output", errno.EIO: "goes on from here"}[number]
    assert first.status == "failed" and first.exit_code == 1 and words in str(first.error)
    record = read_record(tmp_path / "s")
    assert record is not None and record.status == "failed" and words in str(record.error)
    assert sorted(p.name for p in (tmp_path / "s" / ".parts").glob("*part*")) == [
        "part-00000000.npz",
        "part-00000001.npz",
    ]
    monkeypatch.setattr(np, "savez", real)
    assert tried(slide, tmp_path).status == "done"
    with open_table(tmp_path / "s" / "cells.zarr") as table:
        assert_same(whole, columns(table))


def tried(slide: PaintedSlide, out: Path) -> SlideOutcome:
    with open_segmenter(fake_model(), BASE) as segmenter:
        (outcome,) = segment_slides([source(slide.path)], segmenter, out)
    return outcome


def test_a_full_disk_while_the_table_is_written_leaves_the_old_table(
    slide: PaintedSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment(slide.path, tmp_path)
    before = (tmp_path / "s" / "cells.zarr" / "zarr.json").stat().st_ino

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CellTableWriter, "close", full)
    anew = replace(BASE, output=replace(BASE.output, overwrite=True))
    with open_segmenter(fake_model(), anew) as segmenter:
        (outcome,) = segment_slides([source(slide.path)], segmenter, tmp_path)
    assert outcome.status == "failed" and "the disk is full" in str(outcome.error)
    assert (tmp_path / "s" / "cells.zarr" / "zarr.json").stat().st_ino == before
    assert not list((tmp_path / "s").glob("*.tmp-*"))


def test_an_output_that_cannot_be_written_fails_the_slide_only(slide: PaintedSlide, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    outcome = tried(slide, tmp_path / "out")
    assert outcome.status == "failed" and outcome.exit_code == 1 and outcome.error


def test_troubles_have_words_and_other_errors_have_none() -> None:
    assert "make room" in str(trouble(OSError(errno.ENOSPC, "No space left on device")))
    assert str(trouble(PermissionError(errno.EACCES, "Permission denied", "/out/s"))).startswith("/out/s: cannot be")
    assert "the drive is" in str(trouble(FileNotFoundError(errno.ENOENT, "No such file", "/mnt/x")))
    assert "--workers" in str(trouble(MemoryError()))
    assert "ulimit -n" in str(trouble(OSError(errno.EMFILE, "Too many open files")))
    assert trouble(OSError("anything")) is None and trouble(OSError(errno.ENOTEMPTY, "Not empty")) is None


def test_parts_without_their_settings_are_not_taken(slide: PaintedSlide, tmp_path: Path) -> None:
    """As a run leaves them that was killed while it removed them; they may be of other settings."""
    from tests.test_pipeline import StopAfter, Watch

    hears = StopAfter(3)
    with pytest.raises(Exception, match="stopped"):
        segment(slide.path, tmp_path, watch=Watch(hears, hears.stop))
    (tmp_path / "s" / ".parts" / "fingerprint.json").unlink()
    hears = StopAfter(99)
    segment(slide.path, tmp_path, watch=Watch(hears, hears.stop))
    assert hears.begun[1] == 0


def test_files_that_other_flags_shaped_are_made_anew(slide: PaintedSlide, tmp_path: Path) -> None:
    lean = replace(BASE, output=replace(BASE.output, formats=("zarr", "csv")))
    full = replace(BASE, output=replace(lean.output, profile="full"))
    model = fake_model(classes=())
    for config, wanted in ((lean, False), (full, True), (full, False), (lean, True)):
        before = stamp(tmp_path / "s" / "cells.csv.gz")
        with open_segmenter(model, config) as segmenter:
            segment_slide(source(slide.path), segmenter, tmp_path)
        after = stamp(tmp_path / "s" / "cells.csv.gz")
        assert before == 0 or (before != after) == wanted
    other = replace(BASE, tissue=replace(BASE.tissue, enabled=True))
    with open_segmenter(model, other) as segmenter, pytest.raises(UsageError, match="config.tissue.enabled"):
        segment_slide(source(slide.path), segmenter, tmp_path)


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
