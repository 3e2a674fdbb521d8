"""A file of nuclei in, `ForeignNuclei` of a slide out: which reader, then blocks -> placed -> chosen -> ordered."""

from __future__ import annotations

import csv
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.errors import UsageError
from cellslide.formats.importers import json_files, tables
from cellslide.formats.importers.place import POINT_RADIUS_UM, Placed, chosen, first_of_place, gather_rings, place
from cellslide.formats.importers.plausible import DOUBTFUL_SHARE, FLAGS, warn_of_units
from cellslide.formats.importers.records import ForeignNuclei, NucleiReport, Origin, Reader, Source, Unit
from cellslide.store.anndata_columns import Categorical
from cellslide.store.run_record import TABLE
from cellslide.types import Bool, Cells, Float64, Int64, SlideInfo

# Cells are numbered by rows of this height, then x: neighbours stay together, as the tiles of a model keep them.
ROW_UM = 256.0
FORMATS = "GeoJSON (.geojson, .json, .gz, .zip), CellViT or HoVer-Net JSON, CSV or TSV (.gz), parquet, or a cells.zarr"
_log = logging.getLogger(__name__)


def read_nuclei(
    path: Path,
    info: SlideInfo,
    unit: Unit = "px",
    alignment: Float64 | None = None,
    origin: Origin = "bounds",
    source: Source | None = None,
) -> ForeignNuclei:
    """Read the nuclei that another tool found on a slide, in level-0 pixels and in the order of the table to be.

    `source` says more than `unit`, `origin` and `alignment` (3x3, see `Source`) and goes before them. What cannot be
    used is left out and counted. Raises UsageError for a file of no known format, and where every nucleus lies
    outside the slide.
    """
    source = source or Source(unit, origin, alignment=alignment)
    report = NucleiReport()
    reader = _reader(path, info, source, report)
    with _collector_paused():
        parts = [place(block, info, report) for block in reader.blocks()]
    _check_some_inside(path, source, report)
    nuclei = _ordered(parts, reader, info, report)
    _check_some_kept(path, report)
    warn_of_units(path, info, nuclei.cells.centroid_xy, source)
    _log.debug("%s: %s", path.name, report.in_words())
    return nuclei


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the search for cycles: what JSON gives has none, and millions of lists cost more to search than to read."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _reader(path: Path, info: SlideInfo, source: Source, report: NucleiReport) -> Reader:
    if not path.exists():
        raise UsageError(f"{path}: no such file; --cells takes {FORMATS}")
    if path.is_dir():
        folder = path / TABLE if (path / TABLE).is_dir() else path
        return tables.OwnTableReader(folder, info, source, report)
    endings = [ending.lower() for ending in path.suffixes if ending.lower() not in (".gz", ".snappy")]
    ending = endings[-1] if endings else ""
    if ending in (".csv", ".tsv", ".txt", ".parquet", ".pq"):
        return tables.TableReader(path, info, source, report)
    if ending in (".dat", ".db", ".pkl", ".pickle", ".joblib"):
        raise UsageError(
            f"{path}: pickles and databases of TIAToolbox are not read, since a pickle can run code; "
            "write GeoJSON with AnnotationStore.to_geojson"
        )
    if ending in (*json_files.JSON_ENDINGS, ".zip"):
        return json_files.JsonReader(path, info, source, report)
    raise UsageError(f"{path}: ending {ending or 'missing'}; --cells takes {FORMATS}")


def _check_some_inside(path: Path, source: Source, report: NucleiReport) -> None:
    if report.read and report.outside == report.read:
        turned = "" if source.alignment is None else ", --alignment (it may map the other way)"
        raise UsageError(
            f"{path}: not one of {report.read:,} nuclei lies on the slide; check --cells-unit, --geojson-origin{turned}"
        )


def _check_some_kept(path: Path, report: NucleiReport) -> None:
    """Raise UsageError where objects were met and none is of use; warn where many are not, or there is none at all."""
    if report.read and not report.kept:
        raise UsageError(f"{path}: {report.in_words()}; --cells takes {FORMATS}")
    if not report.read:
        _log.warning("%s: holds no nuclei", path)
    doubtful = report.outside + report.not_finite
    if doubtful > DOUBTFUL_SHARE * (report.read - report.other_image):
        _log.warning("%s: %s; check %s", path, report.in_words(), FLAGS)


