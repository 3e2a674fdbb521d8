"""A slide's folder while a run works in it: held by that run alone, its record kept true."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from cellslide.errors import CellslideError, Interrupted, StaleError, in_words
from cellslide.progress import Watch
from cellslide.store.atomic import remove_folder
from cellslide.store.cell_table import open_table
from cellslide.store.file_list import changed_sizes
from cellslide.store.lock import hold
from cellslide.store.recovery import restore
from cellslide.store.run_record import (
    TABLE,
    differences,
    fingerprint,
    now_utc,
    peak_rss_bytes,
    read_record,
    write_record,
)
from cellslide.store.tile_checkpoint import PARTS_FOLDER
from cellslide.types import RunRecord

log = logging.getLogger(__name__)


@contextmanager
def held(folder: Path, watch: Watch) -> Iterator[Watch]:
    """Hold a slide's folder, put right what a killed run left in it, and yield the watch that also heeds the lock.

    Raises BusyError when another run works there.
    """
    with hold(folder, watch.check) as lock:
        restore(folder)
        yield replace(watch, lock=lock.check)


@contextmanager
def recorded_run(record: RunRecord, folder: Path, peak_device_bytes: Callable[[], int], began: float) -> Iterator[None]:
    """Keep `run.json` true: "running" now, at the end complete, or how it stopped and why."""
    write_record(folder, record)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        record.status = "interrupted" if stopped else "failed"
        record.error = None if stopped else in_words(error)
        # On a disk that is full or gone this fails too; what went wrong first is what counts.
        with suppress(OSError):
            close_record(record, folder, peak_device_bytes(), began)
        raise
    close_record(record, folder, peak_device_bytes(), began)


def close_record(record: RunRecord, folder: Path, peak_device_bytes: int, began: float) -> None:
    """Fill in what is known at the end, and write `run.json`."""
    record.finished = now_utc()
    record.seconds.total += time.perf_counter() - began
    record.peak_rss_bytes = max(record.peak_rss_bytes, peak_rss_bytes())
    record.peak_device_bytes = max(record.peak_device_bytes, peak_device_bytes)
    write_record(folder, record)


def find_finished(folder: Path, record: RunRecord) -> RunRecord | None:
    """Return the record of a slide whose nuclei are complete, else None.

    Raises StaleError, naming the differences, when the slide was done with other settings.
    """
    earlier = read_record(folder)
    if earlier is None or earlier.status != "done" or not (folder / TABLE).is_dir():
        return None
    if words := differences(fingerprint(earlier), fingerprint(record)):
        raise StaleError(f"{folder}: done with other settings ({words}); --overwrite starts anew")
    if TABLE in changed_sizes(folder) and not _replaced_since(folder, earlier):
        log.warning("%s: %s is not as it was written; the slide is done again", folder, TABLE)
        return None
    remove_folder(folder / PARTS_FOLDER)  # A run that was killed at its very end left it.
    return earlier


def _replaced_since(folder: Path, record: RunRecord) -> bool:
    """Tell whether a table is newer than its record: who typed or read its cells was killed before it wrote that."""
    try:
        with open_table(folder / TABLE) as table:
            kept = table.run
    except CellslideError:
        return False
    return any(kept.config.get(name) != record.config.get(name) for name in ("classify", "embed"))
