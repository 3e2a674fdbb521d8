"""How a slide gets on, told by the worker to the owner of the run now and then, through Dask's events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Worker

    from cellslide.pipeline import Progress

TELL_S = 1.0


def topic_of(run_id: str) -> str:
    """Return Dask's name for the events of a run."""
    return f"cellslide-{run_id}"


class Teller:
    """Progress that goes to the owner of the run, tiles gathered."""

    def __init__(self, worker: Worker, run_id: str, slide_id: str) -> None:
        self._worker, self._topic, self._slide = worker, topic_of(run_id), slide_id
        self._told, self._nuclei, self._tiles = time.monotonic(), 0, 0

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        """Tell that a slide starts."""
        self._tell("begin", slide_id, tiles, done)

    def advance(self, nuclei: int, tiles: int = 1) -> None:
        """Tell of tiles that are done, now and then."""
        self._nuclei, self._tiles = self._nuclei + nuclei, self._tiles + tiles
        if time.monotonic() - self._told > TELL_S:
            self._flush()

    def stage(self, name: str) -> None:
        """Tell what follows."""
        self._flush()
        self._tell("stage", name)

    def _flush(self) -> None:
        if self._tiles:
            self._tell("advance", self._nuclei, self._tiles)
        self._told, self._nuclei, self._tiles = time.monotonic(), 0, 0

    def _tell(self, what: str, *values: Any) -> None:
        self._worker.log_event(self._topic, {"slide": self._slide, "what": what, "values": list(values)})


def hear(event: Any, lanes: Mapping[str, Progress]) -> None:
    """Pass an event of a worker, (time, message), on to what shows the lane that its slide is in."""
    message = event[1]
    lane = lanes.get(message["slide"])
    if lane is not None and message["what"] in ("begin", "advance", "stage"):
        getattr(lane, message["what"])(*message["values"])