def _ordered(parts: list[Placed], reader: Reader, info: SlideInfo, report: NucleiReport) -> ForeignNuclei:
    """Choose nuclei among other objects, drop those at one place, and number the rest."""
    xy, kind, area = (_column(parts, name) for name in ("centroid", "kind", "area_um2"))
    keep = chosen(kind, area)
    report.other += int((~keep).sum())
    keep = _first_only(xy, keep, report)
    rows = np.flatnonzero(keep)
    row = np.floor(xy[rows, 1] * info.mpp_y / ROW_UM).astype(np.int32)
    if not reader.ordered:
        order = np.lexsort((xy[rows, 0], row))
        rows, row = rows[order], row[order]
    report.kept = len(rows)
    ids, uuid, codes, score = (_column(parts, name)[rows] for name in ("source_id", "uuid", "class_code", "score"))
    rank = np.full(len(xy), -1, np.int64)
    rank[rows] = np.arange(len(rows))
    cells = _cells(parts, rank, xy[rows], row, score, area[rows], info)
    return ForeignNuclei(cells, ids, _unique(ids, uuid, report), _classes(codes, reader), report)


def _first_only(xy: Float64, keep: Bool, report: NucleiReport) -> Bool:
    rows = np.flatnonzero(keep)
    first = first_of_place(xy[rows])
    report.duplicates += int((~first).sum())
    only = np.zeros(len(xy), np.bool_)
    only[rows[first]] = True
    return only


def _cells(
    parts: list[Placed], rank: Int64, xy: Float64, row: NDArray[np.int32], score: Any, area: Any, info: SlideInfo
) -> Cells:
    """Return the nuclei as cells; points among outlines get an outline, since a table holds one kind."""
    contour, start = None, None
    if any(len(part.contour_xy) for part in parts):
        radius = POINT_RADIUS_UM / np.array([info.mpp_x, info.mpp_y])
        contour, start = gather_rings(parts, rank, xy, radius)
    nowhere = np.full(len(xy), -1, np.int32)  # no tile found them
    return Cells(xy, nowhere, row, score, area, contour_xy=contour, contour_start=start)


def _column(parts: list[Placed], name: str) -> NDArray[Any]:
    empty = {"centroid": np.empty((0, 2)), "kind": np.empty(0, np.int8), "class_code": np.empty(0, np.int16)}
    text, real = np.empty(0, object), np.empty(0, np.float32)
    none = empty.get(name, text if name in ("source_id", "uuid") else real)
    return np.concatenate([none, *(getattr(part, name) for part in parts)])


def _unique(ids: NDArray[Any], uuid: NDArray[Any], report: NucleiReport) -> NDArray[Any]:
    """Return the UUIDs with those that an earlier nucleus has left out; counts ids given twice."""
    report.repeated_ids = len(ids) - len(set(ids))
    seen: set[str] = set()
    once = uuid.copy()
    for k, text in enumerate(uuid):
        if text in seen:
            once[k] = ""
        elif text:
            seen.add(text)
    return once


def _classes(codes: NDArray[np.int16], reader: Reader) -> Categorical | None:
    """Return the classes by their names in the file, in the order in which they were met; None where there are none."""
    if not (codes >= 0).any():
        return None
    words = [reader.labels.get(name, name) for name in reader.names]
    names = tuple(dict.fromkeys(words))
    place = np.array([names.index(word) for word in words] + [-1], np.int16)
    return Categorical(place[codes], names)


def load_alignment(path: Path) -> Float64:
    """Read a 3x3 affine matrix from a CSV; raises UsageError for anything else."""
    expected = "expected 3 rows of 3 numbers, the last 0,0,1, as Xenium Explorer exports it"
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [[float(value) for value in row] for row in csv.reader(stream) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: no alignment matrix ({error}); {expected}") from error
    matrix = np.array(rows, np.float64) if {len(row) for row in rows} == {3} else np.empty(0)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or not np.allclose(matrix[2], (0, 0, 1)):
        raise UsageError(f"{path}: no alignment matrix; {expected}")
    if abs(np.linalg.det(matrix)) < 1e-12:
        raise UsageError(f"{path}: the alignment matrix cannot be inverted; {expected}")
    return matrix
