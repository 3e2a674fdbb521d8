"""What a run says of its progress: rates, the estimate of the rest, and plain lines where there is no terminal."""

from __future__ import annotations

import logging
import re
from io import StringIO

import pytest
from rich.console import Console

from cellslide.batch.run import SlideOutcome
from cellslide.cli.progress import Drawn, Lines, Meter, RunProgress, bars_on, progress_bar, summary


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


def test_the_rest_comes_from_what_this_run_did(clock: Clock) -> None:
    meter = Meter(12, clock=clock)
    for name in ("skipped1", "skipped2"):
        meter.end(outcome(name, "skipped", 0))
    meter.begin(0, "a", 20, 0)
    clock.now += 10
    meter.advance(0, 45, 20)
    assert meter.nuclei == 45
    meter.end(outcome("a"))
    assert meter.nuclei == 40, "those that are left when tiles are merged"
    assert meter.rest_s == pytest.approx(90), "ten seconds a slide, nine left"
    assert "40 nuclei" in meter.text() and "90 s" in meter.text() and meter.place == "slide 4/12"
    meter.begin(0, "b", 20, 10)  # Half of it is an earlier run's.
    clock.now += 5
    meter.advance(0, 0, 5)
    assert meter.rest_s == pytest.approx(5 + 8 * 10)
    meter.end(outcome("b", "failed", None))
    assert meter.place == "slide 5/12, 1 failed"


def test_a_slide_that_is_found_and_typed_counts_once(clock: Clock) -> None:
    meter = Meter(2, stages=2, clock=clock)
    meter.begin(0, "a", 10, 0)
    clock.now += 8
    meter.advance(0, 5, 10)
    assert meter.rest_s == pytest.approx(8 + 16), "typing is taken to last as long as finding"
    meter.begin(0, "a", 4, 0)
    clock.now += 6
    meter.advance(0, 3, 2)
    assert meter.nuclei == 5
    assert meter.rest_s == pytest.approx(6 + 8 + 12)
    clock.now += 6
    meter.advance(0, 2, 2)
    meter.end(outcome("a", cells=4))
    assert meter.nuclei == 4 and meter.rest_s == pytest.approx(20)


def test_plain_lines_are_few_and_tell_all(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = lines(Meter(2, clock=clock), caplog)
    progress.begin("a", 100, 0)
    for _ in range(70):
        clock.now += 1
        progress.advance(2)
    progress.ended(outcome("a"))
    assert len(caplog.messages) == 3
    assert all(word in caplog.messages[0] for word in ("a: ", "30/100", "60 nuclei", "slide 1/2", "left"))
    assert all(word in caplog.messages[2] for word in ("a: done", "40 nuclei", "10.0 s", "slide 2/2"))


def test_devices_have_lanes_of_their_own(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter(4, clock=clock)
    progress = lines(meter, caplog)
    progress.lane(0).begin("a", 10, 0)
    progress.lane(1).begin("b", 10, 0)
    progress.lane(1).advance(7, 3)
    assert (meter.lanes[0].done, meter.lanes[1].done, meter.nuclei) == (0, 3, 7)
    progress.ended(outcome("b"))
    assert list(meter.lanes) == [0] and meter.ended == 1


def test_bars_show_the_slide_and_all_slides_in_80_columns(clock: Clock) -> None:
    written = StringIO()
    console = Console(file=written, force_terminal=True, width=80)
    meter = Meter(3, stages=2, clock=clock)
    name = "a-name-of-a-slide-that-is-long-[red]-and-longer"
    with bars_on(console) as bars:
        progress = RunProgress(meter, Drawn(meter, bars))
        progress.begin(name, 10_000_000, 0)
        clock.now += 7000
        progress.advance(50_000_000, 4_000_000)
        assert [(t.completed, t.total) for t in bars.tasks] == [(0.2, 3), (4_000_000, 10_000_000)]
        bars.refresh()
        progress.stage("merge")
        clock.now += 1
        bars.refresh()
        progress.ended(outcome(name))
        assert [(t.description, t.completed) for t in bars.tasks] == [("slide 2/3", 1)]
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert max(map(len, shown.replace("\r", "\n").splitlines())) <= 80
    for words in ("slide 1/3", "4,000,000/10,000,000", "50,000,000 nuclei, about", " left", "merging"):
        assert words in shown, words


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
