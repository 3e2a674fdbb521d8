"""What a worker does: one stage of one slide. What it finds goes to disk; a few settings go on to the next stage."""

from __future__ import annotations

import logging
import multiprocessing
import socket
import threading
import time
from dataclasses import dataclass, field, replace
from enum import Enum

from cellslide import __version__
from cellslide.batch.dask.events import telling
from cellslide.batch.dask.retries import MOST, guarded
from cellslide.batch.run import ENVIRONMENT, SlideOutcome, failed, outcome_of, reported, write_failure
from cellslide.batch.work import SlideWork
from cellslide.classify import SlideClassifier
from cellslide.classify.slide import Typing, type_table, write_typed
from cellslide.classify.targets import Target, check_slide, open_target, require_cells
from cellslide.errors import BusyError, CellslideError, Interrupted, MissingDependencyError, in_words
from cellslide.inference.segmenter import Segmenter, Setup
from cellslide.pipeline import run_slide, type_slide, write_slide
from cellslide.progress import Watch
from cellslide.store.slide_folder import held
from cellslide.types import RunRecord

log = logging.getLogger(__name__)


class Stage(Enum):
    """A stage of a slide: nuclei found, nuclei typed, the files written."""

    FIND = "find"
    TYPE = "type"
    WRITE = "write"

    @property
    def tag(self) -> str:
        """Return the resource of a worker that the stage asks for."""
        return "CPU" if self is Stage.WRITE else "GPU"


@dataclass(frozen=True, slots=True)
class Job:
    """What is done with every slide of a run; pickled to the workers, which open the networks themselves.

    threads  processor threads that a network may use; None leaves it as the worker has it.
    deaths   so many workers may die at one stage of a slide before it is given up.
    """

    run_id: str
    work: SlideWork
    threads: int | None = None
    deaths: int = MOST
    version: str = __version__

    @property
    def first(self) -> Stage:
        """The stage that a slide begins with."""
        return Stage.TYPE if self.work.segment is None else Stage.FIND


@dataclass(frozen=True, slots=True)
class Handed:
    """What the stages of a slide hand on; what they found lies on disk.

    setup   how its nuclei were found; None where its table was there already.
    failed  why they could not be typed: they are written all the same.
    """

    setup: Setup | None = None
    typing: Typing | None = None
    failed: SlideOutcome | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StageEnd:
    """How a stage ended: with what comes next, with the slide's outcome, with an error that no slide would escape
    (words, exit code), or undone, because it was told to stop or another process holds the folder."""

    handed: Handed = field(default_factory=Handed)
    next: Stage | None = None
    outcome: SlideOutcome | None = None
    fatal: tuple[str, int] | None = None
    undone: bool = False


class _Unusable(Exception):
    """What no slide would escape: words and exit code."""

    @classmethod
    def of(cls, error: Exception) -> _Unusable:
        return cls(f"{in_words(error)} (worker on {socket.gethostname()})", getattr(error, "exit_code", 1))


class _Networks:
    """The networks that a process has opened, those of one run at a time."""

    def __init__(self) -> None:
        self._run_id = ""
        self._segmenter: Segmenter | None = None
        self._classifier: SlideClassifier | None = None

    def _of_run(self, job: Job) -> None:
        if job.run_id == self._run_id:
            return
        if self._segmenter is not None:
            self._segmenter.detector.close()
        self._run_id, self._segmenter, self._classifier = job.run_id, None, None
        if job.threads is not None:
            import torch

            torch.set_num_threads(job.threads)

    def open(self, stage: Stage, job: Job) -> None:
        """Open the network that a stage needs; raises _Unusable where cellslide refuses it."""
        try:
            if stage is Stage.FIND:
                self.segmenter(job)
            elif stage is Stage.TYPE:
                self.classifier(job)
        except CellslideError as error:
            raise _Unusable.of(error) from error

    def segmenter(self, job: Job) -> Segmenter:
        """Return the model of a run on this worker's device."""
        self._of_run(job)
        if self._segmenter is None:
            work = job.work.segment
            assert work is not None
            if multiprocessing.current_process().daemon:
                # Dask's usual worker process may have no children.
                work = replace(work, config=replace(work.config, infer=replace(work.config.infer, workers=0)))
            self._segmenter = work.open()
        return self._segmenter

    def classifier(self, job: Job) -> SlideClassifier:
        """Return the classifier of a run on this worker's device, with its rule."""
        self._of_run(job)
        if self._classifier is None:
            assert job.work.classify is not None
            self._classifier = job.work.classify.open()
        return self._classifier


_networks = _Networks()
# Workers with many threads would run several networks in one process, and they are not made for that.
_turns = {"GPU": threading.Lock(), "CPU": threading.Lock()}
_stops: dict[str, int] = {}


def ask_to_stop(run_id: str, code: int) -> None:
    """Ask this worker's stages of a run to stop at the next part."""
    _stops[run_id] = code


