"""Other formats made from a finished `cells.zarr`, streamed: GeoJSON, GeoParquet, CSV, label maps, h5ad, TissUUmaps."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellslide.config import OutputFormat
from cellslide.formats.csv_text import harmless_column
from cellslide.formats.geojson import PROBABILITIES, Origin, Profile, write_geojson
from cellslide.formats.ome_labels import write_labels
from cellslide.formats.parquet_join import join_column
from cellslide.formats.tissuumaps import POINTS_NAME, TMAP_NAME, project_text, shown_points
from cellslide.store.anndata_columns import Categorical, Column
from cellslide.store.cell_table import BLOCK_ROWS, CellTable
from cellslide.store.shapes import ROW_GROUP, ShapeReader, geo_metadata, points_to_wkb, polygons_to_wkb
from cellslide.types import Bool

PARQUET_NAME, CSV_NAME, H5AD_NAME = "cells.parquet", "cells.csv.gz", "cells.h5ad"


def export_table(
    table: CellTable,
    out_dir: Path,
    formats: Sequence[OutputFormat],
    origin: Origin = "bounds",
    profile: Profile = "lean",
) -> dict[OutputFormat, Path]:
    """Write `formats` of a table into `out_dir`, each complete or not at all; returns their paths.

    `origin` is for GeoJSON; everything else is in level-0 pixels. `profile` "full" adds all probabilities, in GeoJSON
    the shape features too. "zarr" is the table itself.
    Raises UsageError for labels of a model that gives points.
    """
    writers: dict[OutputFormat, Callable[[], Path]] = {
        "zarr": lambda: table.path,
        "geojson": lambda: write_geojson(table, out_dir, origin, profile),
        "parquet": lambda: write_parquet(table, out_dir, profile),
        "csv": lambda: write_csv(table, out_dir, profile),
        "labels": lambda: write_labels(table, out_dir),
        "h5ad": lambda: _write_h5ad(table, out_dir),
        "tissuumaps": lambda: write_tissuumaps(table, out_dir, profile),
    }
    return {name: writers[name]() for name in dict.fromkeys(formats)}


def _write_h5ad(table: CellTable, out_dir: Path) -> Path:
    from cellslide.formats.h5ad import write_h5ad

    return _in_one_step(out_dir / H5AD_NAME, lambda path: write_h5ad(table, path))


def write_parquet(table: CellTable, out_dir: Path, profile: Profile = "lean") -> Path:
    """Write `cells.parquet`: GeoParquet 1.1 with the outlines (or points), every obs column and the shape features."""
    metadata = geo_metadata("Point" if table.kind == "point" else "Polygon")
    stored = _stored_outlines(table)
    blocks = arrow_blocks(table, geometry=stored is None, profile=profile)
    first = next(blocks)

    def write(path: Path) -> None:
        _write_blocks(path, first.schema.with_metadata(metadata), chain([first], blocks))
        if stored is not None:
            whole = first.schema.append(stored.file.schema_arrow.field("geometry")).with_metadata(metadata)
            join_column(path, whole, stored.path, "geometry")

    return _in_one_step(out_dir / PARQUET_NAME, write)


def _stored_outlines(table: CellTable) -> ShapeReader | None:
    """Return the outlines of the table where they stand in the row groups that a file of its columns gets."""
    shapes = table.shapes
    if table.kind == "point" or shapes is None:
        return None
    n = len(table)
    blocks = ((first, min(first + BLOCK_ROWS, n)) for first in range(0, n, BLOCK_ROWS))
    starts = [start for first, stop in blocks for start in range(first, stop, ROW_GROUP)]
    return shapes if shapes.first.tolist() == [*starts, n] else None


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

    No cell of it is a formula to a spreadsheet (`csvtext`).
    """
    blocks = arrow_blocks(table, text=True, profile=profile)

    def write(path: Path) -> None:
        with path.open("wb") as raw, gzip.GzipFile("", "wb", 4, raw, mtime=0) as stream:
            _write_rows(stream, blocks)

    return _in_one_step(out_dir / CSV_NAME, write)


def write_tissuumaps(table: CellTable, out_dir: Path, profile: Profile = "lean") -> Path:
    """Write `cells.tissuumaps.csv`, then the project `cells.tmap` that shows it over the slide; returns the project."""
    blocks = arrow_blocks(table, text=True, profile=profile)
    points = (shown_points(block, table) for block in blocks)

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            _write_rows(stream, points)

    _in_one_step(out_dir / POINTS_NAME, write)
    text = project_text(table, out_dir)
    return _in_one_step(out_dir / TMAP_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _write_rows(stream: gzip.GzipFile | BinaryIO, blocks: Iterator[pa.Table]) -> None:
    first = next(blocks)
    with pa_csv.CSVWriter(stream, first.schema) as writer:
        for block in chain([first], blocks):
            writer.write_table(block)


def _in_one_step(target: Path, write: Callable[[Path], object]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        write(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def arrow_blocks(
    table: CellTable, *, geometry: bool = False, text: bool = False, profile: Profile
) -> Iterator[pa.Table]:
    """Yield the table as arrow blocks; at least one, which may be empty, so that the columns are known.

    With `text` words are no dictionary, and none of them is a formula, as CSV wants it.
    """
    for start in range(0, max(len(table), 1), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(table))
        columns = {name: _column(table, name, start, stop, not text) for name in table.columns}
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


def _column(table: CellTable, name: str, start: int, stop: int, dictionary: bool) -> Any:
    if name == "uuid" and dictionary and stop > start:
        texts = table.ascii(name, start, stop)
        width = texts.dtype.itemsize
        if (np.strings.str_len(texts) == width).all():
            ends = np.arange(len(texts) + 1, dtype=np.int32) * width
            buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(texts).view(np.uint8))]
            return pa.Array.from_buffers(pa.string(), len(texts), buffers)
    return _arrow(table.column(name, start, stop), dictionary)


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
        texts = pa.array(column, pa.string())
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
