"""Many slides at a glance: `DIR/summary.csv`, a row a slide, and the same rows for the page `DIR/cohort.html`.

Each slide that ends leaves a row of its own in `DIR/.summary/`, written beside and renamed; the two files are made from
all rows there are. So runs at different times, shards that run at once and runs that were killed all add to one
summary without a lock: whoever writes last reads again what is there, and writes until nothing is new.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cellslide.batch.run import SlideOutcome
from cellslide.classify.targets import Target
from cellslide.errors import CellslideError, short
from cellslide.formats.csv_text import harmless
from cellslide.plausibility.verdict import in_short
from cellslide.report.cohort_page import page
from cellslide.report.cohort_row import Row, outliers
from cellslide.report.images import thumbnail
from cellslide.store.atomic import write_json, write_text
from cellslide.store.cell_table import open_table
from cellslide.store.foreign_files import read_json
from cellslide.store.run_record import RUN_FILE, TABLE, now_utc, plain, read_record
from cellslide.store.table_schema import ABSTAINED
from cellslide.types import RunRecord, Verdict

SUMMARY_FILE = "summary.csv"
PAGE_FILE = "cohort.html"
ROWS_FOLDER = ".summary"
# What the page leads to, where a slide has it.
SHOWN_FILES = (
    "report.html", "cells.geojson.gz", "cells.geojson.zip", "cells.zarr", "cells.parquet", "cells.csv", "cells.csv.gz",
    "cells.h5ad", "cells.tmap", "labels.ome.zarr", "tissue.geojson", RUN_FILE,
)  # fmt: skip
# While a run goes on, the files are written anew at most this often: somebody may look in.
EVERY_S = 60.0
# Others may add rows as fast as we read them; the last of them writes the last word.
MOST_TRIES = 20

log = logging.getLogger(__name__)


class Ledger:
    """Keeps how the slides of a run ended, and the summaries of the folders that they lie in.

    Slides that the request did not suit are noted only where it suited others: a refused request changes nothing.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(dict.fromkeys(folders))
        self._refused: list[tuple[Target, SlideOutcome]] = []
        self._worked = False
        self._written = time.monotonic()

    def keep(self, target: Target, outcome: SlideOutcome) -> None:
        """Keep the row of a slide that ended; writes the summaries too when the last ones are old."""
        if outcome.refused:
            self._refused.append((target, outcome))
            return
        self._worked = True
        self._keep(target, outcome)
        if time.monotonic() - self._written > EVERY_S:
            self._write(tries=1)

    def _keep(self, target: Target, outcome: SlideOutcome) -> None:
        out_dir = target.folder.parent
        if os.path.abspath(out_dir) not in map(os.path.abspath, self.folders):
            return
        try:
            write_row(out_dir, row_of(target, outcome))
        except OSError as error:
            log.warning("%s: cannot keep the row of %s: %s", out_dir / ROWS_FOLDER, outcome.slide, error)

    def write(self, tries: int = MOST_TRIES) -> None:
        """Write the summaries at the end; a folder that cannot be written is said, and costs no slide."""
        if self._refused and not self._worked:
            return
        for target, outcome in self._refused:
            # What was done before stays as it is.
            if outcome.status == "stale" or not _is_done(target.folder):
                self._keep(target, outcome)
        self._refused.clear()
        self._write(tries)

    def _write(self, tries: int) -> None:
        for folder in self.folders:
            try:
                write_summary(folder, tries)
            except OSError as error:
                log.warning("%s: cannot write the summary: %s", folder, error)
        self._written = time.monotonic()


def summary_folders(targets: Iterable[Target], out_dir: Path, named: Iterable[Path]) -> list[Path]:
    """Return the folders that get a summary: those of slides that are the output, were named, or have one already."""
    known = {folder.resolve() for folder in (out_dir, *named)}
    parents = dict.fromkeys(target.folder.parent for target in targets)
    return [p for p in parents if p.resolve() in known or (p / ROWS_FOLDER).is_dir()]


