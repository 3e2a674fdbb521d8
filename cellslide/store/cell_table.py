"""The cell table `cells.zarr`: read by row range, extended with columns; `table_writer` writes it.

Layout: SpatialData on zarr v3: `shapes/nuclei` (outlines; absent when there are no cells) and `tables/cells` (AnnData).
All coordinates are level-0 pixels. A table appears under its name only when it is complete.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from cellslide.errors import CellslideError, MissingDependencyError, short
from cellslide.store import run_record as record
from cellslide.store.anndata_columns import (
    Categorical,
    Column,
    Columns,
    ColumnWriter,
    OpenNodes,
    TableError,
    mark_frame,
    obs_names,
    read_matrix,
    read_obs,
    read_word,
    write_word,
)
from cellslide.store.atomic import Staging
from cellslide.store.foreign_files import parse_json
from cellslide.store.shapes import ShapeReader, ring_boxes
from cellslide.store.table_gate import MOST_ROWS, check_rows, check_store
from cellslide.store.table_schema import (
    ABSTAINED_COLOR,
    CHANGED,
    NOT_NUCLEUS,
    SCHEMA_VERSION,
    decision_words,
    order_of_version_1,
    parse_color,
    read_version,
    read_version_1,
    write_schema,
)
from cellslide.store.table_writer import BLOCK_ROWS
from cellslide.types import (
    Cells,
    ClassSpec,
    Float32,
    Float64,
    Int64,
    Level,
    ModelKind,
    RunRecord,
    SlideInfo,
)
from cellslide.types.address import to_path

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = [
    "BLOCK_ROWS",
    "Categorical",
    "CellChunk",
    "CellTable",
    "Columns",
    "TableError",
    "TableExtender",
    "open_table",
]


@dataclass(frozen=True, slots=True)
class CellChunk:
    """Rows [start, start + N) of a table; `columns` holds what else was asked for (extra obs, obsm, X).

    class_index  what was decided (N,): an index into `CellTable.decisions`, -1 where a cell was not typed.
    class_prob   float32 (N,), the probability of the most probable class.
    """

    start: int
    cells: Cells
    cell_id: Int64
    uuid: NDArray[Any]
    class_index: Int64
    class_prob: Float32
    columns: Columns

    def __len__(self) -> int:
        return len(self.cells)


@contextmanager
def _readable(path: Path, words: str) -> Iterator[None]:
    """Raise TableError, with `words` for what is wrong, for whatever zarr, arrow and json raise on a damaged store."""
    try:
        yield
    except (CellslideError, OSError, MemoryError):
        raise
    except Exception as error:
        raise TableError(f"{path}: {words} ({type(error).__name__}: {short(error)})") from error


class CellTable:
    """A complete table on disk, read by row range; usable in a `with` block.

    class_names, colors  of the K classes. `decisions` and `decision_colors` are those of the column `class`: the
                         classes and the word for cells that abstained.
    version              schema version on disk; columns are read as those of the newest one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_store(path)
        root = zarr.open_group(path, mode="r", zarr_format=3, use_consolidated=False)
        group: Any = root["tables/cells"]
        self.group: zarr.Group = group
        self._nodes = OpenNodes()
        self.slide = _read_slide(read_word(group, "uns/slide"))
        self.kind: ModelKind = _read_kind(read_word(group, "uns/kind"))
        self.version = read_version(group)
        self.class_names = tuple(str(v) for v in np.asarray(read_matrix(group, "uns/class_names")))
        self.decisions = decision_words(self.class_names)
        colors = [parse_color(str(v)) for v in np.asarray(read_matrix(group, "uns/class_colors"))]
        self.colors = tuple(colors[: len(self.class_names)])
        self.decision_colors = (*self.colors, ABSTAINED_COLOR)
        self.run: RunRecord = record.from_dict(parse_json(read_word(group, "uns/run"), path, TableError))
        self.stored = obs_names(group)
        self.columns = order_of_version_1(self.stored) if self.version == 1 else self.stored
        self.matrices = tuple(sorted(group["obsm"]))
        self.features = tuple(str(v) for v in np.asarray(read_matrix(group, "var/_index")))
        self.n = check_rows(group["obs/cell_id"], path)
        shapes = path / "shapes" / "nuclei" / "shapes.parquet"
        self.shapes = ShapeReader(shapes) if shapes.exists() else None
        if (int(self.shapes.first[-1]) if self.shapes else 0) != self.n:
            raise TableError(f"{path}: {self.n} rows, but another number of outlines; write it again with --overwrite")

    def __len__(self) -> int:
        return self.n

    def __enter__(self) -> CellTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file of outlines."""
        if self.shapes:
            self.shapes.close()

    @property
    def classes(self) -> tuple[ClassSpec, ...]:
        """The classes with their colours."""
        return tuple(ClassSpec(*pair) for pair in zip(self.class_names, self.colors, strict=True))

    def column(self, name: str, start: int = 0, stop: int | None = None) -> Column:
        """Return rows [start, stop) of one obs column; raises TableError where there is none of that name."""

        def read(stored: str) -> Column:
            return read_obs(self.group, stored, start, stop, self._nodes)

        with _readable(self.path, f"{name} is damaged"):
            return read_version_1(read, self.stored, name, self.class_names) if self.version == 1 else read(name)

    def vector(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows of a column that is not categorical; raises TableError otherwise."""
        column = self.column(name, start, stop)
        if not isinstance(column, np.ndarray):
            raise TableError(f"column {name} is categorical")
        return column

    def codes(self, name: str, start: int = 0, stop: int | None = None) -> Int64:
        """Return rows of a categorical column as indices into its categories, -1 where missing; raises as `vector`."""
        column = self.column(name, start, stop)
        if isinstance(column, np.ndarray):
            raise TableError(f"column {name} is not categorical")
        return column.codes.astype(np.int64)

    def count_classes(self) -> dict[str, int]:
        """Return the nuclei by decision; what was rejected or not typed is in no count."""
        found = np.zeros(len(self.decisions), np.int64)
        for start in range(0, self.n, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self.n)
            codes = self.codes("class", start, stop)
            kept = np.asarray(self.vector("is_nucleus", start, stop), np.bool_) & (codes >= 0)
            found += np.bincount(codes[kept], minlength=len(found))
        counts = zip(self.decisions, found.tolist(), strict=True)
        return {name: count for name, count in counts if name != NOT_NUCLEUS}

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows [start, stop) of `obsm[name]`, or of the shape features for the name "X"."""
        with _readable(self.path, f"{name} is damaged"):
            return read_matrix(self.group, name if name == "X" else f"obsm/{name}", start, stop, self._nodes)

    def small(self, path: str) -> NDArray[Any]:
        """Return an array of `uns`, whole; raises TableError where there is none."""
        with _readable(self.path, path):
            return np.asarray(read_matrix(self.group, path))

    def rings(self, start: int, stop: int) -> tuple[Float64, Int64] | None:
        """Return the outlines of rows [start, stop) as flat rings, or None where the model gives points."""
        if self.kind == "point":
            return None
        return self.shapes.rings(start, stop) if self.shapes else (np.empty((0, 2)), np.zeros(1, np.int64))

    def iter_chunks(
        self,
        rows: int = BLOCK_ROWS,
        *,
        obs: Sequence[str] = (),
        obsm: Sequence[str] = (),
        features: bool = False,
        outlines: bool = True,
        probabilities: bool = True,
    ) -> Iterator[CellChunk]:
        """Yield the cells in order, `rows` at a time, with the extra columns named.

        Without `outlines`, or without the `probabilities` of all classes, it is quicker.
        """
        stream = self.shapes.stream() if outlines and self.shapes and self.kind != "point" else None
        for start in range(0, self.n, rows):
            stop = min(start + rows, self.n)
            extra = Columns(
                {name: self.column(name, start, stop) for name in obs},
                {name: self.matrix(name, start, stop) for name in obsm},
                self.matrix("X", start, stop) if features else None,
            )
            uuid = self.vector("uuid", start, stop)
            yield self._chunk(start, uuid, extra, stream.take(stop - start) if stream else None, probabilities)

    @contextmanager
    def newest(self) -> Iterator[CellTable]:
        """Yield this table, or where its schema is older a copy of the newest one, which is deleted at the end."""
        if self.version == SCHEMA_VERSION:
            yield self
            return
        with tempfile.TemporaryDirectory() as folder:
            TableExtender(self, Path(folder) / self.path.name).close(self.run)
            with open_table(Path(folder) / self.path.name) as table:
                yield table

    def to_anndata(self) -> AnnData:
        """Return the table as AnnData; raises MissingDependencyError where anndata is not installed."""
        anndata: Any = _optional("anndata")
        with self.newest() as table:
            return anndata.read_zarr(table.path / "tables" / "cells")

    def to_spatialdata(self) -> SpatialData:
        """Return table and outlines as SpatialData; raises MissingDependencyError where it is not installed."""
        spatialdata: Any = _optional("spatialdata")
        with self.newest() as table:
            return spatialdata.read_zarr(table.path)

    def to_geopandas(self) -> GeoDataFrame:
        """Return one row a cell with its outline, or its centre where the model gives points, in level-0 pixels.

        Raises MissingDependencyError where geopandas is not installed.
        """
        geopandas, pandas = _optional("geopandas"), _optional("pandas")
        columns = {name: self.column(name) for name in self.columns}
        named = {
            name: pandas.Categorical.from_codes(c.codes, c.names) if isinstance(c, Categorical) else c
            for name, c in columns.items()
        }
        if self.shapes is None:
            return geopandas.GeoDataFrame(named, geometry=[])
        shapes = geopandas.read_parquet(self.path / "shapes" / "nuclei" / "shapes.parquet", columns=["geometry"])
        return geopandas.GeoDataFrame(named, geometry=shapes.geometry.to_numpy())

    def _chunk(
        self,
        start: int,
        uuid: NDArray[Any],
        extra: Columns,
        rings: tuple[Float64, Int64] | None,
        probabilities: bool,
    ) -> CellChunk:
        stop = start + len(uuid)
        x, y, score, area, tile, row, ids, prob = (
            self.vector(name, start, stop)
            for name in ("x", "y", "score", "area_um2", "tile_index", "tile_row", "cell_id", "class_prob")
        )
        class_index = self.codes("class", start, stop)
        xy, ring_start = rings or (None, None)
        box = ring_boxes(xy, ring_start) if self.kind == "box" and xy is not None and ring_start is not None else None
        full = self.matrix("prob", start, stop) if probabilities and "prob" in self.matrices else None
        cells = Cells(np.stack([x, y], axis=1), tile, row, score, area, full, box, xy, ring_start)
        return CellChunk(start, cells, ids, uuid, class_index, prob, extra)


def open_table(path: Path) -> CellTable:
    """Open `cells.zarr`; raises TableError where it is missing or not a complete table of this schema."""
    if not (path / "tables" / "cells" / "zarr.json").is_file():
        raise TableError(f"{path}: no cell table here; run `cellslide segment` first")
    with _readable(path, "not a cell table of cellslide"):
        return CellTable(path)


def _optional(package: str) -> Any:
    """Import a package that a table can be handed to; raises MissingDependencyError that names the extra."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"{package} is not installed: pip install 'cellslide[spatial]'") from error


