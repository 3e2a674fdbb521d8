"""Parquet and CSV of a finished table through Arrow, streamed by blocks; the CSV of TissUUmaps too."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellslide.formats.csv_text import harmless_column
from cellslide.formats.geojson import PROBABILITIES, Profile
from cellslide.formats.tissuumaps import POINTS_NAME, TMAP_NAME, project_text, shown_points
from cellslide.store.anndata_columns import Categorical, Column
from cellslide.store.atomic import beside, write_text
from cellslide.store.cell_table import CellTable
from cellslide.store.shapes import ROW_GROUP, geo_metadata, points_to_wkb, polygons_to_wkb
from cellslide.types import Bool

PARQUET_NAME, CSV_NAME = "cells.parquet", "cells.csv.gz"
# A row group at a time: two at once would take half as much memory again.
BLOCK_ROWS = ROW_GROUP


def write_parquet(table: CellTable, out_dir: Path, profile: Profile = "lean") -> Path:
    """Write `cells.parquet`: GeoParquet 1.1 with the outlines (or points), every obs column and the shape features."""
    metadata = geo_metadata("Point" if table.kind == "point" else "Polygon")
    blocks = arrow_blocks(table, geometry=True, profile=profile)
    first = next(blocks)
    path = out_dir / PARQUET_NAME
    with beside(path) as scratch:
        _write_blocks(scratch, first.schema.with_metadata(metadata), chain([first], blocks))
    return path


def _write_blocks(path: Path, schema: pa.Schema, blocks: Iterable[pa.Table]) -> None:
    # Only columns of few words gain from a dictionary.
    words = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    numbers = [field.name for field in schema if pa.types.is_primitive(field.type)]
    with pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=words, write_statistics=numbers
    ) as writer:
        for block in blocks:
            writer.write_table(block.replace_schema_metadata(schema.metadata), row_group_size=ROW_GROUP)


def write_csv(table: CellTable, out_dir: Path, profile: Profile = "lean") -> Path:
    """Write `cells.csv.gz`: every obs column and the shape features; a rerun gives the same bytes.

    No cell of it is a formula to a spreadsheet (`csv_text`).
    """
    blocks = arrow_blocks(table, text=True, profile=profile)

    path = out_dir / CSV_NAME
    with beside(path) as scratch, scratch.open("wb") as raw, gzip.GzipFile("", "wb", 4, raw, mtime=0) as stream:
        _write_rows(stream, blocks)
    return path


def write_tissuumaps(table: CellTable, out_dir: Path, profile: Profile = "lean") -> Path:
    """Write `cells.tissuumaps.csv`, then the project `cells.tmap` that shows it over the slide; returns the project."""
    blocks = arrow_blocks(table, text=True, profile=profile)
    points = (shown_points(block, table) for block in blocks)

    with beside(out_dir / POINTS_NAME) as scratch, scratch.open("wb") as stream:
        _write_rows(stream, points)
    path = out_dir / TMAP_NAME
    write_text(path, project_text(table, out_dir))
    return path


def _write_rows(stream: gzip.GzipFile | BinaryIO, blocks: Iterator[pa.Table]) -> None:
    first = next(blocks)
    with pa_csv.CSVWriter(stream, first.schema) as writer:
        for block in chain([first], blocks):
            writer.write_table(block)


def arrow_blocks(
    table: CellTable, *, geometry: bool = False, text: bool = False, profile: Profile
) -> Iterator[pa.Table]:
    """Yield the table as arrow blocks; at least one, which may be empty, so that the columns are known.

    With `text` words are no dictionary, and none of them is a formula, as CSV wants it.
    """
    for start in range(0, max(len(table), 1), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(table))
        columns = {name: _arrow(table.column(name, start, stop), not text) for name in table.columns}
        shapes = table.matrix("X", start, stop)
        for k, name in enumerate(table.features):
            columns.setdefault(name, _numbers(shapes[:, k]))
        if profile == "full":
            columns |= _probabilities(table, start, stop)
        if geometry:
            columns["geometry"] = _geometry(table, start, stop)
        yield pa.table(columns)


def _probabilities(table: CellTable, start: int, stop: int) -> dict[str, Any]:
    found = {}
    for name in (name for name in PROBABILITIES if name in table.matrices):
        values = table.matrix(name, start, stop)
        for k, word in enumerate(table.class_names):
            found[f"{PROBABILITIES[name]}: {word}"] = _numbers(values[:, k])
    return found


def _numbers(values: NDArray[Any], there: Bool | None = None) -> Any:
    """Return a column of numbers without a copy, those not `there` missing.

    `pa.array` would first import pandas, to look for its types.
    """
    values = np.ascontiguousarray(values)
    if values.dtype == np.bool_:
        return pa.array(values)
    mask = None if there is None or there.all() else pa.py_buffer(np.packbits(there, bitorder="little"))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [mask, pa.py_buffer(values)])


def _strings(words: Sequence[str]) -> Any:
    raw = [word.encode() for word in words]
    ends = np.cumsum([0, *map(len, raw)]).astype(np.int32)
    return pa.Array.from_buffers(pa.string(), len(raw), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(raw))])


def _arrow(column: Column, dictionary: bool) -> Any:
    """Return a column for parquet, or without dictionaries for CSV, where a text must not be a formula."""
    if not isinstance(column, Categorical):
        if column.dtype != object:
            return _numbers(column)
        texts = _strings(column.tolist())
        return texts if dictionary else harmless_column(texts)
    words = pa.DictionaryArray.from_arrays(_numbers(column.codes, column.codes >= 0), _strings(column.names))
    return words if dictionary else harmless_column(words.cast(pa.string()))  # CSV knows no dictionaries


def _geometry(table: CellTable, start: int, stop: int) -> Any:
    if table.kind != "point" and table.shapes is not None and stop > start:
        # As it stands in the table, unread.
        return table.shapes.columns(start, stop).column("geometry")
    rings = table.rings(start, stop)
    if rings is None:
        xy = np.stack([table.vector("x", start, stop), table.vector("y", start, stop)], axis=1)
        return points_to_wkb(xy)
    return polygons_to_wkb(*rings)