def row_of(target: Target, outcome: SlideOutcome) -> Row:
    """Return the row of a slide that ended so."""
    source, record = target.source, _record(target.folder)
    row = Row(slide=outcome.slide, path=str(source.path), folder=target.folder.name, status="failed")
    if record is not None:
        row = _described_or_not(row, record, target.folder)
    status = {"stale": "stale", "failed": "failed" if outcome.cells is None else "done_with_errors"}
    cells = row.cells if outcome.cells is None else outcome.cells
    organ = row.organ or source.organ or ""
    kept = outcome.status in ("skipped", "stale")
    seconds = row.seconds if kept else outcome.seconds
    row = replace(
        row,
        status=status.get(outcome.status, "done"),
        cells=cells,
        organ=organ,
        error=outcome.error or "",
        seconds=round(seconds, 2),
    )
    return replace(row, ended=row.ended if kept and row.ended else now_utc())


def row_of_folder(folder: Path) -> Row | None:
    """Return the row of a slide's folder from its record alone, or None where there is none."""
    record = _record(folder)
    if record is None:
        return None
    row = Row(slide=folder.name, path=str(record.slide["path"]), folder=folder.name, status=record.status)
    return replace(_described_or_not(row, record, folder), error=record.error or "")


def _described_or_not(row: Row, record: RunRecord, folder: Path) -> Row:
    """Return the row with what a record says; one that says it in another way than ours leaves the row as it is."""
    try:
        return _described(row, record, folder)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        log.warning("%s: its record is damaged (%s)", folder, short(error))
        return row


def _is_done(folder: Path) -> bool:
    record = _record(folder)
    return record is not None and record.status in ("done", "done_with_errors")


def _record(folder: Path) -> RunRecord | None:
    try:
        return read_record(folder)
    except (CellslideError, OSError):
        return None


def _described(row: Row, record: RunRecord, folder: Path) -> Row:
    slide, counts = record.slide, record.counts
    typing = record.config.get("classify") or {}
    tally = typing.get("counts") or {}
    found = record.status in ("done", "done_with_errors")
    return replace(
        row,
        cells=counts.nuclei if found else None,
        tissue_mm2=record.searched_mm2,
        tiles=counts.tiles,
        tiles_failed=counts.tiles_failed + counts.tiles_missing,
        typed=tally.get("typed"),
        abstained=tally.get("abstained"),
        classes=_classes(tally.get("classes") or {}) if typing else _own_classes(record, folder),
        organ=_organ(typing),
        seconds=round(record.seconds.total, 2),
        mpp=slide.get("mpp"),
        width=slide.get("width"),
        height=slide.get("height"),
        vendor=slide.get("vendor") or "",
        device=record.device,
        model=", ".join(w.id for w in record.weights),
        ended=record.finished or "",
        verdict="" if record.verdict is None else record.verdict.word,
        reasons=() if record.verdict is None else tuple(map(in_short, record.verdict.reasons)),
        **({} if record.verdict is None else _checked(record.verdict)),
        thumbnail=thumbnail(folder / "report.html"),
        files=tuple(name for name in SHOWN_FILES if (folder / name).exists()),
    )


def _checked(verdict: Verdict) -> dict[str, Any]:
    """Return the checks by name, and what those that a cohort is compared by have measured."""
    values = {check.name: check.value for check in verdict.checks}
    # Optical densities of haematoxylin, then eosin: red, green, blue.
    numbers = [float(word) for word in re.findall(r"-?\d+\.\d+", str(values.get("stain", "")))]
    return {
        "checks": {check.name: check.word for check in verdict.checks},
        "width_um": values.get("nucleus_diameter_um"),
        "out_of_focus": values.get("out_of_focus"),
        "stain": round(numbers[4] - max(numbers[3], numbers[5]), 3) if len(numbers) == 6 else None,
    }


def _classes(counts: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(n) for name, n in counts.items() if name != ABSTAINED}


def _own_classes(record: RunRecord, folder: Path) -> dict[str, int]:
    """Return the nuclei by class where the network that found them also typed them."""
    if record.status not in ("done", "done_with_errors") or not (record.config.get("spec") or {}).get("classes"):
        return {}
    try:
        with open_table(folder / TABLE) as table:
            return _classes(table.count_classes())
    except (CellslideError, OSError) as error:
        log.warning("%s: classes are not counted (%s)", folder, short(error))
        return {}


