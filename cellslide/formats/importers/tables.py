"""Tables of nuclei: CSV, TSV and parquet with x and y, QuPath's measurements, Xenium's cells and boundaries, our own.

Columns are found by their names, whatever stands beside them. A unit in a name goes before `unit`; Xenium is in µm.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellslide.errors import UsageError
from cellslide.formats.csv_text import as_written
from cellslide.formats.importers.drafts import check_classes, objects, uuid_of
from cellslide.formats.importers.images import IMAGES, ImageSurvey
from cellslide.formats.importers.number_style import NumberSurvey, Style, is_text, to_numbers
from cellslide.formats.importers.records import NUCLEUS, Block, NucleiReport, Source, Unit
from cellslide.store.anndata_columns import TableError
from cellslide.store.cell_table import Categorical, CellChunk, open_table
from cellslide.store.foreign_files import read_json
from cellslide.store.shapes import polygons_from_wkb
from cellslide.types import Float64, Int64, SlideInfo

# Names as `_plain` makes them, the best first.
XY = {
    "x": "y", "x_px": "y_px", "x_um": "y_um", "centroid_x": "centroid_y", "x_centroid": "y_centroid",
    "centroid_x_px": "centroid_y_px", "centroid_x_um": "centroid_y_um", "vertex_x": "vertex_y", "cx": "cy",
    "nucleus_centroid_x_um": "nucleus_centroid_y_um", "x_location": "y_location", "pos_x": "pos_y",
}  # fmt: skip
# Corners of boxes: the nucleus lies in their middle.
BOXES = (
    ("x_min", "y_min", "x_max", "y_max"), ("xmin", "ymin", "xmax", "ymax"), ("min_x", "min_y", "max_x", "max_y"),
    ("minx", "miny", "maxx", "maxy"), ("x0", "y0", "x1", "y1"), ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"), ("bbox_x_min", "bbox_y_min", "bbox_x_max", "bbox_y_max"),
)  # fmt: skip
# Beside x and y of no other name these tell of boxes, whose x and y may be a corner or the middle.
SIZES = {("width", "height"), ("w", "h"), ("box_width", "box_height"), ("bbox_width", "bbox_height")}
IDS = ("cell_id", "object_id", "source_id", "id", "uuid", "label_id", "label")
UUIDS = ("uuid", "object_id", "id", "cell_id")
CLASSES = ("class", "classification", "cell_type", "celltype", "class_name", "type", "name")
SCORES = ("score", "detection_probability", "probability")
XENIUM = {"transcript_counts", "cell_area", "nucleus_area", "nucleus_count", "control_probe_counts"}
BATCH_ROWS = 65_536
XENIUM_FILES = ("cells.parquet", "cells.csv.gz", "cells.csv")
EXPECTED = (
    "expected columns x and y (or x_centroid, centroid_x, QuPath's 'Centroid X µm', Xenium's vertex_x; "
    "units by --cells-unit), and where there are any id, class, score"
)


def _plain(name: str) -> str:
    """Return a column's name in lower case, its words joined by _, µm as um."""
    text = name.strip().lower().replace("µ", "u").replace("μ", "u")
    return re.sub(r"[^a-z0-9]+", "_", text).strip("_")


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns of a file hold what; "" where it has none. `polygons`: a row is a vertex, Xenium's boundaries."""

    x: str
    y: str
    unit: Unit
    qupath: bool
    polygons: bool
    ids: str
    uuids: str
    classes: str
    scores: str
    area: str
    geometry: str
    image: str
    x_far: str = ""
    y_far: str = ""

    @property
    def wanted(self) -> list[str]:
        """The columns to read."""
        every = (
            self.x, self.y, self.x_far, self.y_far, self.ids, self.uuids, self.classes, self.scores, self.area,
            self.geometry, self.image,
        )  # fmt: skip
        return list(dict.fromkeys(name for name in every if name))


