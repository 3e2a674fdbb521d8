"""What a request changes before it is known to be good: nothing; and in which words it is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from cellslide.cli.main import COMMANDS, cli
from cellslide.store.lock import hold
from tests.painted import paint_slide
from tests.support.fake_classifier import fake_loaded
from tests.support.fakes import fake_model

QUICK = ("--device", "cpu", "--no-progress")
FLAGS = (*QUICK, "--no-tissue", "--workers", "0")


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake networks stand for those that ship."""
    monkeypatch.setattr("cellslide.weights.load_model", lambda *args: fake_model())
    monkeypatch.setattr("cellslide.weights.classifier.load_classifier", lambda *args: fake_loaded())
    logger = logging.getLogger("cellslide")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in ("a", "b"):
        paint_slide(folder / f"{name}.tif", 300, 200, 0.5, [(100, 100), (200, 60)], 7.0)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(out: Path) -> dict[str, str]:
    lines = [line.split(",") for line in (out / "summary.csv").read_text().splitlines()]
    place = lines[0].index("status")
    return {line[0]: line[place] for line in lines[1:]}


def test_a_refused_request_changes_nothing(slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("run", slides / "a.tif", "-o", out, *FLAGS, "--organ", "breast").exit_code == 0
    before = files(out)
    stale = run("run", slides / "a.tif", "-o", out, *FLAGS, "--organ", "breast", "--tile-size", "512")
    assert stale.exit_code == 2 and "--overwrite" in stale.stderr and "refused" in stale.stderr
    other = run("classify", out, "-o", out, *QUICK, "--organ", "lung")
    assert other.exit_code == 2 and "--overwrite" in other.stderr
    untyped = run("classify", slides / "b.tif", "-o", out, *QUICK)
    assert untyped.exit_code == 2 and "cells.zarr" in untyped.stderr
    gone = run("segment", slides / "a.tif", "-o", slides / "a.tif", *FLAGS)
    assert gone.exit_code == 2 and "--output" in gone.stderr
    assert files(out) == before
    assert {p.name for p in slides.iterdir()} == {"a.tif", "b.tif"}


def test_an_unknown_pixel_size_leaves_no_trace(tmp_path: Path) -> None:
    paint_slide(tmp_path / "no.tif", 300, 200, None, [(100, 100)], 7.0)
    result = run("segment", tmp_path / "no.tif", "-o", tmp_path / "out", *FLAGS, "--log-json")
    assert result.exit_code == 2 and "--mpp" in result.stderr
    assert json.loads(result.stdout)["status"] == "failed"
    assert not (tmp_path / "out").exists()


def test_stale_slides_are_left_and_the_others_done(slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("segment", slides / "a.tif", "-o", out, *FLAGS).exit_code == 0
    before = files(out / "a")
    result = run("segment", slides, "-o", out, *FLAGS, "--tile-size", "512", "--log-json")
    assert result.exit_code == 1
    status = {line["slide"]: line["status"] for line in map(json.loads, result.stdout.splitlines())}
    assert status == {"a": "stale", "b": "done"} == rows(out)
    assert files(out / "a") == before
    assert "stale" in (out / "cohort.html").read_text()
    assert run("segment", slides / "a.tif", "-o", out, *FLAGS).exit_code == 0
    assert rows(out)["a"] == "done"


def test_a_dry_run_says_what_there_is_and_writes_nothing(slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("segment", slides / "a.tif", "-o", out, *FLAGS).exit_code == 0
    (slides / "bad.tif").write_bytes(b"no slide")
    before = files(tmp_path)
    result = run("segment", slides, "-o", out, *FLAGS, "--dry-run")
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert "skipped" in lines["a"] and "tiles" in lines["b"] and "cannot be done" in lines["bad"]
    assert "of memory" in result.stdout and "on the disk" in result.stdout
    other = run("segment", slides, "-o", out, *FLAGS, "--tile-size", "512", "--dry-run")
    assert "stale" in other.stdout
    both = run("run", slides / "b.tif", "-o", out, *FLAGS, "--organ", "breast", "--dry-run")
    assert both.exit_code == 0 and "tiles" in both.stdout
    for line in (("classify", out, "-o", out, *QUICK, "--organ", "breast"), ("export", out, "--format", "csv"),
                 ("report", out), ("verify", out)):  # fmt: skip
        assert run(*line, "--dry-run").exit_code == 0, line
    assert files(tmp_path) == before


def test_verify_says_that_a_run_works_there(slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("segment", slides / "a.tif", "-o", out, *FLAGS).exit_code == 0
    with hold(out / "a"):
        result = run("verify", out)
    assert result.exit_code == 0 and "running" in result.stdout
    assert "running" not in run("verify", out).stdout


def every(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from every(found, (*path, name))


WRONG = {
    "no such option": lambda path, command: [*path, "--no-such-option"],
    "a value that is none": lambda path, command: [*path, *wrong_value(command)],
    "nothing given": lambda path, command: [*path],
    "nothing there": lambda path, command: [*path, *("/nowhere/x" for p in arguments(command))],
    "too much": lambda path, command: [*path, *("/nowhere/x" for p in arguments(command)), "--config", "/nowhere/y"],
}
# They need nothing, or do long work without being told more.
NEEDS_NOTHING = {("doctor",), ("demo",), ("bench",), ("weights", "list"), ("weights", "verify")}


def arguments(command: click.Command) -> list[click.Parameter]:
    return [p for p in command.params if isinstance(p, click.Argument)]


def wrong_value(command: click.Command) -> list[str]:
    typed = [p for p in command.params if isinstance(p, click.Option) and not p.is_flag and not p.count]
    numbers = [p for p in typed if not isinstance(p.type, (click.Path, click.types.StringParamType))]
    return [max(numbers[0].opts, key=len), "nonsense"] if numbers else ["--no-such-option"]


@pytest.mark.parametrize("kind", WRONG)
def test_every_mistake_is_told_in_four_lines(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path, command in every(cli):
        if path in NEEDS_NOTHING and kind in ("nothing given", "nothing there"):
            continue
        result = run(*WRONG[kind](path, command))
        assert result.exit_code in (2, 3), (path, kind, result.output)
        assert 1 <= len(result.stderr.splitlines()) <= 4, (path, kind, result.stderr)
        assert result.stderr.startswith("cellslide: ") and "Traceback" not in result.stderr, (path, kind)
    assert list(tmp_path.iterdir()) == []


def test_commands_and_their_help_are_grouped() -> None:
    top = run("--help").stdout
    assert all(name in top for name in COMMANDS)
    assert min(COMMANDS, key=lambda name: top.index(f"\n  {name} ")) == "run"
    short, long = run("run", "--help").stdout, run("run", "--help-all").stdout
    for section in ("Input", "Output", "Speed", "Decision", "Many slides"):
        assert f"\n{section}:" in long and section in short
    assert len(short.splitlines()) < len(long.splitlines())
    options = {max(p.opts, key=len) for p in dict(every(cli))[("run",)].params if isinstance(p, click.Option)}
    assert all(option in long and option in short for option in options)


def test_a_command_that_is_none_gets_a_hint() -> None:
    result = run("segmnt", "x.svs")
    assert result.exit_code == 2 and "segment" in result.stderr and len(result.stderr.splitlines()) == 1
