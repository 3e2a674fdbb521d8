"""Before any work: whether a request can be done at all. What is found wrong here has changed no file."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cellslide.batch.workers import Work
from cellslide.classify.targets import Target
from cellslide.errors import CellslideError, MissingDependencyError, UsageError, in_words
from cellslide.store.lock import who_works
from cellslide.store.run_record import TABLE, read_record

if TYPE_CHECKING:
    from cellslide.slides.slide import Slide

# Less room than this on the disk is none.
LEAST_FREE_BYTES = 64 << 20
# Opening a slide is mostly waiting for the disk.
OPEN_AT_ONCE = 8

State = Literal["new", "begun", "done", "running", "unreadable"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checked:
    """A slide before it is worked on: what its folder holds, and what is wrong with it, if something is."""

    target: Target
    state: State
    error: Exception | None = None


def check_request(work: Work, targets: Sequence[Target], output: Path) -> list[Checked]:
    """Check a whole request: where results go, networks and settings, every slide and what its folder holds.

    Raises UsageError where results cannot be written, and what the work's own check raises. Slides that cannot be read
    are said: they will fail, and the others are done.
    """
    for folder in dict.fromkeys([output, *(target.folder.parent for target in targets)]):
        check_output(folder)
    work.check()
    with ThreadPoolExecutor(min(OPEN_AT_ONCE, len(targets) or 1)) as pool:
        checked = list(pool.map(lambda target: check_slide(work.look, target), targets))
    wrong = [one.error for one in checked if one.error is not None]
    if wrong and len(wrong) < len(targets):
        log.warning("%d of %d slides cannot be done; the first: %s", len(wrong), len(targets), in_words(wrong[0]))
    return checked


def is_refused(checked: Sequence[Checked]) -> bool:
    """Tell whether a request suits not one slide."""
    return bool(checked) and all(getattr(one.error, "exit_code", 0) == UsageError.exit_code for one in checked)


def check_output(folder: Path) -> None:
    """Raise UsageError where results cannot be written to a folder, or its disk is full; makes nothing."""
    there = nearest_there(folder)
    if not there.is_dir():
        raise UsageError(f"--output {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder}: {there} cannot be written; give another folder")
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE_BYTES:
        raise UsageError(f"--output {folder}: its disk is full ({free >> 20} MB left); make room or give another")


def nearest_there(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that is there."""
    there = Path(os.path.abspath(folder))
    while not os.path.lexists(there):
        there = there.parent
    return there


def check_slide(look: Callable[[Target], Slide | None], target: Target) -> Checked:
    """Return what the folder of a slide holds; one that is not done is opened, to see whether it can be read.

    Raises MissingDependencyError where nothing here could read it.
    """
    state = state_of(target.folder)
    if state in ("done", "running"):
        return Checked(target, state)
    try:
        if (slide := look(target)) is not None:
            slide.close()
    except MissingDependencyError:
        raise
    except Exception as error:  # Libraries raise what they like on a damaged file.
        return Checked(target, "unreadable", error)
    return Checked(target, state)


def state_of(folder: Path) -> State:
    """Return what a slide's folder holds; a folder whose record cannot be read counts as begun."""
    if not folder.is_dir():
        return "new"
    if who_works(folder) is not None:
        return "running"
    try:
        record = read_record(folder)
    except CellslideError:
        return "begun"
    if record is None:
        return "new"
    return "done" if record.status == "done" and (folder / TABLE).is_dir() else "begun"
