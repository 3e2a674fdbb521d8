"""What a run shows on the terminal: bars, or plain lines where there is no terminal, and a table at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cellslide.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from cellslide.batch.run import SlideOutcome

# Where lines are printed, at most so often within a slide (s); an estimate needs some time to mean anything (s).
LINE_S, ESTIMATE_S = 30.0, 3.0
DRAW_S = 0.1
# Columns of a bar, with blanks between them at most 80.
NAME_WIDTH, BAR_WIDTH, TEXT_WIDTH = 20, 18, 38
# What the stages of a slide are called, by the word that they report.
STAGE_WORDS = {
    "tiles": "finding, tile", "pieces": "typing, piece", "windows": "reading, window", "copy": "copying",
    "merge": "merging", "write": "writing the table", "cells": "writing files", "classes": "writing files",
    "fetch": "fetching",
}  # fmt: skip
COUNTED = ("tiles", "pieces", "windows")
# A longer table scrolls away; then only what is not done is listed, and the summary has the rest.
MOST_ROWS = 40
MOST_REASONED = 5

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Lane:
    """A slide that is worked on: its tiles, those done before this run and now, and what is done with it at the moment.

    stage  how often the same slide began: once for its tiles, once more when it is typed; `began` is when (s).
    """

    slide: str = ""
    tiles: int = 0
    before: int = 0
    done: int = 0
    nuclei: int = 0
    what: str = "tiles"
    stage: int = 1
    began: float = 0.0

    def whole_s(self, now: float) -> float | None:
        """Estimate of how long the whole stage takes (s), None while nothing of it is done."""
        here = self.done - self.before
        return (now - self.began) / here * self.tiles if here > 0 else None

    def rest_s(self, now: float, usual: float) -> float:
        """Estimate of the rest of the stage (s); `usual` is how long such a stage takes."""
        whole = self.whole_s(now)
        return (usual if whole is None else whole) * max(self.tiles - self.done, 0) / max(self.tiles, 1)

    def share(self, stages: int) -> float:
        """Share of the slide that is done, of so many stages."""
        return min((self.stage - 1 + self.done / max(self.tiles, 1)) / stages, 1.0)


@dataclass(slots=True)
class Meter:
    """Counts slides and nuclei of a run, and estimates how long it will take.

    stages  how often a slide begins: 1 to segment or to classify, 2 to do both.
    cells   nuclei of the slides that ended, by their tables; those at hand are counted with their lanes.
    learned seconds that each stage took, of the slides so far.
    """

    slides: int
    stages: int = 1
    clock: Callable[[], float] = time.monotonic
    lanes: dict[int, Lane] = field(default_factory=dict)
    ended: int = 0
    failed: int = 0
    cells: int = 0
    began: float = 0.0
    learned: dict[int, list[float]] = field(default_factory=dict)

    def begin(self, lane: int, slide_id: str, tiles: int, done: int) -> Lane:
        """Count the beginning of a slide, or of its next stage."""
        now = self.clock()
        self.began, before = self.began or now, self.lanes.get(lane)
        state = Lane(slide_id, tiles, done, done, began=now)
        if before is not None and before.slide == slide_id:
            self._learn(before, now)
            # The next stage goes over the same nuclei.
            state.stage, state.nuclei = before.stage + 1, before.nuclei
        self.lanes[lane] = state
        return state

    def advance(self, lane: int, nuclei: int, tiles: int = 1) -> Lane:
        """Count tiles that are done, with their nuclei."""
        at = self.lanes.setdefault(lane, Lane(began=self.clock()))
        at.done += tiles
        at.nuclei += nuclei if at.stage == 1 else 0
        return at

    def end(self, outcome: SlideOutcome) -> None:
        """Count a slide that ended."""
        self.ended += 1
        self.failed += outcome.status == "failed"
        self.cells += outcome.cells or 0
        for number in [n for n, lane in self.lanes.items() if lane.slide == outcome.slide]:
            self._learn(self.lanes.pop(number), self.clock())

    def _learn(self, lane: Lane, now: float) -> None:
        whole = lane.whole_s(now)
        if whole is not None:
            self.learned.setdefault(lane.stage, []).append(whole)

    @property
    def nuclei(self) -> int:
        """Nuclei so far, each once: of an unfinished slide those of its tiles, before they are merged."""
        return self.cells + sum(lane.nuclei for lane in self.lanes.values())

    @property
    def rest_s(self) -> float | None:
        """Estimate of the rest in seconds, over all stages of all slides; None while there is none.

        A stage takes what it took for the slides so far, one that none has reached as long as the others.
        """
        now = self.clock()
        usual = self._usual(now)
        if not self.began or now - self.began < ESTIMATE_S or not usual:
            return None
        other = sum(usual.values()) / len(usual)
        each = [usual.get(stage, other) for stage in range(1, self.stages + 1)]
        rest = sum(lane.rest_s(now, each[lane.stage - 1]) + sum(each[lane.stage :]) for lane in self.lanes.values())
        waiting = max(self.slides - self.ended - len(self.lanes), 0)
        return (rest + waiting * sum(each)) / max(len(self.lanes), 1)

    def _usual(self, now: float) -> dict[int, float]:
        """Return how long each stage takes (s), as far as one is known."""
        found = {stage: list(times) for stage, times in self.learned.items()}
        for lane in self.lanes.values():
            whole = lane.whole_s(now)
            if whole is not None and lane.stage not in self.learned and lane.stage <= self.stages:
                found.setdefault(lane.stage, []).append(whole)
        return {stage: sum(times) / len(times) for stage, times in found.items()}

    @property
    def place(self) -> str:
        """Which slide of how many, in words."""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"slide {min(self.ended + max(len(self.lanes), 1), self.slides)}/{self.slides}{failed}"

    def text(self) -> str:
        """Return the nuclei and the estimate in words."""
        rest = self.rest_s
        return f"{self.nuclei:,} nuclei" + ("" if rest is None else f", about {in_time(rest)} left")


def in_time(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def in_stage(lane: Lane) -> str:
    """Return in words what is done with a slide, and how far that is where it is counted."""
    words = STAGE_WORDS.get(lane.what, lane.what)
    return f"{words} {lane.done:,}/{lane.tiles:,}" if lane.what in COUNTED else words


class Board(Protocol):
    """Shows a meter: each call tells it what changed."""

    def at(self, lane: int, state: Lane) -> None:
        """Show a slide that is worked on."""

    def after(self, lane: int) -> None:
        """Show that a lane waits."""

    def ended(self, outcome: SlideOutcome) -> None:
        """Show a slide that ended."""


class NoBoard:
    """Shows nothing."""

    def at(self, lane: int, state: Lane) -> None:
        """Show nothing."""

    def after(self, lane: int) -> None:
        """Show nothing."""

    def ended(self, outcome: SlideOutcome) -> None:
        """Show nothing."""


class Lines:
    """Plain lines, one when a slide ends and one now and then within it, for logs."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._said = meter, meter.clock()

    def at(self, lane: int, state: Lane) -> None:
        """Say where a slide is, unless a line was said just now."""
        if self._meter.clock() - self._said >= LINE_S:
            self._say(f"{state.slide}: {in_stage(state)}")

    def after(self, lane: int) -> None:
        """Say nothing."""

    def ended(self, outcome: SlideOutcome) -> None:
        """Say how a slide ended."""
        cells = "" if outcome.cells is None else f", {outcome.cells:,} nuclei"
        self._say(f"{outcome.slide}: {outcome.status}{cells}, {outcome.seconds:.1f} s")

    def _say(self, words: str) -> None:
        self._said = self._meter.clock()
        log.info("%s  [%s, %s]", words, self._meter.place, self._meter.text())


