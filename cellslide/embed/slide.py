"""Vectors for the nuclei of one slide: `obsm["embedding"]` of its cell table, or a file beside it.

table -> places -> windows, network -> vectors kept on disk -> table, or embedding.parquet, or embedding.npz
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.classify.slide import read_places
from cellslide.classify.targets import Target, check_slide, open_target, require_cells
from cellslide.embed.engine import Embedder, Windows, embed_cells
from cellslide.embed.store import PartialVectors
from cellslide.errors import SlideError, StaleError, UsageError
from cellslide.formats.files import renew_files
from cellslide.inference.finite import NOT_FINITE
from cellslide.progress import IDLE, Watch
from cellslide.slides.slide import Slide
from cellslide.store.anndata_columns import Columns
from cellslide.store.atomic import beside
from cellslide.store.cell_table import BLOCK_ROWS, CellTable, TableExtender, open_table
from cellslide.store.run_record import TABLE, differences, flatten, read_record
from cellslide.store.slide_folder import close_record, held
from cellslide.types import Float32, RunRecord, WeightsRef

NAME = "embedding"
# What stands beside the table where the vectors are not put into it.
FILES = {"parquet": "embedding.parquet", "npz": "embedding.npz"}
FLUSH_WINDOWS = 64

log = logging.getLogger(__name__)


def embed_target(target: Target, embedder: Embedder, watch: Watch = IDLE) -> tuple[RunRecord, bool]:
    """Read the vectors of the cells in a slide's folder, which is held; raises as `pipeline.classify_slide`."""
    require_cells(target)
    mpp, allowed = embedder.config.mpp, embedder.config.allow_fluorescence
    with open_target(target, mpp, allowed) as slide, held(target.folder, watch) as watch:
        check_slide(target, slide)
        return embed_slide(target.folder, slide, embedder, watch)


def embed_slide(folder: Path, slide: Slide, embedder: Embedder, watch: Watch = IDLE) -> tuple[RunRecord, bool]:
    """Read the vectors of the cells of `folder/cells.zarr` from `slide`; tells whether they were there already.

    A cell whose place is not finite gets NaN. Raises UsageError when the folder holds vectors made with other settings,
    Interrupted when asked to stop (what is done is kept).
    """
    began, config = time.perf_counter(), embedder.config
    renew_files(folder, watch)
    with open_table(folder / TABLE) as table:
        record = read_record(folder) or table.run
        settings = embed_settings(table, embedder)
        if not config.overwrite and _is_there(folder, table, record, config.to, settings):
            return record, True
        store = PartialVectors.open(folder, settings, len(table), embedder.dim, config.overwrite)
        _run_network(slide, table, store, embedder, watch)
        watch.progress.stage("write")
        _note(record, embedder, settings)
        _write(folder, table, store, record, config.to)
    store.remove()
    close_record(record, folder, embedder.peak_device_bytes(), began)
    return record, False


def embed_settings(table: CellTable, embedder: Embedder) -> dict[str, str]:
    """Return what decides the vectors, as flat text; equal settings may share them."""
    weights = {"id": embedder.weights_id, "sha256": embedder.loaded.sha256}
    settings: dict[str, Any] = {"weights": weights, "mpp": embedder.mpp, "field_px": embedder.field_px}
    settings |= {"precision": embedder.precision, "cells": {"n": len(table), "found": table.run.started}}
    return flatten(settings)


def _is_there(folder: Path, table: CellTable, record: RunRecord, to: str, settings: dict[str, str]) -> bool:
    there = NAME in table.matrices if to == "zarr" else (folder / FILES[to]).exists()
    if not there:
        return False
    earlier = record.config.get("embed", {}).get(to)
    if earlier is None:
        raise UsageError(f"{folder}: holds vectors of the detector or of elsewhere; --overwrite replaces them")
    if words := differences(earlier, settings):
        raise StaleError(f"{folder}: its vectors were read with other settings ({words}); --overwrite reads them anew")
    return True


def _run_network(slide: Slide, table: CellTable, store: PartialVectors, embedder: Embedder, watch: Watch) -> None:
    places = read_places(table)
    todo = store.missing(np.flatnonzero(np.isfinite(places).all(axis=1)).astype(np.int64))
    windows: Windows = embedder.lay_windows(slide, places[todo])
    watch.progress.begin(slide.info.slide_id, len(windows), 0)
    watch.progress.stage("windows")
    broken = 0
    try:
        with closing(embed_cells(slide, windows, embedder)) as results:
            for done, (rows, vectors) in enumerate(results, 1):
                finite = np.isfinite(vectors).all(axis=1)
                broken += int((~finite).sum())
                vectors = np.where(np.asarray(finite)[:, None], vectors, np.float32(np.nan))
                store.put(todo[rows], vectors)
                watch.progress.advance(len(rows))
                if done % FLUSH_WINDOWS == 0:
                    store.flush()
                watch.check()
    finally:
        # A run that is asked to stop keeps what it has.
        store.flush()
    if broken and broken == len(todo):
        store.remove()
        raise SlideError(f"{slide.info.path}: not one of {broken:,} nuclei has a vector: {NOT_FINITE}")
    if broken:
        log.warning("%s: %d nuclei have no vector: %s", slide.info.path, broken, NOT_FINITE)


def _note(record: RunRecord, embedder: Embedder, settings: dict[str, str]) -> None:
    entry = embedder.loaded.entry
    kept = [ref for ref in record.weights if ref.id != entry.id]
    record.weights = [*kept, WeightsRef(entry.id, embedder.loaded.sha256, entry.licence or "")]
    earlier = record.config.get("embed", {})
    record.config = {**record.config, "embed": {**earlier, embedder.config.to: settings}}


def _write(folder: Path, table: CellTable, store: PartialVectors, record: RunRecord, to: str) -> None:
    # One block at least: a slide without cells has its vectors too, none.
    n = len(table)
    blocks = (store.block(start, min(start + BLOCK_ROWS, n)) for start in range(0, max(n, 1), BLOCK_ROWS))
    if to == "zarr":
        _extend(table, blocks, record)
    elif to == "parquet":
        _write_parquet(folder / FILES[to], table, blocks, store.width)
    else:
        _write_npz(folder / FILES[to], table, store)


def _extend(table: CellTable, blocks: Iterator[Float32], record: RunRecord) -> None:
    extender = TableExtender(table)
    try:
        for block in blocks:
            extender.append(Columns(obsm={NAME: block}))
        extender.close(record)
    except BaseException:
        extender.abort()
        raise


def _write_parquet(path: Path, table: CellTable, blocks: Iterator[Float32], dim: int) -> None:
    """Write `cell_id` and `embedding` (a list of `dim` numbers a row)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"cell_id": pa.int64(), NAME: pa.list_(pa.float32(), dim)})
    start = 0
    with beside(path) as scratch, pq.ParquetWriter(scratch, schema, compression="zstd") as writer:
        for block in blocks:
            ids = pa.array(table.vector("cell_id", start, start + len(block)))
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), dim)
            writer.write_table(pa.table([ids, vectors], schema))
            start += len(block)


def _write_npz(path: Path, table: CellTable, store: PartialVectors) -> None:
    """Write the arrays `cell_id` (N,) and `embedding` (N, D)."""
    with beside(path) as scratch, scratch.open("wb") as file:
        np.savez(file, cell_id=table.vector("cell_id"), embedding=store.block(0, len(table)))
