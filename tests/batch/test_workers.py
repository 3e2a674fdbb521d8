"""Slides over several devices: the same bytes as on one, no slide lost when a process dies, clean stops."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cellslide.batch.work import SegmentWork, on_device
from cellslide.batch.workers import over_devices
from cellslide.cli.main import cli
from cellslide.config import InferConfig, parse_devices
from cellslide.errors import Interrupted, UsageError
from cellslide.progress import Silent
from cellslide.weights import LoadedModel
from tests.painted import paint_slide
from tests.support.fakes import fake_model
from tests.support.hazards import Hazard, Light, LightSource


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("auto", ("auto",)),
        ("cuda", ("cuda",)),
        ("cuda:0,1,2", ("cuda:0", "cuda:1", "cuda:2")),
        ("cuda:0, cuda:3", ("cuda:0", "cuda:3")),
        ("cpu,cpu", ("cpu", "cpu")),
    ],
)
def test_devices_are_read(text: str, devices: tuple[str, ...]) -> None:
    assert parse_devices(text) == devices


@pytest.mark.parametrize("text", ["cuda:0,", "0,1", "cpu,1", "auto,cpu", ""])
def test_wrong_devices_are_usage(text: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        parse_devices(text)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.batch.work.available_cpus", lambda: 9)
    assert on_device(InferConfig(), "cuda:1", 2) == InferConfig(device="cuda:1", workers=4)
    assert on_device(InferConfig(workers=3), "cpu", 16).workers == 3


def load_fake(*arguments: object) -> LoadedModel:
    return fake_model()


@dataclass(frozen=True, slots=True)
class FakeSegmentWork(SegmentWork):
    """Segments with the fake network, also where another process opens it."""

    load: object = load_fake


def test_two_devices_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(3):
        paint_slide(tmp_path / f"s{k}.tif", 200, 160, 0.5, [(50 + 20 * k, 60), (120, 90)], 7.0, (1,))
    (tmp_path / "bad.tif").write_bytes(b"no slide")
    monkeypatch.setattr("cellslide.weights.load_model", load_fake)
    monkeypatch.setattr("cellslide.batch.work.SegmentWork", FakeSegmentWork)
    lines: dict[str, dict[str, object]] = {}
    for out, device in (("one", "cpu"), ("two", "cpu,cpu")):
        if out == "two":
            # What writes the pages of slides runs in the processes of the devices, which this does not reach.
            monkeypatch.setattr("cellslide.report.slide.write_report", None)
        flags = ("--device", device, "--no-tissue", "--workers", "0", "--format", "csv", "--log-json", "--no-progress")
        result = CliRunner().invoke(
            cli, ["segment", str(tmp_path / "*.tif"), "-o", str(tmp_path / out), *flags, "--stage-dir", str(tmp_path)]
        )
        assert result.exit_code == 1 and "cellslide: bad: " in result.stderr, result.output
        lines[out] = {o["slide"]: (o["status"], o["cells"]) for o in map(json.loads, result.stdout.splitlines())}
    assert lines["one"] == lines["two"] == {"bad": ("failed", None), **{f"s{k}": ("done", 2) for k in range(3)}}
    for k in range(3):
        first, second = (tmp_path / out / f"s{k}" / "cells.csv.gz" for out in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
        assert (tmp_path / "two" / f"s{k}" / "report.html").is_file()
    assert (tmp_path / "two" / "summary.csv").read_text().count("\n") == 5
    assert not list(tmp_path.glob("cellslide-stage-*"))


def names_of(*names: str) -> list[Any]:
    return [Light(LightSource(name)) for name in names]


class Heard(Silent):
    """Notes the slides that began."""

    def __init__(self) -> None:
        self.slides: list[str] = []

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        self.slides.append(slide_id)

    def advance(self, nuclei: int, tiles: int = 1) -> None:
        assert (nuclei, tiles) == (5, 1)


def test_a_slide_that_kills_its_process_stops_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names, heard = ("a", "killer", "flaky", "b"), Heard()
    pairs = over_devices(Hazard(tmp_path), names_of(*names), ["cpu"], lambda _: heard, lambda: None)
    ended = {target.source.slide_id: outcome for target, outcome in pairs}
    assert {name: outcome.status for name, outcome in ended.items()} == {
        "a": "done", "killer": "failed", "flaky": "done", "b": "done",
    }  # fmt: skip
    assert "died (signal 9) twice" in str(ended["killer"].error) and ended["killer"].exit_code == 1
    assert "flaky: its process on cpu died" in caplog.text
    assert heard.slides[0] == "a" and heard.slides.count("b") == 1


def test_a_request_to_stop_reaches_the_processes(tmp_path: Path) -> None:
    def stop() -> int | None:
        return 143 if (tmp_path / "slow").exists() else None

    targets = names_of("a", "slow", "b")
    ended = []
    with pytest.raises(Interrupted) as stopped:
        for target, _ in over_devices(Hazard(tmp_path), targets, ["cpu"], lambda _: Heard(), stop):
            ended.append(target.source.slide_id)
    assert stopped.value.exit_code == 143 and ended == ["a"]


def test_a_device_that_is_not_there_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="--device cuda:9") as error:
        list(over_devices(Hazard(tmp_path), names_of("a"), ["cuda:9"], lambda _: Heard(), lambda: None))
    assert getattr(error.value, "exit_code", None) == 3
