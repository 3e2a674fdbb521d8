"""Other formats made from a finished `cells.zarr`, streamed: QuPath's GeoJSON, GeoParquet, CSV, label maps."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from cellslide.anndata_store import Categorical, Column
from cellslide.config import OutputFormat
from cellslide.csvtext import harmless_column
from cellslide.geojson import PROBABILITIES, Origin, Profile, write_geojson
from cellslide.labels import write_labels
from cellslide.spatial import ROW_GROUP, geo_metadata, points_to_wkb, polygons_to_wkb
from cellslide.table import BLOCK_ROWS, CellTable

PARQUET_NAME, CSV_NAME = "cells.parquet", "cells.csv.gz"


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
    }
    return {name: writers[name]() for name in dict.fromkeys(formats)}


def write_parquet(table: CellTable, out_dir: Path, profile: Profile = "lean") -> Path:
    """Write `cells.parquet`: GeoParquet 1.1 with the outlines (or points), every obs column and the shape features."""
    kind = "Point" if table.kind == "point" else "Polygon"
    blocks = arrow_blocks(table, geometry=True, profile=profile)
    first = next(blocks)
    schema = first.schema.with_metadata(geo_metadata(kind))

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, schema, compression="zstd", compression_level=1) as writer:
            for block in chain([first], blocks):
                writer.write_table(block.replace_schema_metadata(schema.metadata), row_group_size=ROW_GROUP)

    return _in_one_step(out_dir / PARQUET_NAME, write)


def write_csv(table: CellTable, out_dir: Path, profile: Profile = "lean") -> Path:
    """Write `cells.csv.gz`: every obs column and the shape features; a rerun gives the same bytes.

    No cell of it is a formula to a spreadsheet (`csvtext`).
    """
    blocks = arrow_blocks(table, geometry=False, profile=profile)
    first = next(blocks)

    def write(path: Path) -> None:
        with (
            path.open("wb") as raw,
            gzip.GzipFile("", "wb", 4, raw, mtime=0) as stream,
            pa_csv.CSVWriter(stream, first.schema) as writer,
        ):
            for block in chain([first], blocks):
                writer.write_table(block)

    return _in_one_step(out_dir / CSV_NAME, write)


def _in_one_step(target: Path, write: Callable[[Path], None]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        write(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def arrow_blocks(table: CellTable, geometry: bool, profile: Profile) -> Iterator[pa.Table]:
    """Yield the table as arrow blocks; at least one, which may be empty, so that the columns are known."""
    for start in range(0, max(len(table), 1), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(table))
        columns = {name: _arrow(table.column(name, start, stop), geometry) for name in table.columns}
        shapes = table.matrix("X", start, stop)
        for k, name in enumerate(table.features):
            columns.setdefault(name, pa.array(np.ascontiguousarray(shapes[:, k])))
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
            found[f"{PROBABILITIES[name]}: {word}"] = pa.array(np.ascontiguousarray(values[:, k]))
    return found


def _arrow(column: Column, dictionary: bool) -> Any:
    """Return a column for parquet, or without dictionaries for CSV, where a text must not be a formula."""
    if not isinstance(column, Categorical):
        if column.dtype != object:
            return pa.array(column)
        texts = pa.array(column, pa.string())
        return texts if dictionary else harmless_column(texts)
    codes = pa.array(column.codes, mask=column.codes < 0)
    words = pa.DictionaryArray.from_arrays(codes, pa.array(column.names, pa.string()))
    return words if dictionary else harmless_column(words.cast(pa.string()))  # CSV knows no dictionaries


def _geometry(table: CellTable, start: int, stop: int) -> Any:
    rings = table.rings(start, stop)
    if rings is None:
        xy = np.stack([table.vector("x", start, stop), table.vector("y", start, stop)], axis=1)
        return points_to_wkb(xy)
    return polygons_to_wkb(*rings)
