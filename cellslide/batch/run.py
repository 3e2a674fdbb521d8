"""Many slides, one after another, each with its page: a bad one is recorded, the rest goes on; signals stop cleanly."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import numpy as np

from cellslide.classify import Classifier, classify_slide, regate_slide
from cellslide.classify.columns import Rule
from cellslide.classify.slide import typed_by
from cellslide.classify.targets import Target, check_slide, open_target, require_cells
from cellslide.config import OutputConfig
from cellslide.embed import Embedder, embed_slide
from cellslide.errors import BusyError, CellslideError, Interrupted, in_words
from cellslide.inference.segmenter import Segmenter
from cellslide.pipeline import Layout, begin_record, held, lay_out, open_source, read_tile, run_slide
from cellslide.progress import IDLE, Watch
from cellslide.report import keep_report
from cellslide.slides.inputs import SlideInput
from cellslide.slides.slide import Slide
from cellslide.store.run_record import head_sha256, read_record, write_record
from cellslide.types import ClassifierSpec, RunRecord
from cellslide.weights.organs import Organ

# Broken weights or a missing device would fail every slide in the same way.
ENVIRONMENT = 3

# There is no SIGUSR1 on Windows.
STOPPING = (signal.SIGINT, signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SlideOutcome:
    """How one slide ended: `cells` found, seconds spent, why it failed, and the exit code that alone it would give."""

    slide: str
    status: Literal["done", "skipped", "failed"]
    cells: int | None
    seconds: float
    error: str | None = None
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the line of `--log-json`."""
        names = ("slide", "status", "cells", "seconds", "error")
        return {name: getattr(self, name) for name in names}


def segment_slides(
    sources: Iterable[SlideInput], segmenter: Segmenter, out_dir: Path, watch: Watch = IDLE
) -> Iterator[SlideOutcome]:
    """Segment slides in order and yield how each ended.

    Raises Interrupted when asked to stop, and errors of environment or weights, which no other slide would escape.
    """
    for source in sources:
        watch.check()
        target = Target(source, out_dir / source.slide_id)
        yield reported(target, _segment(target, segmenter, watch))


def _segment(target: Target, segmenter: Segmenter, watch: Watch) -> SlideOutcome:
    source, folder = target.source, target.folder
    work = partial(run_slide, source, segmenter, folder.parent, watch)
    return _tried(source, work, partial(write_failure, source, segmenter, folder))


def reported(target: Target, outcome: SlideOutcome) -> SlideOutcome:
    """Return how a slide ended, after the page of one that has cells is written, unless a newer one is there."""
    if outcome.cells is not None:
        keep_report(target.folder, target.source.local or target.source.path)
    return outcome


