"""What a run shows on the terminal: one bar per slide, and a table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cellslide.batch import SlideOutcome


class RateColumn(ProgressColumn):
    """Tiles a second, once there is something to tell."""

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        return Text("" if task.speed is None else f"{task.speed:.2f}/s")


class SlideBar:
    """Shows the slide that is worked on: tiles done, tiles a second, nuclei so far."""

    def __init__(self, bar: Progress, slides: int) -> None:
        self._bar, self._slides, self._number = bar, slides, 0
        self._task: TaskID | None = None
        self._nuclei = 0

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        """Show a new slide in place of the last."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._number, self._nuclei = self._number + 1, 0
        name = slide_id if self._slides == 1 else f"{slide_id} ({self._number}/{self._slides})"
        self._task = self._bar.add_task(name, total=tiles, completed=done, nuclei=0, what="tiles")

    def advance(self, nuclei: int) -> None:
        """Count one more tile and its nuclei."""
        self._nuclei += nuclei
        if self._task is not None:
            self._bar.update(self._task, advance=1, nuclei=self._nuclei)

    def stage(self, name: str) -> None:
        """Show what follows when the tiles are done."""
        if self._task is not None:
            self._bar.update(self._task, what=name)


@contextmanager
def progress_bar(slides: int, shown: bool) -> Iterator[SlideBar]:
    """Yield a bar for so many slides, on stderr so that stdout stays clean; nothing is drawn unless `shown`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[what]}"),
        RateColumn(),
        TextColumn("{task.fields[nuclei]:,} nuclei"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        yield SlideBar(bar, slides)


def summary(outcomes: Sequence[SlideOutcome], to_stderr: bool) -> None:
    """Print one line per slide."""
    table = Table(box=None, pad_edge=False)
    table.add_column("slide", overflow="fold")
    table.add_column("status")
    table.add_column("nuclei", justify="right")
    table.add_column("seconds", justify="right")
    for o in outcomes:
        table.add_row(o.slide, o.status, "" if o.cells is None else f"{o.cells:,}", f"{o.seconds:.1f}")
    Console(stderr=to_stderr).print(table)
