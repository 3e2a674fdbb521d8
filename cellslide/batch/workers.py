"""Slides over several devices of one machine: a process each, that takes the next slide when it is done with one.

The processes open the model themselves and write to disk; what passes between is a slide's name, progress and how it
ended. A process that dies is replaced and its slide done again, going on from what it kept; a slide that ends its
process twice has failed. Signals are heard by the parent alone, which tells the others.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Protocol

from cellslide.errors import CellslideError, Interrupted

if TYPE_CHECKING:
    from cellslide.batch.run import SlideOutcome
    from cellslide.classify.targets import Target
    from cellslide.progress import Progress, StopCheck
    from cellslide.slides.slide import Slide

# Does one slide; hears who wants to know of its progress, and what says whether to stop.
Handle = Callable[["Target", "Progress", "StopCheck"], "SlideOutcome"]
# A slide whose process died is tried once more; a process that dies before its first slide is started once more.
TRIES = 2
# Progress is told so often (s), signals are looked for so often (s), a process may take so long to end (s).
TELL_S, POLL_S, END_S = 0.2, 0.2, 30.0
# Processes that were asked to stop, and have not when the run ends, are killed after so long (s).
KILL_S = 0.5

log = logging.getLogger(__name__)


class Work(Protocol):
    """What is done with each slide; pickled, then opened in each process."""

    @property
    def stages(self) -> int:
        """How often the progress of a slide begins."""

    def check(self) -> None:
        """Raise UsageError, WeightsError or MissingDependencyError where no slide could be done; starts nothing."""

    def look(self, target: Target) -> Slide | None:
        """Open a slide as the work will, None where that needs no pixels; raises what the work would."""

    def open(self, device: str, processes: int) -> AbstractContextManager[Handle]:
        """Open the model on a device, one of so many processes, and give what does one slide."""


def over_devices(
    work: Work, targets: Sequence[Target], devices: Sequence[str], lane_of: Callable[[int], Progress], stop: StopCheck
) -> Iterator[tuple[Target, SlideOutcome]]:
    """Do slides on several devices at once and yield each with how it ended, as they end.

    lane_of  gives what hears the progress of the k-th device.
    Raises Interrupted when asked to stop, CellslideError where a device cannot be used.
    """
    fleet = _Fleet(work, deque(range(min(len(devices), len(targets)))), targets, devices, lane_of)
    try:
        yield from fleet.run(stop)
    finally:
        fleet.close()


@dataclass(slots=True)
class _Lane:
    """One device with its process and the slide (index) that it is at; `started` once it has been ready."""

    number: int
    device: str
    process: BaseProcess
    pipe: connection.Connection
    slide: int | None = None
    started: bool = False


@dataclass(slots=True)
class _Fleet:
    """The processes of a run, what waits, and how often each slide's process died."""

    work: Work
    free: deque[int]
    targets: Sequence[Target]
    devices: Sequence[str]
    lane_of: Callable[[int], Progress]
    lanes: list[_Lane] = field(default_factory=list)
    todo: deque[int] = field(default_factory=deque)
    deaths: dict[int, int] = field(default_factory=dict)
    false_starts: int = 0
    stop_code: Any = None

    def run(self, stop: StopCheck) -> Iterator[tuple[Target, SlideOutcome]]:
        self.stop_code = multiprocessing.get_context("spawn").Value("i", 0, lock=False)
        self.todo.extend(range(len(self.targets)))
        self.lanes = [self._start(number) for number in self.free]
        while self.lanes:
            if (code := stop()) is not None:
                self.stop_code.value = code
            ready = connection.wait([x for lane in self.lanes for x in (lane.pipe, lane.process.sentinel)], POLL_S)
            for lane in [lane for lane in self.lanes if {lane.pipe, lane.process.sentinel} & set(ready)]:
                yield from self._hear(lane)
        if code := self.stop_code.value:
            raise Interrupted(code)

    def _start(self, number: int) -> _Lane:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        level = logging.getLogger("cellslide").level
        arguments = (theirs, self.work, self.devices[number], len(self.free), self.stop_code, os.getpid(), level)
        process = spawn.Process(target=_serve, args=arguments, name=f"cellslide-{self.devices[number]}")
        process.start()
        theirs.close()
        return _Lane(number, self.devices[number], process, ours)

    def _hear(self, lane: _Lane) -> Iterator[tuple[Target, SlideOutcome]]:
        """Take what a process says, all of it; its death too."""
        try:
            while lane.pipe.poll():
                kind, *rest = lane.pipe.recv()
                if kind == "progress":
                    name, *values = rest
                    getattr(self.lane_of(lane.number), name)(*values)
                elif kind == "ended":
                    yield self._ended(lane, rest[0])
                elif kind == "ready":
                    lane.started = True
                    self._next(lane)
                else:
                    self._left(lane, kind, rest)
                    return
        except (EOFError, OSError):
            pass
        else:
            if lane.process.is_alive():
                return
        yield from self._died(lane)

    def _next(self, lane: _Lane) -> None:
        lane.slide = self.todo.popleft() if self.todo and not self.stop_code.value else None
        lane.pipe.send(None if lane.slide is None else self.targets[lane.slide])

    def _ended(self, lane: _Lane, outcome: SlideOutcome) -> tuple[Target, SlideOutcome]:
        assert lane.slide is not None
        target, lane.slide = self.targets[lane.slide], None
        return target, outcome

    def _left(self, lane: _Lane, kind: str, rest: list[Any]) -> None:
        """Take leave of a process that ended as it should, or of the whole run where its device cannot be used."""
        self.lanes.remove(lane)
        if kind == "unusable":
            error = CellslideError(f"{rest[0]} (on {lane.device})")
            error.exit_code = rest[1]
            raise error
        lane.process.join(END_S)

    def _died(self, lane: _Lane) -> Iterator[tuple[Target, SlideOutcome]]:
        """Replace a process that died, and put its slide back or count it as failed."""
        lane.process.join(END_S)
        words = f"its process on {lane.device} died ({_how(lane.process.exitcode)})"
        self.lanes.remove(lane)
        if lane.slide is None:
            self.false_starts += not lane.started
            if self.false_starts >= TRIES:
                raise CellslideError(f"{words.removeprefix('its ')} before its first slide; -v shows more")
        else:
            target = self.targets[lane.slide]
            self.deaths[lane.slide] = self.deaths.get(lane.slide, 0) + 1
            if self.deaths[lane.slide] < TRIES:
                log.warning("%s: %s; it is done again, from what was kept", target.source.slide_id, words)
                self.todo.appendleft(lane.slide)
            else:
                yield target, _lost(target, words)
        if self.todo and not self.stop_code.value:
            self.lanes.append(self._start(lane.number))

    def close(self) -> None:
        """End the processes: those that still work are asked to stop, then made to."""
        asked = self.stop_code is not None and bool(self.stop_code.value)
        if self.stop_code is not None and not asked:
            self.stop_code.value = 128 + signal.SIGTERM
        deadline = time.monotonic() + (END_S if self.lanes and not asked else KILL_S)
        for lane in self.lanes:
            lane.pipe.close()
            lane.process.join(max(0.0, deadline - time.monotonic()))
            if lane.process.is_alive():
                lane.process.kill()
                lane.process.join()


