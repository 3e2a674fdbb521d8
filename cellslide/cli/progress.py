"""What a run shows on the terminal: bars, or plain lines where there is no terminal, and a table at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from cellslide.batch.run import SlideOutcome

# Where lines are printed, at most so often within a slide (s); an estimate needs some time to mean anything (s).
LINE_S, ESTIMATE_S = 30.0, 3.0
DRAW_S = 0.1
# A longer table scrolls away; then only what is not done is listed, and the summary has the rest.
MOST_ROWS = 40

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Lane:
    """A slide that is worked on: its tiles, those done before this run and now, and what is done with it at the moment.

    `stages` counts how often the same slide began: once for its tiles, once more when it is typed.
    """

    slide: str = ""
    tiles: int = 0
    before: int = 0
    done: int = 0
    nuclei: int = 0
    what: str = "tiles"
    stages: int = 0

    def share(self, stages: int) -> float:
        """Share of the slide that this run has done, of so many stages."""
        here = (self.done - self.before) / max(self.tiles - self.before, 1)
        return min((self.stages - 1 + here) / stages, 1.0) if self.stages else 0.0


@dataclass(slots=True)
class Meter:
    """Counts slides, tiles and cells of a run, and says how fast it goes and how long it will take.

    stages  how often a slide begins: 1 to segment or to classify, 2 to do both.
    """

    slides: int
    stages: int = 1
    clock: Callable[[], float] = time.monotonic
    lanes: dict[int, Lane] = field(default_factory=dict)
    ended: int = 0
    worked: int = 0
    failed: int = 0
    tiles: int = 0
    cells: int = 0
    began: float = 0.0

    def begin(self, lane: int, slide_id: str, tiles: int, done: int) -> Lane:
        """Count the beginning of a slide, or of its next stage."""
        self.began = self.began or self.clock()
        before = self.lanes.get(lane)
        again = before.stages if before is not None and before.slide == slide_id else 0
        self.lanes[lane] = Lane(slide_id, tiles, done, done, stages=again + 1)
        return self.lanes[lane]

    def advance(self, lane: int, nuclei: int, tiles: int = 1) -> Lane:
        """Count tiles that are done, with their nuclei."""
        at = self.lanes.setdefault(lane, Lane())
        at.done, at.nuclei = at.done + tiles, at.nuclei + nuclei
        self.tiles, self.cells = self.tiles + tiles, self.cells + nuclei
        return at

    def end(self, outcome: SlideOutcome) -> None:
        """Count a slide that ended."""
        self.ended += 1
        self.worked += outcome.status != "skipped"
        self.failed += outcome.status == "failed"
        for number in [n for n, lane in self.lanes.items() if lane.slide == outcome.slide]:
            del self.lanes[number]

    @property
    def rest_s(self) -> float | None:
        """Estimate of the rest in seconds, as if all slides were like those of this run; None while there is none."""
        at_hand = sum(lane.share(self.stages) for lane in self.lanes.values())
        elapsed = self.clock() - self.began if self.began else 0.0
        if elapsed < ESTIMATE_S or self.worked + at_hand <= 0:
            return None
        return elapsed / (self.worked + at_hand) * max(self.slides - self.ended - at_hand, 0.0)

    def text(self) -> str:
        """Return slides, tiles and cells a second and the estimate in words."""
        failed = f" ({self.failed} failed)" if self.failed else ""
        elapsed = max(self.clock() - self.began, 1e-9) if self.began else 0.0
        words = [f"{self.ended}/{self.slides} slides{failed}"]
        if elapsed >= 1:
            slides = self.worked / elapsed
            words += [f"{slides:.2f} slides/s" if slides >= 0.1 else f"{3600 * slides:.1f} slides/h"]
            words += [f"{self.tiles / elapsed:,.1f} tiles/s", f"{self.cells / elapsed:,.0f} cells/s"]
        if (rest := self.rest_s) is not None:
            words.append(f"about {in_time(rest)} left")
        return ", ".join(words)


def in_time(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
            self._say(f"{state.slide}: {state.done:,}/{state.tiles:,} {state.what}, {state.nuclei:,} nuclei")

    def after(self, lane: int) -> None:
        """Say nothing."""

    def ended(self, outcome: SlideOutcome) -> None:
        """Say how a slide ended."""
        cells = "" if outcome.cells is None else f", {outcome.cells:,} nuclei"
        self._say(f"{outcome.slide}: {outcome.status}{cells}, {outcome.seconds:.1f} s")

    def _say(self, words: str) -> None:
        self._said = self._meter.clock()
        log.info("%s  [%s]", words, self._meter.text())


class Drawn:
    """Bars: one for each slide that is worked on, and one for all of them where there are several."""

    def __init__(self, meter: Meter, bars: Bars) -> None:
        self._meter, self._bars, self._drawn = meter, bars, 0.0
        self._tasks = {}
        if meter.slides > 1:
            self._tasks[-1] = bars.add_task("all slides", total=meter.slides, text="")

    def at(self, lane: int, state: Lane) -> None:
        """Draw where a slide is, a few times a second."""
        now = self._meter.clock()
        if lane in self._tasks and now - self._drawn < DRAW_S and state.done < state.tiles:
            return
        self._drawn = now
        if lane not in self._tasks:
            self._tasks[lane] = self._bars.add_task("", total=None, text="")
        words = f"{state.done:,}/{state.tiles:,} {state.what}, {state.nuclei:,} nuclei"
        words += f", {self._meter.text()}" if self._meter.slides == 1 else ""
        task = self._tasks[lane]
        self._bars.update(task, description=state.slide, total=state.tiles, completed=state.done, text=words)
        self._all()

    def after(self, lane: int) -> None:
        """Take away the bar of a lane."""
        if lane in self._tasks:
            self._bars.remove_task(self._tasks.pop(lane))

    def ended(self, outcome: SlideOutcome) -> None:
        """Draw that one more slide ended."""
        self._all()

    def _all(self) -> None:
        if -1 in self._tasks:
            done = self._meter.ended + sum(lane.share(self._meter.stages) for lane in self._meter.lanes.values())
            self._bars.update(self._tasks[-1], completed=done, text=self._meter.text())


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
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield RunProgress(meter, Drawn(meter, bars))


def summary(outcomes: Sequence[SlideOutcome], to_stderr: bool) -> None:
    """Print one line per slide and one for all; of very many slides only those that are not done."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("slide", overflow="fold")
    table.add_column("status")
    table.add_column("nuclei", justify="right")
    table.add_column("seconds", justify="right")
    listed = outcomes if len(outcomes) <= MOST_ROWS else [o for o in outcomes if o.status == "failed"][:MOST_ROWS]
    for o in listed:
        # Text, since a slide's name may look like markup.
        cells = "" if o.cells is None else f"{o.cells:,}"
        table.add_row(Text(" ".join(o.slide.splitlines())), o.status, cells, f"{o.seconds:.1f}")
    if len(outcomes) > 1:
        table.add_row(
            in_numbers(outcomes),
            "",
            f"{sum(o.cells or 0 for o in outcomes):,}",
            f"{sum(o.seconds for o in outcomes):.1f}",
        )
    Console(stderr=to_stderr).print(table)


def in_numbers(outcomes: Sequence[SlideOutcome]) -> str:
    """Return how many slides ended how."""
    counts = [(name, sum(o.status == name for o in outcomes)) for name in ("done", "skipped", "failed")]
    return f"{len(outcomes):,} slides: " + ", ".join(f"{n:,} {name}" for name, n in counts if n)
