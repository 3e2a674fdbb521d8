"""The owner of a run: hands out stages, no more than there is room for, and hears how they end.

What waits is kept here and not at the scheduler: a worker that dies takes nothing with it but what it was doing, and
a scheduler that dies takes nothing at all.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cellslide.batch.dask.connect import Cluster
from cellslide.batch.dask.events import hear, topic_of
from cellslide.batch.dask.retries import write_off
from cellslide.batch.dask.slots import Slots
from cellslide.batch.dask.stages import Handed, Job, Stage, StageEnd, ask_to_stop, do_stage
from cellslide.batch.run import SlideOutcome
from cellslide.classify.targets import Target
from cellslide.errors import CellslideError, Interrupted, in_words
from cellslide.progress import Progress, StopCheck

if TYPE_CHECKING:
    from distributed import Future

# Futures are looked at so often (s); what runs may take so long to stop (s).
POLL_S, STOP_S = 0.1, 60.0
# A stage that the system's errors ended is tried again by Dask; one whose workers died, or that was given back, by us.
RETRIES, MOST_DEATHS, MOST_RETURNS = 2, 2, 30
# So long (s) a folder may stay held by a worker that was cut off before it is asked for again.
AGAIN_S = 10.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Task:
    """A stage of a slide that waits or runs; how often its workers died, how often it came back, and until when it
    waits (monotonic s)."""

    target: Target
    stage: Stage
    handed: Handed
    deaths: int = 0
    returns: int = 0
    not_before: float = 0.0

    @property
    def slide_id(self) -> str:
        """Return the slide's id."""
        return self.target.source.slide_id


def over_cluster(
    cluster: Cluster, job: Job, targets: Sequence[Target], lane_of: Callable[[int], Progress], stop: StopCheck
) -> Iterator[tuple[Target, SlideOutcome]]:
    """Do slides on the workers of a scheduler and yield each with how it ended, as they end.

    lane_of  gives what hears the progress of the k-th of the slides that are worked on at once.
    Where the scheduler is lost, slides that were not done come out as failed, for that reason. Raises Interrupted when
    asked to stop, CellslideError for what no slide would escape.
    """
    owner = _Owner(cluster, job, lane_of)
    for target in targets:
        owner.waiting[job.first].append(_Task(target, job.first, Handed()))
    # Dask calls from a thread of its own; what shows progress is used by this one alone.
    cluster.client.subscribe_topic(topic_of(job.run_id), owner.events.append)
    try:
        yield from owner.run(stop)
    except BaseException:
        owner.stop_all(143)
        raise


