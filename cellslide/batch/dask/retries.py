"""A slide that kills its worker must not kill one after the other: its folder says how often a stage was begun.

Dask blames every task that a dead worker had been given, also those that were only waiting there. The file is written
when a stage really begins and removed when it ends, however it ends: one that is found has killed its worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cellslide.classify.store import PartialProbs
from cellslide.errors import CellslideError, SlideError
from cellslide.store.atomic import write_json
from cellslide.store.foreign_files import read_json
from cellslide.store.run_record import read_record, write_record
from cellslide.store.tile_checkpoint import PARTS_FOLDER

FILE = ".begun.json"
# So often may a stage end with its worker, without getting any further in between.
MOST = 3


@dataclass(frozen=True, slots=True)
class Attempts:
    """A stage of a run that was begun so often, and how far the slide was (parts and typed cells) the last time."""

    run_id: str
    stage: str
    times: int
    done: int


@contextmanager
def guarded(folder: Path, run_id: str, stage: str, most: int = MOST) -> Iterator[int]:
    """Note that a stage begins, and that it ended; yield how often it was begun without getting further.

    Raises SlideError when its workers died `most` times.
    """
    path, done = folder / FILE, progress_of(folder)
    before = read_begun(path)
    same = before is not None and (before.run_id, before.stage, before.done) == (run_id, stage, done)
    times = before.times + 1 if before is not None and same else 1
    if times > most:
        words = f"{folder}: workers died {most} times at stage {stage}, most likely for want of memory"
        error = SlideError(f"{words}; give them more, or --workers 1 and a smaller --batch-size")
        write_off(folder, str(error))
        raise error
    write_json(path, asdict(Attempts(run_id, stage, times, done)))
    try:
        yield times
    finally:
        path.unlink(missing_ok=True)


def read_begun(path: Path) -> Attempts | None:
    """Return what a stage left that did not end, or None."""
    try:
        return Attempts(**read_json(path))
    except (CellslideError, FileNotFoundError, TypeError):
        return None


def progress_of(folder: Path) -> int:
    """Return how far a slide is: files of finished tiles plus cells that were typed."""
    return sum(1 for _ in (folder / PARTS_FOLDER).glob("part-*.npz")) + PartialProbs.count_done(folder)


def write_off(folder: Path, words: str) -> None:
    """Let a slide's record, if it has one, say that it failed, which its workers could not."""
    with suppress(CellslideError, OSError):
        (folder / FILE).unlink(missing_ok=True)
        record = read_record(folder)
        if record is not None and record.status == "running":
            write_record(folder, replace(record, status="failed", error=words))
