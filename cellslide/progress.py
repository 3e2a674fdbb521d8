"""What goes along with a run of a slide: progress callbacks, the wish to stop, and the lock of its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cellslide.errors import Interrupted

StopCheck = Callable[[], int | None]


class Progress(Protocol):
    """Progress callbacks of one slide."""

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        """Start a slide, `done` of whose tiles an earlier run has finished."""

    def advance(self, nuclei: int) -> None:
        """Count one more tile with so many nuclei."""

    def stage(self, name: str) -> None:
        """Name the stage that follows when the tiles are done."""


class Silent:
    """Progress that nobody sees."""

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        """Show nothing."""

    def advance(self, nuclei: int, tiles: int = 1) -> None:
        """Show nothing."""

    def stage(self, name: str) -> None:
        """Show nothing."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Callbacks of a run: its progress, whether to stop (with which exit code), and the check of its lock."""

    progress: Progress = Silent()
    stop: StopCheck = lambda: None
    lock: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raise Interrupted if the run is to stop, CellslideError if another run took the folder."""
        if (code := self.stop()) is not None:
            raise Interrupted(code)
        self.lock()


IDLE = Watch()