def layout_of(columns: Sequence[str], path: Path, source: Source) -> Layout:
    """Return the layout of a file by its column names; raises UsageError naming them where x and y are not found."""
    plain = {_plain(name): name for name in reversed(columns)}

    def first(names: Sequence[str]) -> str:
        return next((plain[name] for name in names if name in plain), "")

    x = next((name for name, y in XY.items() if name in plain and y in plain), "")
    box = next((names for names in BOXES if plain.keys() >= set(names)), None) if not x else None
    if x in ("x", "x_px", "x_um", "pos_x") and any(plain.keys() >= set(pair) for pair in SIZES):
        raise UsageError(
            f"{path}: has widths and heights, so that x and y may be a corner or the middle of a box; call them "
            "centroid_x and centroid_y, or give x_min, y_min, x_max and y_max"
        )
    if not x and box is None:
        found = ", ".join(columns[:12]) + (" ..." if len(columns) > 12 else "")
        raise UsageError(f"{path}: columns {found}; {EXPECTED}")
    of_assay = source.alignment is not None or path.name in XENIUM_FILES or bool(XENIUM & plain.keys())
    xenium = x == "vertex_x" or (x == "x_centroid" and of_assay)
    said: Unit = "um" if x.endswith("_um") or xenium else "px" if x.endswith("_px") else source.unit
    near_x, near_y, far_x, far_y = (plain[name] for name in box) if box else (plain[x], plain[XY[x]], "", "")
    return Layout(
        near_x,
        near_y,
        said,
        " " in near_x,  # QuPath's own names: "Centroid X µm"
        x == "vertex_x",
        first(IDS),
        first(UUIDS),
        first(CLASSES),
        first(SCORES),
        plain.get("nucleus_area", "") if xenium else plain.get("area_um2", ""),
        plain.get("geometry", ""),
        first(IMAGES),
        far_x,
        far_y,
    )


