"""The files that are made from the table in a slide's folder: written, and made again where they do not fit it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from cellslide.config import OutputConfig
from cellslide.formats.registry import FORMATS, export_table, find_formats, present_formats
from cellslide.progress import IDLE, Watch
from cellslide.store.cell_table import TableExtender, open_table
from cellslide.store.run_record import TABLE, read_record, write_record
from cellslide.store.table_schema import SCHEMA_VERSION
from cellslide.types import RunRecord

log = logging.getLogger(__name__)


def write_formats(folder: Path, output: OutputConfig, record: RunRecord, watch: Watch, anew: bool = False) -> None:
    """Write the other formats from the table; `anew` those too that lie there, since the table has changed."""
    watch.progress.stage("write")
    start = time.perf_counter()
    outdated = [f.name for f in present_formats(folder)] if anew else []
    with open_table(folder / TABLE) as table:
        for name in dict.fromkeys((*output.formats, *outdated)):
            watch.check()
            export_table(table, folder, [name], output.geojson_origin, output.profile)
    record.seconds.write += time.perf_counter() - start


def renew_files(folder: Path, watch: Watch = IDLE) -> None:
    """Bring the files of a folder that is held up to date, where its table is of an older schema.

    Files that are made from the table come first and the table last: until that is new, a killed run begins again here.
    """
    with open_table(folder / TABLE) as table:
        if table.version == SCHEMA_VERSION:
            return
        log.warning("%s: written by an earlier version; its files are made anew, where a class is the decision", folder)
        record = read_record(folder)
        shaped = (record or table.run).config.get("output", {})
        for format in present_formats(folder):
            watch.check()
            known = {name: shaped[name] for name in format.shaped_by if name in shaped}
            format.writer(table, folder, OutputConfig(**known))
        TableExtender(table).close(table.run)
    if record is not None:
        write_record(folder, record)


def write_missing(
    folder: Path, output: OutputConfig, record: RunRecord, watch: Watch, damaged: Sequence[str] = ()
) -> None:
    """Write the formats that are asked for and not there, and anew those that other flags have made.

    damaged  names of files that are not as they were written; they are made again, too.
    """
    missing = {format.name for format in find_formats(output.formats) if not format.is_in(folder)}
    again = {format.name for format in FORMATS.values() for file in damaged if fnmatch(file, format.files)}
    if again:
        log.warning("%s: %s not as written; made again", folder, ", ".join(sorted(damaged)))
        missing |= again
    earlier = record.config.get("output", {})
    asked = {flag: getattr(output, flag) for format in FORMATS.values() for flag in format.shaped_by}
    changed = {flag for flag, value in asked.items() if earlier.get(flag, value) != value}
    outdated = {format.name for format in present_formats(folder) if changed.intersection(format.shaped_by)}
    wanted = tuple(name for name in FORMATS if name in missing | outdated)
    if wanted:
        write_formats(folder, replace(output, formats=wanted), record, watch)
    if changed:
        record.config = {**record.config, "output": {**earlier, **asked}}
    if changed or wanted:
        write_record(folder, record)
