"""How slides end: a bad one is recorded and stops no other, one with cells gets its page; signals stop cleanly."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

from cellslide.classify.targets import Target
from cellslide.errors import BusyError, CellslideError, Interrupted, StaleError, UsageError, in_words
from cellslide.inference.segmenter import Segmenter, begin_record
from cellslide.report import keep_report
from cellslide.slides.identity import slide_sha256
from cellslide.slides.inputs import SlideInput
from cellslide.store.run_record import read_record, write_record
from cellslide.types import RunRecord, Verdict
from cellslide.types.address import full_name

# Broken weights or a missing device would fail every slide in the same way.
ENVIRONMENT = 3

# There is no SIGUSR1 on Windows.
STOPPING = (signal.SIGINT, signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))

# A stop that was asked for is made after so long, and the process ended after so long (s).
STOP_S, END_S = 3.0, 4.6

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SlideOutcome:
    """How one slide ended: `cells` found, seconds spent, why it failed, and the exit code that alone it would give.

    status   "stale" is work of other settings that was left as it is.
    verdict  whether the cells can be used; None where there are none, or an earlier version found them.
    """

    slide: str
    status: Literal["done", "skipped", "failed", "stale"]
    cells: int | None
    seconds: float
    error: str | None = None
    exit_code: int = 0
    verdict: Verdict | None = None

    @property
    def unusable(self) -> bool:
        """Whether the cells are not to be used."""
        return self.verdict is not None and self.verdict.word == "do not use"

    @property
    def refused(self) -> bool:
        """True where the request did not suit the slide: nothing was done to it, and nothing was noted."""
        return self.exit_code == UsageError.exit_code

    def to_json(self) -> dict[str, Any]:
        """Return the line of `--log-json`."""
        names = ("slide", "status", "cells", "seconds", "error")
        word = None if self.verdict is None else self.verdict.word
        return {**{name: getattr(self, name) for name in names}, "verdict": word}


def reported(target: Target, outcome: SlideOutcome) -> SlideOutcome:
    """Return how a slide ended, after the page of one that has cells is written, unless a newer one is there."""
    if outcome.cells is not None:
        keep_report(target.folder, target.source.local or target.source.path)
    return outcome


def tried(
    source: SlideInput, work: Callable[[], tuple[RunRecord, bool]], record_failure: Callable[[str], None] | None = None
) -> SlideOutcome:
    """Do one slide's work and return how it ended; only what would end every slide alike is raised."""
    start = time.perf_counter()
    try:
        record, skipped = work()
    except Interrupted:
        raise
    except Exception as error:
        if getattr(error, "exit_code", 0) == ENVIRONMENT:
            raise
        return failed(source, error, time.perf_counter() - start, record_failure)
    return outcome_of(source, record, skipped, time.perf_counter() - start)


def failed(
    source: SlideInput, error: Exception, seconds: float, record_failure: Callable[[str], None] | None = None
) -> SlideOutcome:
    """Return how a slide ended by an error; `record_failure` notes what is the slide's, not what the request asked."""
    log.debug("%s failed", source.path, exc_info=error)
    status: Literal["failed", "stale"] = "stale" if isinstance(error, StaleError) else "failed"
    outcome = SlideOutcome(
        source.slide_id, status, None, seconds, in_words(error), getattr(error, "exit_code", CellslideError.exit_code)
    )
    if record_failure is not None and not outcome.refused and not isinstance(error, BusyError):
        record_failure(outcome.error or "")
    return outcome


def outcome_of(source: SlideInput, record: RunRecord, skipped: bool, seconds: float) -> SlideOutcome:
    """Return how a slide ended by its record; one of which tiles failed counts as failed."""
    if record.status == "done_with_errors":
        first, counts = record.failed_tiles[0], record.counts
        where = f"the first at ({first.x}, {first.y}): {first.error}"
        gone = f"{counts.tiles_missing} tiles are missing in the file"
        lost = f"{counts.tiles_failed} of {counts.tiles} tiles failed"
        told = [words for n, words in ((counts.tiles_failed, lost), (counts.tiles_missing, gone)) if n]
        words = f"{' and '.join(told)}, {where}"
        return SlideOutcome(source.slide_id, "failed", record.counts.nuclei, seconds, words, 1, record.verdict)
    status: Literal["skipped", "done"] = "skipped" if skipped else "done"
    return SlideOutcome(source.slide_id, status, record.counts.nuclei, seconds, verdict=record.verdict)


def write_failure(source: SlideInput, segmenter: Segmenter, folder: Path, words: str) -> None:
    """Write a record for a slide that failed before it had one; what an earlier run left is not touched."""
    try:
        earlier = read_record(folder)
    except CellslideError:
        return
    if earlier is not None and not (earlier.status == "failed" and earlier.slide["vendor"] is None):
        return
    unknown = dict.fromkeys(("mpp", "mpp_source", "width", "height", "vendor"))
    head = slide_sha256(source.path) if source.path.exists() else None
    record = begin_record({"path": full_name(source.path), "sha256_head": head, **unknown}, segmenter)
    record.status, record.finished, record.error = "failed", record.started, words
    # Where the folder cannot be written, the line on the screen has to do.
    with suppress(OSError):
        write_record(folder, record)


def exit_code(outcomes: list[SlideOutcome], strict: bool = False) -> int:
    """Return 0 when all slides are done, the code they share when all failed alike, else 1.

    strict  a slide that is not to be used counts as failed.
    """
    codes = {1 if strict and o.unusable else o.exit_code for o in outcomes}
    return codes.pop() if len(codes) == 1 else 1 if codes else 0


def in_shard(slide_id: str, shard: tuple[int, int]) -> bool:
    """Tell whether a slide belongs to shard I of N (I from 1); it depends on the slide's id alone."""
    number, count = shard
    return int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:8], "big") % count == number - 1


class StopOnSignal:
    """While it is entered, Ctrl-C, SIGTERM and SIGUSR1 ask for a clean stop; called, it gives the exit code, or None.

    SIGUSR1, the warning that Slurm sends before it kills, counts as SIGTERM. A second Ctrl-C stops at once; so does
    the first one where the work has not ended after STOP_S, unless it is `patient`, as work elsewhere needs. Raises
    Interrupted at its end where it was so. Where nothing else helps, the process ends after END_S, as if it was killed.
    """

    def __init__(self, patient: bool = False) -> None:
        self._code: int | None = None
        self._patient = patient
        self._timers: list[threading.Timer] = []
        self._before: dict[int, Any] = {}

    def __call__(self) -> int | None:
        """Return the exit code to end with, None while nobody asked to stop."""
        return self._code

    def __enter__(self) -> StopOnSignal:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for timer in self._timers:
            timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self._code is not None:
            raise Interrupted(self._code) from error

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._code is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._code = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        log.warning("stopping after the tiles at hand; finished tiles are kept")
        if not self._patient:
            self._timers = [threading.Timer(STOP_S, _interrupt_main), threading.Timer(END_S, os._exit, (self._code,))]
        for timer in self._timers:
            timer.daemon = True
            timer.start()


def _interrupt_main() -> None:
    """Have the main thread stop now, also where it waits."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)
