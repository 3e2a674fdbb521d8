"""How a slide gets on, told by the worker to the owner of the run now and then, through Dask's events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cellslide.batch.workers import WorkerProgress

if TYPE_CHECKING:
    from distributed import Worker

    from cellslide.progress import Progress

TELL_S = 1.0


def topic_of(run_id: str) -> str:
    """Return Dask's name for the events of a run."""
    return f"cellslide-{run_id}"


def telling(worker: Worker, run_id: str, slide_id: str) -> WorkerProgress:
    """Return progress that goes to the owner of the run, tiles gathered."""

    def tell(what: str, *values: Any) -> None:
        worker.log_event(topic_of(run_id), {"slide": slide_id, "what": what, "values": list(values)})

    return WorkerProgress(tell, TELL_S)


def hear(event: Any, lanes: Mapping[str, Progress]) -> None:
    """Pass an event of a worker, (time, message), on to what shows the lane that its slide is in."""
    message = event[1]
    lane = lanes.get(message["slide"])
    if lane is not None and message["what"] in ("begin", "advance", "stage"):
        getattr(lane, message["what"])(*message["values"])