def _read_kind(text: str) -> ModelKind:
    kinds: dict[str, Literal["mask", "box", "point"]] = {"mask": "mask", "box": "box", "point": "point"}
    if text not in kinds:
        raise TableError(f"unknown kind of outline {short(text)} in the table")
    return kinds[text]


def _read_slide(text: str) -> SlideInfo:
    values = parse_json(text, "the slide of the table", TableError)
    values["path"] = to_path(str(values["path"]))
    values["levels"] = tuple(Level(**level) for level in values["levels"])
    values["bounds"] = tuple(int(v) for v in values["bounds"]) if values["bounds"] else None
    info = SlideInfo(**values)
    sizes = (info.width_px, info.height_px, info.mpp_x, info.mpp_y)
    if not all(isinstance(v, (int, float)) and 0 < v < MOST_ROWS for v in sizes):
        raise TableError(f"a slide of {short(sizes[:2])} px at {short(sizes[2:])} µm is none")
    return info


def _carry(source: str, target: str) -> None:
    """Give a file of a table a second name, without its bytes; descriptions, which are written in place, are copied."""
    if not source.endswith(".json"):
        # Some disks know no links, and some files may not be linked to.
        with suppress(OSError):
            return os.link(os.path.realpath(source), target)
    shutil.copy2(source, target)


