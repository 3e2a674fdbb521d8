"""The tables of a study: one CSV and one Parquet file each, all slides below each other."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellslide.formats.csv_text import harmless
from cellslide.measure.counts import column_names
from cellslide.measure.slide import SlideNumbers
from cellslide.store.atomic import beside, write_text

TABLES = ("regions", "classes", "neighbours", "curves")


def write_tables(numbers: Sequence[SlideNumbers], output: Path) -> list[Path]:
    """Write `regions`, `classes`, `neighbours` and `curves` as CSV and Parquet; returns the files."""
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name in TABLES:
        rows = [{"slide": found.slide, **row} for found in numbers for row in getattr(found, name)]
        for path, write in ((output / f"{name}.csv", _write_csv), (output / f"{name}.parquet", _write_parquet)):
            write(path, rows)
            written.append(path)
    return written


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = column_names(rows) or ["slide"]
    writer.writerow(map(harmless, names))
    for row in rows:
        writer.writerow([_shown(row.get(name)) for name in names])
    write_text(path, text.getvalue())


def _shown(value: Any) -> Any:
    if value is None:
        return ""
    return harmless(value) if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else value


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = column_names(rows) or ["slide"]
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    with beside(path) as scratch:
        pq.write_table(table, scratch)