class TableReader:
    """Reads a CSV, TSV or parquet file in batches of rows."""

    ordered = False

    def __init__(self, path: Path, info: SlideInfo, source: Source, report: NucleiReport) -> None:
        self.path, self.info, self.source, self.report = path, info, source, report
        self.names: dict[str, int] = {}
        self.labels: dict[str, str] = {}
        self.place = 0
        self.style: Style = "plain"
        self.surveys = False

    def blocks(self) -> Iterator[Block]:
        """Yield the nuclei in the order of the file; raises UsageError for a file that is no such table."""
        try:
            layout = layout_of(self._columns(), self.path, self.source)
            image = self._survey(layout)
            batches = self._of_image(self._batches(layout.wanted), layout, image)
            to_level0 = self._source().to_level0(self.info, layout.unit, qupath=layout.qupath)
            make = self._boundaries if layout.polygons else self._cells
            yield from make(batches, layout, to_level0)
        except (
            OSError,
            EOFError,
            MemoryError,
            ValueError,
            KeyError,
            zlib.error,
            pa.ArrowException,
            csv.Error,
        ) as error:
            raise UsageError(f"{self.path}: cannot be read as a table ({_line(error)}); {EXPECTED}") from error

    def _survey(self, layout: Layout) -> str | None:
        """Look through the file for how it writes numbers, and return the image whose rows are wanted, None for all."""
        numbers = [name for name in (layout.x, layout.y, layout.x_far, layout.y_far) if name]
        if self._is_parquet():
            schema = pq.read_schema(self.path)
            numbers = [name for name in numbers if is_text(schema.field(name))]
        survey, images = NumberSurvey(), ImageSurvey(layout.image)
        columns = [*numbers, *([layout.image] if layout.image else [])]
        self.surveys = True  # rows that are skipped are counted when they are read for good
        for batch in self._batches(columns) if columns else ():
            for name in numbers:
                survey.see(batch.column(name))
            if layout.image:
                images.see(pc.unique(pa.array(_texts(batch, layout.image), pa.string())).to_pylist(), self.path)
        self.surveys = False
        self.style = survey.style(str(self.path), "" if self._is_parquet() else _header(self.path)[1])
        return images.wanted(self.info, self.path) if layout.image else None

    def _of_image(
        self, batches: Iterator[pa.RecordBatch], layout: Layout, image: str | None
    ) -> Iterator[pa.RecordBatch]:
        """Leave out the rows of other images, and count them."""
        for batch in batches:
            if image is not None:
                mine = _texts(batch, layout.image) == image
                self.report.read += int((~mine).sum())
                self.report.other_image += int((~mine).sum())
                batch = batch.filter(pa.array(mine))
            yield batch

    def _source(self) -> Source:
        """Return the source with the assay's pixel size, where Xenium's manifest stands beside the file."""
        manifest = self.path.with_name("experiment.xenium")
        if self.source.mpp is not None or self.source.alignment is None or not manifest.is_file():
            return self.source
        try:
            return replace(self.source, mpp=float(read_json(manifest, UsageError)["pixel_size"]))
        except (UsageError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise UsageError(f"{manifest}: no pixel_size ({_line(error)}); give --cells-mpp") from error

    def _is_parquet(self) -> bool:
        return self.path.suffix.lower() in (".parquet", ".pq")

    def _columns(self) -> list[str]:
        if self._is_parquet():
            return list(pq.read_schema(self.path).names)
        return _header(self.path)[0]

    def _batches(self, wanted: list[str]) -> Iterator[pa.RecordBatch]:
        if self._is_parquet():
            with pq.ParquetFile(self.path) as file:
                yield from file.iter_batches(BATCH_ROWS, columns=wanted)
            return
        _, separator = _header(self.path)
        # As text: the type guessed from the first rows need not hold for the rest.
        convert = pa_csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()))
        parse = pa_csv.ParseOptions(delimiter=separator, invalid_row_handler=self._skip)
        with pa_csv.open_csv(self.path, convert_options=convert, parse_options=parse) as stream:
            yield from stream

    def _skip(self, row: Any) -> str:
        if not self.surveys:
            self.report.read += 1
            self.report.invalid += 1
        return "skip"

    def _cells(self, batches: Iterator[pa.RecordBatch], layout: Layout, to_level0: Float64) -> Iterator[Block]:
        for batch in batches:
            if not batch.num_rows:
                continue
            xy = np.stack([self._numbers(batch, layout.x), self._numbers(batch, layout.y)], axis=1)
            if layout.x_far:
                far = [self._numbers(batch, layout.x_far), self._numbers(batch, layout.y_far)]
                xy = (xy + np.stack(far, axis=1)) / 2
            rings = _geometry(batch, layout.geometry)
            yield self._block(batch, layout, to_level0, xy, *rings)

    def _boundaries(self, batches: Iterator[pa.RecordBatch], layout: Layout, to_level0: Float64) -> Iterator[Block]:
        """Yield polygons of vertex tables, whose rows of one id stand together; one may go over the batch's end."""
        held: pa.Table | None = None
        for batch in batches:
            table = pa.Table.from_batches([batch])
            held = table if held is None else pa.concat_tables([held, table])
            first = _runs(held, layout.ids)
            if len(first) > 1:
                yield self._polygons(held.slice(0, first[-1]), layout, to_level0)
                held = held.slice(first[-1])
        if held is not None and held.num_rows:
            yield self._polygons(held, layout, to_level0)

    def _polygons(self, table: pa.Table, layout: Layout, to_level0: Float64) -> Block:
        batch = table.combine_chunks().to_batches()[0]
        xy = np.stack([self._numbers(batch, layout.x), self._numbers(batch, layout.y)], axis=1)
        first = _runs(table, layout.ids)
        start = np.append(first, table.num_rows).astype(np.int64)
        rows = pa.record_batch(batch.take(pa.array(first)).columns, schema=batch.schema)
        return self._block(rows, layout, to_level0, np.full((len(first), 2), np.nan), xy, start)

    def _block(
        self, batch: pa.RecordBatch, layout: Layout, to_level0: Float64, xy: Float64, rings: Float64, start: Int64
    ) -> Block:
        n = batch.num_rows
        ids = self._words(batch, layout.ids) if layout.ids else objects([str(self.place + k) for k in range(n)])
        self.place += n
        area = self._numbers(batch, layout.area) if layout.area else np.full(n, np.nan)
        score = self._numbers(batch, layout.scores) if layout.scores else np.full(n, np.nan)
        return Block(
            ids,
            to_level0,
            xy,
            rings,
            start,
            np.full(n, NUCLEUS, np.int8),
            self._classes(batch, layout.classes),
            np.where((score >= 0) & (score <= 1), score, np.nan).astype(np.float32),
            area.astype(np.float32),
            objects([uuid_of(text) for text in (_texts(batch, layout.uuids) if layout.uuids else ids)]),
        )

    def _numbers(self, batch: pa.RecordBatch, column: str) -> Float64:
        """Return a column as numbers, NaN for what is none."""
        values = batch.column(column)
        if is_text(values):
            return to_numbers(values, self.style)
        return np.asarray(values.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)

    def _words(self, batch: pa.RecordBatch, column: str) -> NDArray[Any]:
        """Return a column as texts; a CSV quotes what a spreadsheet would take for a formula."""
        words = _texts(batch, column)
        return words if self._is_parquet() else objects([as_written(word) for word in words.tolist()])

    def _classes(self, batch: pa.RecordBatch, column: str) -> NDArray[np.int16]:
        if not column:
            return np.full(batch.num_rows, -1, np.int16)
        words = self._words(batch, column)
        codes = [self.names.setdefault(w, len(self.names)) if w else -1 for w in words]
        check_classes(self.names)
        return np.array(codes, np.int16)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _header(path: Path) -> tuple[list[str], str]:
    """Return the column names of a CSV or TSV and what parts them: a tab, a semicolon or a comma."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as raw:
        line = raw.readline().decode("utf-8-sig")
    separator = next((s for s in "\t;" if s in line), ",")
    return next(csv.reader([line], delimiter=separator), []), separator


def _texts(batch: pa.RecordBatch, column: str) -> NDArray[Any]:
    """Return a column as texts, "" for what is missing; bytes, as older Xenium parquet has ids, are decoded."""
    values = batch.column(column)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        values = pa.array([None if v is None else bytes(v).decode("utf-8", "replace") for v in values.to_pylist()])
    elif not pa.types.is_string(values.type):
        values = values.cast(pa.string())
    return objects(pc.fill_null(values, "").to_pylist())


def _geometry(batch: pa.RecordBatch, column: str) -> tuple[Float64, Int64]:
    """Return the outlines of GeoParquet (WKB), none for points."""
    n = batch.num_rows
    if not column:
        return np.empty((0, 2)), np.zeros(n + 1, np.int64)
    values = batch.column(column).cast(pa.binary())
    try:
        return polygons_from_wkb(values)
    except (TableError, ValueError):
        return _rings_of(values.to_pylist())


def _rings_of(wkb: list[bytes | None]) -> tuple[Float64, Int64]:
    """Return the outer ring of the largest part of each geometry, no vertex where it has no area."""
    import shapely

    shapes = shapely.from_wkb(wkb, on_invalid="ignore")
    parts, owner = shapely.get_parts(shapes, return_index=True)
    order = np.lexsort((-shapely.area(parts), owner))
    owner, first = np.unique(owner[order], return_index=True)
    outer = np.full(len(wkb), None, object)
    outer[owner] = shapely.get_exterior_ring(parts[order][first])
    xy, ring = shapely.get_coordinates(outer, return_index=True)
    return xy, np.searchsorted(ring, np.arange(len(wkb) + 1)).astype(np.int64)


def _runs(table: pa.Table, column: str) -> Int64:
    """Return the first row of each run of equal ids."""
    ids = table.column(column).to_numpy()
    return np.flatnonzero(np.append(True, ids[1:] != ids[:-1])) if len(ids) else np.empty(0, np.int64)


class OwnTableReader:
    """Reads a `cells.zarr` of ours, whose order and ids stay."""

    ordered = True

    def __init__(self, path: Path, info: SlideInfo, source: Source, report: NucleiReport) -> None:
        self.path, self.info = path, info
        self.names: dict[str, int] = {}
        self.labels: dict[str, str] = {}

    def blocks(self) -> Iterator[Block]:
        """Yield the cells; raises UsageError for another zarr, or a table made for a slide of another size."""
        try:
            table = open_table(self.path)
        except (TableError, KeyError, ValueError) as error:
            raise UsageError(f"{self.path}: no cells.zarr of cellslide ({_line(error)})") from error
        with table:
            size, here = (table.slide.width_px, table.slide.height_px), (self.info.width_px, self.info.height_px)
            if size != here:
                raise UsageError(f"{self.path}: made for a slide of {size} px, {self.info.path} has {here} px")
            typed = len(table.class_names) > 1 or not np.isnan(table.vector("class_prob", 0, 1)).all()
            self.names.update({name: k for k, name in enumerate(table.decisions)} if typed else {})
            wanted = [name for name in ("source_id", "source_class") if name in table.columns]
            for chunk in table.iter_chunks(obs=wanted):
                yield self._block(chunk, typed)

    def _block(self, chunk: CellChunk, typed: bool) -> Block:
        cells, n = chunk.cells, len(chunk)
        ids = chunk.columns.obs.get("source_id")
        return Block(
            ids if isinstance(ids, np.ndarray) else objects([str(k) for k in chunk.cell_id.tolist()]),
            np.eye(3),
            cells.centroid_xy,
            np.empty((0, 2)) if cells.contour_xy is None else cells.contour_xy,
            np.zeros(n + 1, np.int64) if cells.contour_start is None else cells.contour_start,
            np.full(n, NUCLEUS, np.int8),
            self._codes(chunk, typed),
            cells.score,
            cells.area_um2,
            chunk.uuid,
        )

    def _codes(self, chunk: CellChunk, typed: bool) -> NDArray[np.int16]:
        given = chunk.columns.obs.get("source_class")
        if isinstance(given, Categorical):  # imported before: what the first tool said stays
            codes = [self.names.setdefault(name, len(self.names)) for name in given.names]
            return np.asarray(np.array([*codes, -1], np.int16)[given.codes], np.int16)
        return np.asarray(chunk.class_index if typed else np.full(len(chunk), -1), np.int16)