class Drawn:
    """Bars: one for each slide that is worked on, and one for all of them with what is left."""

    def __init__(self, meter: Meter, bars: Bars) -> None:
        self._meter, self._bars, self._drawn = meter, bars, 0.0
        self._all = bars.add_task(meter.place, total=meter.slides, text="")
        self._tasks: dict[int, TaskID] = {}

    def at(self, lane: int, state: Lane) -> None:
        """Draw where a slide is, a few times a second."""
        now = self._meter.clock()
        words, task = in_stage(state), self._tasks.get(lane)
        soon = now - self._drawn < DRAW_S and state.done < state.tiles and state.what in COUNTED
        if task is not None and soon:
            return
        self._drawn = now
        if lane not in self._tasks:
            self._tasks[lane] = self._bars.add_task("", total=None, text="")
        self._bars.update(
            self._tasks[lane], description=one_line(state.slide), total=state.tiles, completed=state.done,
            text=words,
        )  # fmt: skip
        self._draw_all()

    def after(self, lane: int) -> None:
        """Take away the bar of a lane."""
        if lane in self._tasks:
            self._bars.remove_task(self._tasks.pop(lane))

    def ended(self, outcome: SlideOutcome) -> None:
        """Draw that one more slide ended."""
        self._draw_all()

    def _draw_all(self) -> None:
        done = self._meter.ended + sum(lane.share(self._meter.stages) for lane in self._meter.lanes.values())
        self._bars.update(self._all, description=self._meter.place, completed=done, text=self._meter.text())