def do_stage(stage: Stage, target: Target, job: Job, handed: Handed) -> StageEnd:
    """Do one stage of one slide in this process.

    Raises what a second try may mend, such as a network drive that hiccups: Dask tries again.
    """
    began = time.perf_counter()
    try:
        check_worker(target, job)
        with _turns[stage.tag], guarded(target.folder, job.run_id, stage.value, job.deaths) as times:
            _networks.open(stage, job)
            end = _do(stage, target, job, handed, times)
    except _Unusable as error:
        return StageEnd(fatal=error.args)
    except Interrupted:
        return StageEnd(handed, undone=True)
    except Exception as error:
        if getattr(error, "exit_code", 0) == ENVIRONMENT:
            return StageEnd(fatal=_Unusable.of(error).args)
        if not isinstance(error, CellslideError):
            raise  # The system's, or unknown: another try, or another worker, may do better.
        end = StageEnd(handed, outcome=_failed(stage, target, error, job))
    seconds = handed.seconds + time.perf_counter() - began
    outcome = None if end.outcome is None else reported(target, replace(end.outcome, seconds=seconds))
    return replace(end, handed=replace(end.handed, seconds=seconds), outcome=outcome)


def _do(stage: Stage, target: Target, job: Job, handed: Handed, times: int) -> StageEnd:
    try:
        return _STAGES[stage](target, job, handed, watching(target, job))
    except BusyError:
        # Where this run was here before, its own worker, cut off and not dead, may live on for a while.
        if times == 1 and stage is job.first:
            raise
        return StageEnd(handed, undone=True)


def check_worker(target: Target, job: Job) -> None:
    """Raise MissingDependencyError where this worker cannot do the job: another version, another disk."""
    if job.version != __version__:
        raise MissingDependencyError(f"cellslide {__version__} here, {job.version} where the run was started")
    if not target.folder.parent.is_dir():
        raise MissingDependencyError(f"{target.folder.parent}: not seen here; give an --output that all workers share")


def _failed(stage: Stage, target: Target, error: Exception, job: Job) -> SlideOutcome:
    def record(words: str) -> None:
        write_failure(target.source, _networks.segmenter(job), target.folder, words)

    return failed(target.source, error, 0.0, record if stage is Stage.FIND else None)


def _find(target: Target, job: Job, handed: Handed, watch: Watch) -> StageEnd:
    segmenter = _networks.segmenter(job)
    with job.work.local(target, watch) as local:
        record, complete = run_slide(local.source, segmenter, None, target.folder.parent, watch, tiles_only=True)
    following = Stage.WRITE if job.work.classify is None else Stage.TYPE
    if complete and following is Stage.WRITE:
        return StageEnd(handed, outcome=outcome_of(target.source, record, True, 0.0))
    return StageEnd(handed if complete else replace(handed, setup=segmenter.setup), following)


def _type(target: Target, job: Job, handed: Handed, watch: Watch) -> StageEnd:
    by = _networks.classifier(job)
    with job.work.local(target, watch) as local:
        if handed.setup is None:
            typed = _type_table(local, by, watch)
        else:
            try:
                typed = type_slide(local.source, handed.setup, by, target.folder.parent, watch)
            except CellslideError as error:
                if isinstance(error, (Interrupted, BusyError)):
                    raise
                return StageEnd(replace(handed, failed=_failed(Stage.TYPE, target, error, job)), Stage.WRITE)
    if isinstance(typed, Typing):
        return StageEnd(replace(handed, typing=typed), Stage.WRITE)
    return StageEnd(handed, outcome=outcome_of(target.source, *typed, 0.0))


def _type_table(target: Target, by: SlideClassifier, watch: Watch) -> Typing | tuple[RunRecord, bool]:
    require_cells(target)
    config, organ = by.classifier.config, by.find_organ(target.source.organ)
    with open_target(target, config.mpp, config.allow_fluorescence) as slide, held(target.folder, watch) as watch:
        check_slide(target, slide)
        return type_table(target.folder, slide, by.classifier, by.rule, organ, watch)


def _write(target: Target, job: Job, handed: Handed, watch: Watch) -> StageEnd:
    classify, typing = job.work.classify, handed.typing
    rule = None if classify is None or typing is None else classify.rule.rule(typing.spec)
    if handed.setup is not None:
        record = write_slide(target.source, handed.setup, target.folder.parent, watch, typing, rule)
    else:
        assert classify is not None and typing is not None and rule is not None
        with held(target.folder, watch) as watch:
            record = write_typed(target.folder, typing, rule, classify.config.output, watch)
    return StageEnd(handed, outcome=handed.failed or outcome_of(target.source, record, False, 0.0))


_STAGES = {Stage.FIND: _find, Stage.TYPE: _type, Stage.WRITE: _write}


def watching(target: Target, job: Job) -> Watch:
    """Return the watch of a stage: it tells the run's owner how it gets on, and stops when asked or with its worker."""
    from distributed import get_worker

    worker = get_worker()

    def stop() -> int | None:
        leaving = worker.status.name not in ("init", "running", "paused")
        return 143 if leaving else _stops.get(job.run_id)

    return Watch(telling(worker, job.run_id, target.source.slide_id), stop)