def _lost(target: Target, words: str) -> SlideOutcome:
    from cellslide.batch.run import SlideOutcome  # Loads torch, which this module leaves to the work.

    advice = "often for want of memory: try --workers 1 or a smaller --batch-size"
    return SlideOutcome(target.source.slide_id, "failed", None, 0.0, f"{words} twice; {advice}", 1)


def _how(exit_code: int | None) -> str:
    return f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"


class WorkerProgress:
    """Progress that goes to another process, advances gathered so that it hears of them now and then.

    tell     passes on the name of what is heard, and its values.
    every_s  so often advances are told.
    """

    def __init__(self, tell: Callable[..., None], every_s: float) -> None:
        self._tell, self._every_s = tell, every_s
        self._told, self._nuclei, self._tiles = time.monotonic(), 0, 0

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        """Tell that a slide starts."""
        self._tell("begin", slide_id, tiles, done)

    def advance(self, nuclei: int, tiles: int = 1) -> None:
        """Tell of tiles that are done, now and then."""
        self._nuclei, self._tiles = self._nuclei + nuclei, self._tiles + tiles
        if time.monotonic() - self._told > self._every_s:
            self.flush()

    def stage(self, name: str) -> None:
        """Tell what follows."""
        self.flush()
        self._tell("stage", name)

    def flush(self) -> None:
        """Tell what was gathered."""
        if self._tiles:
            self._tell("advance", self._nuclei, self._tiles)
        self._told, self._nuclei, self._tiles = time.monotonic(), 0, 0


def _serve(
    pipe: connection.Connection, work: Work, device: str, processes: int, stop_code: Any, parent: int, level: int
) -> None:
    """Be one device's process: open the model, do slide after slide, end when told or when the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)
    logger = logging.getLogger("cellslide")
    logger.setLevel(level)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())

    def stop() -> int | None:
        return stop_code.value or (None if os.getppid() == parent else 128 + signal.SIGTERM)

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            with work.open(device, processes) as handle:
                _take(pipe, handle, stop)
        except Interrupted:
            pipe.send(("stopped",))
        except CellslideError as error:
            pipe.send(("unusable", str(error), error.exit_code))
        except Exception as error:
            if level <= logging.DEBUG:
                logger.exception("on %s", device)
            pipe.send(("unusable", f"{type(error).__name__}: {error}", getattr(error, "exit_code", 1)))
        else:
            pipe.send(("left",))


def _take(pipe: connection.Connection, handle: Handle, stop: StopCheck) -> None:
    teller = WorkerProgress(lambda *words: pipe.send(("progress", *words)), TELL_S)
    while True:
        if (code := stop()) is not None:
            raise Interrupted(code)
        pipe.send(("ready",))
        target = pipe.recv()
        if target is None:
            return
        outcome = handle(target, teller, stop)
        teller.flush()
        pipe.send(("ended", outcome))