class LaneProgress:
    """Hears how the slide of one lane gets on (`pipeline.Progress`) and has it counted and shown."""

    def __init__(self, number: int, meter: Meter, board: Board) -> None:
        self._number, self._meter, self._board = number, meter, board

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        """Hear of a new slide."""
        self._board.at(self._number, self._meter.begin(self._number, slide_id, tiles, done))

    def advance(self, nuclei: int, tiles: int = 1) -> None:
        """Hear of tiles that are done."""
        self._board.at(self._number, self._meter.advance(self._number, nuclei, tiles))

    def stage(self, name: str) -> None:
        """Hear what follows when the tiles are done."""
        state = self._meter.lanes.get(self._number)
        if state is not None:
            state.what = name
            self._board.at(self._number, state)


class RunProgress(LaneProgress):
    """Hears of a whole run: its own lane is the only one unless `lane` gives others."""

    def __init__(self, meter: Meter, board: Board) -> None:
        super().__init__(0, meter, board)

    def lane(self, number: int) -> LaneProgress:
        """Return what hears the slides of another device."""
        return LaneProgress(number, self._meter, self._board)

    def ended(self, outcome: SlideOutcome) -> None:
        """Hear how a slide ended."""
        at = [number for number, lane in self._meter.lanes.items() if lane.slide == outcome.slide]
        self._meter.end(outcome)
        for number in at:
            self._board.after(number)
        self._board.ended(outcome)


@contextmanager
def progress_bar(slides: int, shown: bool, stages: int = 1) -> Iterator[RunProgress]:
    """Yield what hears of a run over so many slides; it draws on a terminal and prints lines elsewhere, on stderr.

    Nothing is shown unless `shown`.
    """
    meter = Meter(slides, stages)
    if not shown or not sys.stderr.isatty():
        yield RunProgress(meter, Lines(meter) if shown else NoBoard())
        return
    from rich.console import Console

    with bars_on(Console(stderr=True)) as bars:
        yield RunProgress(meter, Drawn(meter, bars))


def bars_on(console: Console) -> Bars:
    """Return bars on a terminal that take 80 columns at most."""
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    def cell(width: int) -> Column:
        return Column(width=width, no_wrap=True, overflow="ellipsis")

    # No markup: a slide may be called anything.
    name = TextColumn("{task.description}", markup=False, table_column=cell(NAME_WIDTH))
    text = TextColumn("{task.fields[text]}", markup=False, table_column=cell(TEXT_WIDTH))
    return Progress(name, BarColumn(BAR_WIDTH), text, console=console, transient=True)


def summary(outcomes: Sequence[SlideOutcome], to_stderr: bool) -> None:
    """Print one line per slide and one for all; of very many slides only those that are not done."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("slide", overflow="fold")
    table.add_column("status")
    table.add_column("verdict")
    table.add_column("nuclei", justify="right")
    table.add_column("seconds", justify="right")
    listed = (
        outcomes if len(outcomes) <= MOST_ROWS else [o for o in outcomes if o.status in ("failed", "stale")][:MOST_ROWS]
    )
    for o in listed:
        # Text, since a slide's name may look like markup.
        cells = "" if o.cells is None else f"{o.cells:,}"
        word = "" if o.verdict is None else o.verdict.word
        table.add_row(Text(" ".join(o.slide.splitlines())), o.status, word, cells, f"{o.seconds:.1f}")
    if len(outcomes) > 1:
        table.add_row(
            in_numbers(outcomes),
            "",
            "",
            f"{sum(o.cells or 0 for o in outcomes):,}",
            f"{sum(o.seconds for o in outcomes):.1f}",
        )
    Console(stderr=to_stderr).print(table)


def reasons(outcomes: Sequence[SlideOutcome]) -> list[str]:
    """Return why verdicts are not good, the worst of the first few slides, each check on a line with what to do."""
    from cellslide.plausibility.verdict import in_short
    from cellslide.types import WORDS

    judged = [o for o in outcomes if o.verdict is not None and o.verdict.reasons]
    judged.sort(key=lambda o: -WORDS.index(o.verdict.word) if o.verdict else 0)
    lines = []
    for o in judged[:MOST_REASONED]:
        checks = () if o.verdict is None else o.verdict.reasons
        lines += [f"{' '.join(o.slide.splitlines())}: {in_short(check)}. {check.advice}" for check in checks]
    left = len(judged) - MOST_REASONED
    return [*lines, f"and {left:,} more slides to look at"] if left > 0 else lines


def in_numbers(outcomes: Sequence[SlideOutcome]) -> str:
    """Return how many slides ended how."""
    counts = [(name, sum(o.status == name for o in outcomes)) for name in ("done", "skipped", "stale", "failed")]
    return f"{len(outcomes):,} slides: " + ", ".join(f"{n:,} {name}" for name, n in counts if n)