class TableExtender:
    """Writes a new table from an old one and further columns, given block by block in the order of the rows.

    Columns of a name that is there already are replaced; everything else, outlines included, is carried over unread,
    as links to the same files where the disk knows links. The result is of the newest schema version; it takes the
    old table's place, or stands at `path`.
    """

    def __init__(self, table: CellTable, path: Path | None = None) -> None:
        self.table = table
        self.staging = Staging(path or table.path)
        try:
            shutil.copytree(table.path, self.staging.folder, copy_function=_carry)
            root = zarr.open_group(self.staging.folder, mode="r+", zarr_format=3, use_consolidated=False)
            group: Any = root["tables/cells"]
            self.group: zarr.Group = group
            if table.version < SCHEMA_VERSION:
                self._renew()
        except BaseException:
            self.staging.abort()  # a half copy would stay on the disk that it has filled
            raise
        self.columns = ColumnWriter(group)

    def _renew(self) -> None:
        """Write the columns that mean something else by now."""
        table, writer = self.table, ColumnWriter(self.group)
        for start in range(0, max(table.n, 1), BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, table.n)
            writer.append(Columns({name: table.column(name, start, stop) for name in CHANGED}))
        writer.close()
        mark_frame(self.group.require_group("obs"), table.columns)
        write_schema(self.group, table.classes)

    def append(self, block: Columns) -> None:
        """Add the new columns of the next rows."""
        with _readable(self.table.path, "a column is damaged"):
            self.columns.append(block)

    def close(self, run: RunRecord, classes: Sequence[ClassSpec] | None = None) -> None:
        """Finish and rename into place; `classes` replaces the class names and colours.

        Raises TableError where the blocks do not add up to the rows of the table.
        """
        if self.columns.arrays and self.columns.n != self.table.n:
            raise TableError(f"{self.columns.n} rows of new columns for {self.table.n} cells in {self.table.path}")
        with _readable(self.table.path, "a column is damaged"):
            if self.columns.arrays:
                self.columns.close()
            if classes is not None:
                write_schema(self.group, classes)
            write_word(self.group, "uns/run", json.dumps(record.to_dict(run)))
        if self.staging.path == self.table.path:
            self.table.close()
        self.staging.publish()

    def abort(self) -> None:
        """Remove what was written; the old table stays."""
        self.staging.abort()
