"""Foreign nuclei as a `cells.zarr` of ours: the usual columns, and the source's ids, UUIDs and classes."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from cellslide import __version__
from cellslide.formats.importers.plausible import check_haematoxylin
from cellslide.formats.importers.read import load_alignment, read_nuclei
from cellslide.formats.importers.records import Direction, ForeignNuclei, NucleiReport, Origin, Source, Unit
from cellslide.slides.identity import content_sha256, describe_slide
from cellslide.slides.slide import Slide
from cellslide.store.anndata_columns import Column
from cellslide.store.cell_table import BLOCK_ROWS
from cellslide.store.run_record import TABLE, now_utc, peak_rss_bytes, plain, write_record
from cellslide.store.table_writer import CellTableWriter
from cellslide.types import Counts, Float64, ModelKind, ModelSpec, RunRecord, SlideInfo


def import_nuclei(
    path: Path,
    slide: Slide,
    folder: Path,
    unit: Unit = "px",
    alignment: Path | Float64 | None = None,
    origin: Origin = "bounds",
    mpp: float | None = None,
    direction: Direction = "slide-to-cells",
) -> NucleiReport:
    """Read the nuclei of `path` and write them as `folder/cells.zarr` with its `run.json`; returns what was met.

    Arguments are those of `Source`; `alignment` may be a CSV. Raises UsageError where the file cannot be used; what
    stood in the folder stays then.
    """
    began, started = time.perf_counter(), now_utc()
    matrix = load_alignment(alignment) if isinstance(alignment, Path) else alignment
    source = Source(unit, origin, mpp, matrix, direction)
    nuclei = read_nuclei(path, slide.info, source=source)
    check_haematoxylin(path, slide, nuclei.cells.centroid_xy, source)
    run = _record(path, slide.info, source, nuclei.report, started)
    write_foreign(folder, slide.info, nuclei, run)
    run.finished, run.peak_rss_bytes = now_utc(), peak_rss_bytes()
    run.seconds.total = time.perf_counter() - began
    write_record(folder, run)
    return nuclei.report


def _record(path: Path, info: SlideInfo, source: Source, report: NucleiReport, started: str) -> RunRecord:
    given = replace(source, alignment=None)
    matrix = None if source.alignment is None else np.asarray(source.alignment).tolist()
    entry = {"path": os.path.abspath(path), "sha256": content_sha256(path), **plain(given), "alignment": matrix}
    return RunRecord(
        cellslide_version=__version__,
        status="done",
        slide=describe_slide(info),
        config={"cells": entry, "cells_report": plain(report)},
        weights=[],
        device="cpu",
        engine="none",
        precision="none",
        seed=0,
        started=started,
        counts=Counts(nuclei_raw=report.read, nuclei=report.kept),
    )


def write_foreign(folder: Path, info: SlideInfo, nuclei: ForeignNuclei, run: RunRecord) -> Path:
    """Write `folder/cells.zarr` with the further columns `source_id` and `source_class`; returns its path.

    A nucleus keeps the source's UUID in `uuid`, so that GeoJSON of the table carries it; others get one of their own.
    """
    target, cells = folder / TABLE, nuclei.cells
    digest = run.config.get("cells", {}).get("sha256", "")
    kind: ModelKind = "point" if cells.contour_xy is None else "mask"
    mpp = (info.mpp_x + info.mpp_y) / 2
    # The digest of the file stands for that of weights: it makes the UUIDs of nuclei that have none.
    spec = ModelSpec("--cells", kind, mpp, 0, 0, (0, 0, 0), (1, 1, 1), weights_sha256=digest)
    writer = CellTableWriter(target, info, spec)
    try:
        for first in range(0, len(cells), BLOCK_ROWS):
            writer.append(cells.take(np.arange(first, min(first + BLOCK_ROWS, len(cells)))))
        writer.close(run, _columns(nuclei))
    except BaseException:
        writer.abort()
        raise
    return target


def _columns(nuclei: ForeignNuclei) -> dict[str, Column]:
    columns: dict[str, Column] = {"uuid": nuclei.uuid, "source_id": nuclei.source_id}
    if nuclei.class_name is not None:
        columns["source_class"] = nuclei.class_name
    return columns
