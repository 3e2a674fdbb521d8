"""What a run says of its progress: rates, the estimate of the rest, and plain lines where there is no terminal."""

from __future__ import annotations

import logging
from io import StringIO

import pytest
from rich.console import Console
from rich.progress import Progress

from cellslide.batch.run import SlideOutcome
from cellslide.cli.progress import Drawn, Lines, Meter, RunProgress, progress_bar, summary


class Clock:
    """A clock that is set by hand, seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def outcome(name: str, status: str = "done", cells: int | None = 40) -> SlideOutcome:
    return SlideOutcome(name, status, cells, 10.0)  # type: ignore[arg-type]


def lines(meter: Meter, caplog: pytest.LogCaptureFixture) -> RunProgress:
    caplog.set_level(logging.INFO, "cellslide")
    return RunProgress(meter, Lines(meter))


def test_rates_and_the_rest_come_from_what_this_run_did(clock: Clock) -> None:
    meter = Meter(12, clock=clock)
    for name in ("skipped1", "skipped2"):
        meter.end(outcome(name, "skipped"))
    meter.begin(0, "a", 20, 0)
    clock.now += 10
    meter.advance(0, 40, 20)
    meter.end(outcome("a"))
    assert meter.rest_s == pytest.approx(90), "ten seconds a slide, nine left"
    assert meter.text() == "3/12 slides, 0.10 slides/s, 2.0 tiles/s, 4 cells/s, about 90 s left"
    meter.begin(0, "b", 20, 10)  # Half of it is an earlier run's.
    clock.now += 5
    meter.advance(0, 0, 5)
    assert meter.rest_s == pytest.approx(15 / 1.5 * 8.5)
    meter.end(outcome("b", "failed", None))
    assert "4/12 slides (1 failed)" in meter.text()


def test_a_slide_that_is_found_and_typed_counts_once(clock: Clock) -> None:
    meter = Meter(2, stages=2, clock=clock)
    meter.begin(0, "a", 10, 0)
    clock.now += 8
    meter.advance(0, 5, 10)
    assert meter.rest_s == pytest.approx(8 / 0.5 * 1.5)
    meter.begin(0, "a", 4, 0)
    meter.advance(0, 5, 2)
    assert meter.rest_s == pytest.approx(8 / 0.75 * 1.25)


def test_plain_lines_are_few_and_tell_all(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = lines(Meter(2, clock=clock), caplog)
    progress.begin("a", 100, 0)
    for _ in range(70):
        clock.now += 1
        progress.advance(2)
    progress.ended(outcome("a"))
    assert len(caplog.messages) == 3
    assert caplog.messages[0].startswith("a: 30/100 tiles, 60 nuclei  [0/2 slides")
    assert caplog.messages[2].startswith("a: done, 40 nuclei, 10.0 s  [1/2 slides, 51.4 slides/h, 1.0 tiles/s, 2 cells")


def test_devices_have_lanes_of_their_own(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter(4, clock=clock)
    progress = lines(meter, caplog)
    progress.lane(0).begin("a", 10, 0)
    progress.lane(1).begin("b", 10, 0)
    progress.lane(1).advance(7, 3)
    assert (meter.lanes[0].done, meter.lanes[1].done, meter.cells) == (0, 3, 7)
    progress.ended(outcome("b"))
    assert list(meter.lanes) == [0] and meter.ended == 1


def test_bars_show_the_slide_and_all_slides(clock: Clock) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=160)
    meter = Meter(3, clock=clock)
    with Progress(console=console) as bars:
        progress = RunProgress(meter, Drawn(meter, bars))
        progress.begin("a", 10, 2)
        clock.now += 1
        progress.advance(5, 4)
        assert [(t.description, t.completed, t.total) for t in bars.tasks] == [("all slides", 0.5, 3), ("a", 6, 10)]
        progress.ended(outcome("a"))
        assert [(t.description, t.completed) for t in bars.tasks] == [("all slides", 1)]


def test_nothing_is_said_unless_asked(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO, "cellslide")
    with progress_bar(1, shown=False) as progress:
        progress.begin("a", 1, 0)
        progress.stage("merge")
        progress.ended(outcome("a"))
    assert not caplog.messages and capsys.readouterr() == ("", "")


def test_a_long_summary_lists_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [outcome(f"s{k}", "failed" if k == 70 else "done", None if k == 70 else 1000) for k in range(100)]
    summary(outcomes, to_stderr=False)
    text = capsys.readouterr().out
    assert "s70" in text and "s71" not in text and "99 done, 1 failed" in text and "99,000" in text
    summary([outcome("[red]x")], to_stderr=False)
    assert "[red]x" in capsys.readouterr().out