@dataclass(slots=True)
class _Owner:
    """A run: what waits by stage, what runs, and in which lane each slide is shown."""

    cluster: Cluster
    job: Job
    lane_of: Callable[[int], Progress]
    waiting: dict[Stage, deque[_Task]] = field(default_factory=lambda: {stage: deque() for stage in Stage})
    running: dict[Future, _Task] = field(default_factory=dict)
    room: Slots = field(default_factory=Slots)
    lanes: dict[str, Progress] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    events: deque[Any] = field(default_factory=deque)
    sent: int = 0

    def run(self, stop: StopCheck) -> Iterator[tuple[Target, SlideOutcome]]:
        """Do all that waits."""
        while self.running or any(self.waiting.values()):
            if (code := stop()) is not None:
                self.stop_all(code)
                raise Interrupted(code)
            if self.cluster.client.status != "running":
                yield from self._lost()
                return
            self.room.count(self.cluster)
            self._send()
            while self.events:
                hear(self.events.popleft(), self.lanes)
            ended = [future for future in self.running if future.done()]
            for future in ended:
                yield from self._ended(future, self.running.pop(future))
            if not ended:
                time.sleep(POLL_S)

    def _send(self) -> None:
        """Hand out what there is room for; slides that are nearly done go first."""
        busy = Counter(task.stage.tag for task in self.running.values())
        for stage in reversed(Stage):
            queue = self.waiting[stage]
            for _ in range(len(queue)):
                if busy[stage.tag] >= self.room.slots[stage.tag]:
                    break
                task = queue.popleft()
                if task.not_before > time.monotonic():
                    queue.append(task)
                    continue
                self._submit(task)
                busy[stage.tag] += 1

    def _submit(self, task: _Task) -> None:
        self.sent += 1
        if task.slide_id not in self.lanes:
            taken = set(self.numbers.values())
            number = next(k for k in range(len(taken) + 1) if k not in taken)
            self.numbers[task.slide_id], self.lanes[task.slide_id] = number, self.lane_of(number)
        future = self.cluster.client.submit(
            do_stage, task.stage, task.target, self.job, task.handed,
            key=f"cellslide-{task.stage.value}-{self.job.run_id}-{self.sent}",
            resources=self.room.resources(task.stage.tag), retries=RETRIES, pure=False,
        )  # fmt: skip
        self.running[future] = task

    def _ended(self, future: Future, task: _Task) -> Iterator[tuple[Target, SlideOutcome]]:
        """Take how a stage ended: the next one waits, or the slide has its outcome."""
        from distributed import KilledWorker

        if future.status == "error":
            error = future.exception()
            task.deaths += isinstance(error, KilledWorker)
            if isinstance(error, KilledWorker) and task.deaths < MOST_DEATHS:
                # Dask blames all that a dead worker had been given.
                yield from self._again(task, 0.0)
                return
            yield self._failed(task, _words(error))
            return
        try:
            end: StageEnd | None = future.result(timeout=STOP_S) if future.status == "finished" else None
        except Exception as error:
            log.debug("%s: its result is lost", task.slide_id, exc_info=error)
            end = None
        if end is None or end.undone:
            yield from self._again(task, 0.0 if end is None else AGAIN_S)
        elif end.fatal is not None:
            fatal = CellslideError(end.fatal[0])
            fatal.exit_code = end.fatal[1]
            raise fatal
        elif end.next is not None:
            self.waiting[end.next].append(_Task(task.target, end.next, end.handed))
        elif end.outcome is not None:
            yield self._done(task, end.outcome)

    def _again(self, task: _Task, wait_s: float) -> Iterator[tuple[Target, SlideOutcome]]:
        task.returns, task.not_before = task.returns + 1, time.monotonic() + wait_s
        if task.returns > MOST_RETURNS:
            yield self._failed(
                task, f"{task.target.folder}: given back {MOST_RETURNS} times; does another run work here?"
            )
            return
        self.waiting[task.stage].append(task)

    def _failed(self, task: _Task, words: str) -> tuple[Target, SlideOutcome]:
        write_off(task.target.folder, words)
        outcome = SlideOutcome(task.slide_id, "failed", None, task.handed.seconds, words, 1)
        return self._done(task, outcome)

    def _done(self, task: _Task, outcome: SlideOutcome) -> tuple[Target, SlideOutcome]:
        self.numbers.pop(task.slide_id, None)
        self.lanes.pop(task.slide_id, None)
        return task.target, outcome

    def _lost(self) -> Iterator[tuple[Target, SlideOutcome]]:
        """Count all that is left as failed, because there is no scheduler any more."""
        words = "not done: the Dask scheduler was lost; what is done is kept, the same command goes on from there"
        log.error("the Dask scheduler was lost")
        left = [*self.running.values(), *(task for queue in self.waiting.values() for task in queue)]
        self.running.clear()
        for task in left:
            yield task.target, SlideOutcome(task.slide_id, "failed", None, task.handed.seconds, words, 1)

    def stop_all(self, code: int) -> None:
        """Ask what runs to stop at the next part, wait for it, and take back what has not begun."""
        if not self.running or self.cluster.client.status != "running":
            return
        with suppress(Exception):
            self.cluster.client.run(ask_to_stop, self.job.run_id, code, on_error="ignore")
        deadline = time.monotonic() + STOP_S
        while any(not future.done() for future in self.running) and time.monotonic() < deadline:
            if self.cluster.client.status != "running":
                return
            time.sleep(POLL_S)
        with suppress(Exception):
            self.cluster.client.cancel(list(self.running))


def _words(error: BaseException | None) -> str:
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return "its workers died again and again, most likely for want of memory; give them more, or fewer --workers"
    return in_words(error or CellslideError("ended without a reason"))