def _organ(typing: Mapping[str, Any]) -> str:
    organ = str(typing.get("organ") or "")
    return f"{organ} (not trained)" if typing.get("organ_trained") is False else organ


def write_row(out_dir: Path, row: Row) -> None:
    """Keep one slide's row; an older one of the same slide is replaced."""
    # A slide may be called anything that a file may; the hash fits every file system.
    name = hashlib.sha256(row.folder.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    write_json(out_dir / ROWS_FOLDER / f"{name}.json", plain(row))


def read_rows(out_dir: Path) -> list[Row]:
    """Return the rows of all slides of a folder, sorted by slide.

    A record that is newer than the row speaks for itself: that slide is worked on, or its run was killed.
    """
    rows: dict[str, Row] = {}
    written: dict[str, int] = {}
    for path in (out_dir / ROWS_FOLDER).glob("*.json"):
        row = _read_row(path)
        if row is not None:
            rows[row.folder], written[row.folder] = row, path.stat().st_mtime_ns
    for folder, changed in _records(out_dir):
        if changed > written.get(folder, -1) and (found := row_of_folder(out_dir / folder)) is not None:
            rows[folder] = found
    return [rows[name] for name in sorted(rows) if _is_there(out_dir, rows[name])]


def _records(out_dir: Path) -> list[tuple[str, int]]:
    found = []
    with os.scandir(out_dir) as entries:
        for entry in entries:
            try:
                found.append((entry.name, (Path(entry.path) / RUN_FILE).stat().st_mtime_ns))
            except OSError:  # No folder, or a slide that has no record (any more).
                continue
    return found


def _is_there(out_dir: Path, row: Row) -> bool:
    """Tell whether a row still has what it speaks of: a failed slide may have no folder, a finished one has."""
    return row.status == "failed" or (out_dir / row.folder).is_dir()


def _read_row(path: Path) -> Row | None:
    try:
        content = read_json(path)
        known = {name: value for name, value in content.items() if name in ROW_FIELDS}
        lists = {name: tuple(known.get(name, ())) for name in ("files", "reasons")}
        return Row(**{**known, **lists})
    except (OSError, CellslideError, ValueError, TypeError, AttributeError):
        log.warning("%s is damaged; the row is made from the slide's record", path)
        return None


ROW_FIELDS = tuple(f.name for f in fields(Row))


def write_summary(out_dir: Path, tries: int = MOST_TRIES) -> None:
    """Write `summary.csv` and `cohort.html` of a folder from all rows there are; nothing where there is none.

    Each is written beside its place and renamed, then the rows are read again: another run may have added some between.
    """
    rows = read_rows(out_dir) if out_dir.is_dir() else []
    for _ in range(tries):
        if not rows:
            return
        write_text(out_dir / SUMMARY_FILE, to_csv(rows))
        write_text(out_dir / PAGE_FILE, page(rows, outliers(rows), out_dir.resolve().name))
        now = read_rows(out_dir)
        if now == rows:
            return
        rows = now


def to_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV, each with why it stands out; no cell of it is a formula to a spreadsheet."""
    why = outliers(rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [name for name in ROW_FIELDS if name not in ("folder", "files", "thumbnail")]
    writer.writerow([*names, "stands_out"])
    for row, words in zip(rows, why, strict=True):
        cells: list[Any] = [getattr(row, name) for name in names]
        writer.writerow([on_one_line(cell) for cell in (*cells, "; ".join(words))])
    return out.getvalue()


def on_one_line(cell: object) -> str:
    """Return a cell as text on one line that no spreadsheet runs."""
    if isinstance(cell, dict):
        cell = " ".join(f"{name}={count}" for name, count in cell.items())
    if isinstance(cell, tuple):
        cell = "; ".join(cell)
    if not isinstance(cell, str):
        return "" if cell is None else str(cell)
    return harmless(" ".join(cell.splitlines()))