def _tried(
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
        log.debug("%s failed", source.path, exc_info=error)
        words, code = in_words(error), getattr(error, "exit_code", 1)
        if record_failure is not None and not isinstance(error, BusyError):
            record_failure(words)
        return SlideOutcome(source.slide_id, "failed", None, time.perf_counter() - start, words, code)
    return outcome_of(source, record, skipped, time.perf_counter() - start)


def outcome_of(source: SlideInput, record: RunRecord, skipped: bool, seconds: float) -> SlideOutcome:
    """Return how a slide ended by its record; one of which tiles failed counts as failed."""
    if record.status == "done_with_errors":
        first, counts = record.failed_tiles[0], record.counts
        where = f"the first at ({first.x}, {first.y}): {first.error}"
        gone = f"{counts.tiles_missing} tiles are missing in the file"
        lost = f"{counts.tiles_failed} of {counts.tiles} tiles failed"
        told = [words for n, words in ((counts.tiles_failed, lost), (counts.tiles_missing, gone)) if n]
        words = f"{' and '.join(told)}, {where}"
        return SlideOutcome(source.slide_id, "failed", record.counts.nuclei, seconds, words, 1)
    return SlideOutcome(source.slide_id, "skipped" if skipped else "done", record.counts.nuclei, seconds)


def write_failure(source: SlideInput, segmenter: Segmenter, folder: Path, words: str) -> None:
    """Write a record for a slide that failed before it had one; what an earlier run left is not touched."""
    try:
        earlier = read_record(folder)
    except CellslideError:
        return
    if earlier is not None and not (earlier.status == "failed" and earlier.slide["vendor"] is None):
        return
    unknown = dict.fromkeys(("mpp", "mpp_source", "width", "height", "vendor"))
    head = head_sha256(source.path) if source.path.exists() else None
    record = begin_record({"path": os.path.abspath(source.path), "sha256_head": head, **unknown}, segmenter)
    record.status, record.finished, record.error = "failed", record.started, words
    # Where the folder cannot be written, the line on the screen has to do.
    with suppress(OSError):
        write_record(folder, record)


def classify_slides(
    targets: Iterable[Target],
    classifier: Classifier,
    rule: Rule,
    organ_of: Callable[[str | None], Organ],
    watch: Watch = IDLE,
) -> Iterator[SlideOutcome]:
    """Type the cells of slides in order and yield how each ended; what an earlier command wrote stays where one fails.

    organ_of  gives the organ for what a list of slides says of it.
    Raises Interrupted when asked to stop, and errors of environment or weights, which no other slide would escape.
    """
    for target in targets:
        watch.check()
        yield reported(
            target, _tried(target.source, partial(classify_target, target, classifier, rule, organ_of, watch))
        )


def classify_target(
    target: Target, classifier: Classifier, rule: Rule, organ_of: Callable[[str | None], Organ], watch: Watch = IDLE
) -> tuple[RunRecord, bool]:
    """Type the cells in a slide's folder, which is held meanwhile; tells whether they were typed so before.

    Raises UsageError where there are no cells or they were typed with other settings, SlideError without the slide.
    """
    require_cells(target)
    mpp, allowed = classifier.config.mpp, classifier.config.allow_fluorescence
    with open_target(target, mpp, allowed) as slide, held(target.folder, watch) as watch:
        check_slide(target, slide)
        return classify_slide(target.folder, slide, classifier, rule, organ_of(target.source.organ), watch)


def run_slides(
    sources: Iterable[SlideInput],
    segmenter: Segmenter,
    classifier: Classifier,
    rule: Rule,
    organ_of: Callable[[str | None], Organ],
    out_dir: Path,
    watch: Watch = IDLE,
) -> Iterator[SlideOutcome]:
    """Segment and type slides in order and yield how each ended; raises as `classify_slides`.

    A slide of which some tiles failed is typed all the same, and counts as failed.
    """
    for source in sources:
        watch.check()
        target = Target(source, out_dir / source.slide_id)
        outcome = _segment(target, segmenter, watch)
        if outcome.cells is not None:
            watch.check()
            typed = _tried(source, partial(classify_target, target, classifier, rule, organ_of, watch))
            outcome = joined(outcome, typed)
        yield reported(target, outcome)


def joined(found: SlideOutcome, typed: SlideOutcome) -> SlideOutcome:
    """Return how a slide ended whose nuclei were found and typed: the worse of both."""
    seconds = found.seconds + typed.seconds
    if typed.status == "failed" or found.status == "failed":
        return replace(typed if typed.status == "failed" else found, seconds=seconds)
    return replace(found if found.status == "done" else typed, seconds=seconds)


def embed_slides(targets: Iterable[Target], embedder: Embedder, watch: Watch = IDLE) -> Iterator[SlideOutcome]:
    """Read the vectors of the cells of slides in order and yield how each ended; raises as `classify_slides`."""
    for target in targets:
        watch.check()
        yield reported(target, _tried(target.source, partial(embed_target, target, embedder, watch)))


def embed_target(target: Target, embedder: Embedder, watch: Watch = IDLE) -> tuple[RunRecord, bool]:
    """Read the vectors of the cells in a slide's folder, which is held meanwhile; raises as `classify_target`."""
    require_cells(target)
    mpp, allowed = embedder.config.mpp, embedder.config.allow_fluorescence
    with open_target(target, mpp, allowed) as slide, held(target.folder, watch) as watch:
        check_slide(target, slide)
        return embed_slide(target.folder, slide, embedder, watch)


def regate_slides(
    targets: Iterable[Target], rule_of: Callable[[ClassifierSpec], Rule], output: OutputConfig, watch: Watch = IDLE
) -> Iterator[SlideOutcome]:
    """Apply another rule to the typed cells of slides in order and yield how each ended; raises as `classify_slides`.

    rule_of  gives the rule for the classifier that typed a slide.
    """
    for target in targets:
        watch.check()
        yield reported(target, _tried(target.source, partial(_regate, target, rule_of, output, watch)))


def _regate(
    target: Target, rule_of: Callable[[ClassifierSpec], Rule], output: OutputConfig, watch: Watch
) -> tuple[RunRecord, bool]:
    require_cells(target)
    with held(target.folder, watch) as watch:
        rule = rule_of(typed_by(target.folder))
        return regate_slide(target.folder, rule, output, watch), False


def plan(source: SlideInput, segmenter: Segmenter, seconds_per_tile: float | None = None) -> tuple[int, float]:
    """Return how many tiles a slide has and how long one takes here (s), measured with one tile unless given.

    Reading and decoding run beside the network and are not counted.
    """
    with open_source(source, segmenter.config) as slide:
        layout = lay_out(slide, segmenter)
        if seconds_per_tile is None and layout.tiles:
            seconds_per_tile = _time_one_tile(slide, layout, segmenter)
    return len(layout.tiles), seconds_per_tile or 0.0


def _time_one_tile(slide: Slide, layout: Layout, segmenter: Segmenter) -> float:
    tile = layout.tiles[len(layout.tiles) // 2]
    image = np.stack([read_tile(slide, layout.plane, tile)] * segmenter.engine.batch_size)
    segmenter.engine.launch(image)()  # The first pass also allocates and compiles.
    start = time.perf_counter()
    segmenter.engine.launch(image)()
    return (time.perf_counter() - start) / len(image)


def exit_code(outcomes: list[SlideOutcome]) -> int:
    """Return 0 when all slides are done, the code they share when all failed alike, else 1."""
    codes = {o.exit_code for o in outcomes}
    return codes.pop() if len(codes) == 1 else 1 if codes else 0


def in_shard(slide_id: str, shard: tuple[int, int]) -> bool:
    """Tell whether a slide belongs to shard I of N (I from 1); it depends on the slide's id alone."""
    number, count = shard
    return int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:8], "big") % count == number - 1


class StopOnSignal:
    """While it is entered, Ctrl-C, SIGTERM and SIGUSR1 ask for a clean stop; called, it gives the exit code, or None.

    SIGUSR1, the warning that Slurm sends before it kills, counts as SIGTERM. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self._code: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> int | None:
        """Return the exit code to end with, None while nobody asked to stop."""
        return self._code

    def __enter__(self) -> StopOnSignal:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._code is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._code = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        log.warning("stopping after the tiles at hand; finished tiles are kept")
