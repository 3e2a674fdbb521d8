"""A Xenium bundle on disk: its manifest, transcripts in blocks of bounded memory, cells and nuclei.

All places are µm. The columns of all versions are read alike: ids as numbers or as text, text as text, bytes or
dictionaries; parquet, CSV and gzipped CSV. Conventions of files: spatialdata-io's reader of Xenium output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from cellslide.errors import UsageError, short
from cellslide.store.foreign_files import read_json
from cellslide.types import Bool, Float32, Float64, Int32, Int64

BATCH_ROWS = 1 << 18
MANIFEST = "experiment.xenium"
ENDINGS = (".parquet", ".csv.gz", ".csv")
LEAST_QV = 20.0
UNASSIGNED = -1
_CONTROL = re.compile(
    r"(negcontrol|antisense_|blank_|unassignedcodeword_|deprecatedcodeword_|intergenic_region_)", re.IGNORECASE
)
_TEXT_ID = re.compile(r"([a-p]{1,8})-(\d{1,9})")
_SUFFIX_BITS = 31
_HEX = str.maketrans("abcdefghijklmnop", "0123456789abcdef")
_LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")


@dataclass(frozen=True, slots=True)
class Transcripts:
    """Some rows of the transcripts, in the order of the file; N rows.

    x_um, y_um  float64 (N,).
    gene        int32 (N,), an index into `Bundle.genes`, -1 for a control.
    qv          float32 (N,), 0 to 40.
    cell        int64 (N,), the code of the cell's id (`id_code`), -1 where it lies in no cell.
    """

    x_um: Float64
    y_um: Float64
    gene: Int32
    qv: Float32
    cell: Int64

    def __len__(self) -> int:
        return len(self.x_um)

    def kept(self, least_qv: float = LEAST_QV, genes_only: bool = True) -> Bool:
        """Tell which rows count: of enough quality, and no controls."""
        good: Bool = self.qv >= least_qv
        return good & (self.gene >= 0) if genes_only else good


@dataclass(frozen=True, slots=True)
class XeniumCells:
    """The cells of a bundle as its table or its outlines give them; N rows.

    cell              int64 (N,), the code of the id.
    centroid_um       float64 (N, 2).
    nucleus_area_um2  float32 (N,), 0 for a cell without a nucleus, NaN where that is not told.
    """

    cell: Int64
    centroid_um: Float64
    nucleus_area_um2: Float32


@dataclass(frozen=True, slots=True)
class XeniumNuclei:
    """The nuclei of a bundle, (N,) codes of their cells and (N, 2) centroids in µm.

    merged  outlines left out because they join several nuclei of one cell.
    """

    cell: Int64
    centroid_um: Float64
    merged: int = 0


class Bundle:
    """An output folder of a Xenium run; nothing but its manifest is read until it is asked for.

    pixel_size  µm per pixel of the morphology image.
    version     of the analysis software, () where the manifest does not say.
    Raises UsageError where the folder is no such output.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder = folder.parent if folder.name == MANIFEST else folder
        path = folder / MANIFEST
        if not path.is_file():
            inside = folder / "outs"
            hint = f"; its output may be {inside}" if (inside / MANIFEST).is_file() else ""
            raise UsageError(f"{folder}: no Xenium bundle, it has no {MANIFEST}{hint}")
        manifest = read_json(path, UsageError)
        if not isinstance(manifest, dict):
            raise UsageError(f"{path}: no manifest of a Xenium run")
        self.manifest: dict[str, Any] = manifest
        self.pixel_size = _pixel_size(path, manifest)
        found = re.search(r"(\d+(?:\.\d+)+)", str(manifest.get("analysis_sw_version") or ""))
        self.version = tuple(int(part) for part in found[1].split(".")[:4]) if found else ()

    def file(self, stem: str) -> Path | None:
        """Return the file of this stem, parquet before CSV; None where there is none."""
        return next((p for ending in ENDINGS if (p := self.folder / f"{stem}{ending}").is_file()), None)

    @cached_property
    def transcripts_file(self) -> Path:
        """The file of transcripts; raises UsageError where there is none that is read."""
        found = self.file("transcripts")
        if found is None:
            packed = (self.folder / "transcripts.zarr.zip").is_file()
            more = " (transcripts.zarr.zip is the viewer's copy and is not read)" if packed else ""
            raise UsageError(f"{self.folder}: no transcripts.parquet, .csv.gz or .csv{more}")
        return found

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """The genes, sorted: those of the panel's file and those that occur, controls left out."""
        return tuple(sorted(self._panel | self._occurring))

    @cached_property
    def _panel(self) -> set[str]:
        path = self.folder / "gene_panel.json"
        if not path.is_file():
            return set()
        panel = read_json(path, UsageError)
        try:
            types = [target["type"] for target in panel["payload"]["targets"]]
            names = {str(kind["data"]["name"]) for kind in types if kind["descriptor"] == "gene"}
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path}: no gene panel ({short(error)})") from error
        return {name for name in names if not is_control(name)}

    @cached_property
    def _occurring(self) -> set[str]:
        """Stream the names once."""
        path = self.transcripts_file
        told = "is_gene" in column_names(path)
        wanted = ["feature_name", *(["is_gene"] if told else [])]
        found: set[str] = set()
        for batch in read_batches(path, wanted):
            name = _coded(batch.column("feature_name"), path)
            used = name.indices
            if told:
                used = used.filter(pc.fill_null(batch.column("is_gene").cast(pa.bool_()), False))
            names = name.dictionary.take(pc.unique(used)).to_pylist()
            found.update(names if told else (one for one in names if not is_control(one)))
        return found

    def transcripts(self) -> Iterator[Transcripts]:
        """Yield all transcripts in the order of the file, in blocks of bounded size; raises UsageError."""
        path = self.transcripts_file
        place = {name: k for k, name in enumerate(self.genes)}
        codes: dict[str, int] = {}
        columns = ["feature_name", "x_location", "y_location", "qv", "cell_id"]
        for batch in read_batches(path, columns):
            names = _coded(batch.column("feature_name"), path)
            table = np.array([place.get(name, -1) for name in names.dictionary.to_pylist()] + [-1], np.int32)
            yield Transcripts(
                numbers(batch, "x_location", path),
                numbers(batch, "y_location", path),
                table[np.asarray(pc.fill_null(names.indices, -1), np.int64)],
                numbers(batch, "qv", path).astype(np.float32),
                cell_codes(batch.column("cell_id"), path, codes),
            )
            if len(codes) > BATCH_ROWS:  # Neighbours share cells, so the cells of some blocks are enough.
                codes.clear()

    def cells(self) -> XeniumCells:
        """Return the cells of cells.parquet or .csv, else those of the cell boundaries."""
        path = self.file("cells")
        if path is None:
            rings = self._rings("cell_boundaries")
            if rings is None:
                raise UsageError(f"{self.folder}: neither cells.parquet or .csv nor cell_boundaries")
            return XeniumCells(rings.cell, rings.centroid_um, np.full(len(rings.cell), np.nan, np.float32))
        columns = column_names(path)
        told = "nucleus_area" in columns
        wanted = ["cell_id", "x_centroid", "y_centroid", *(["nucleus_area"] if told else [])]
        parts: list[tuple[Int64, Float64, Float32]] = []
        for batch in read_batches(path, wanted):
            xy = np.stack([numbers(batch, name, path) for name in wanted[1:3]], axis=1)
            area = np.nan_to_num(numbers(batch, "nucleus_area", path)) if told else np.full(len(xy), np.nan)
            parts.append((cell_codes(batch.column("cell_id"), path, {}), xy, area.astype(np.float32)))
        if not parts:
            return XeniumCells(np.empty(0, np.int64), np.empty((0, 2)), np.empty(0, np.float32))
        ids, xys, areas = zip(*parts, strict=True)
        return XeniumCells(np.concatenate(ids), np.concatenate(xys), np.concatenate(areas))

    def nuclei(self) -> XeniumNuclei:
        """Return the nuclei by their outlines; where there are none, the cells that have a nucleus."""
        found = self._rings("nucleus_boundaries")
        if found is not None:
            return found
        cells = self.cells()
        has = ~(cells.nucleus_area_um2 == 0)
        return XeniumNuclei(cells.cell[has], cells.centroid_um[has])

    def _rings(self, stem: str) -> XeniumNuclei | None:
        """Return the centroids of a table of vertices, whose rows of one outline stand together."""
        path = self.file(stem)
        if path is None:
            return None
        labelled = "label_id" in column_names(path)
        wanted = ["cell_id", "vertex_x", "vertex_y", *(["label_id"] if labelled else [])]
        cell, xy, label = [np.empty(0, np.int64)], [np.empty((0, 2))], [np.empty(0)]
        codes: dict[str, int] = {}
        for batch in read_batches(path, wanted):
            cell.append(cell_codes(batch.column("cell_id"), path, codes))
            xy.append(np.stack([numbers(batch, "vertex_x", path), numbers(batch, "vertex_y", path)], axis=1))
            label.append(numbers(batch, "label_id", path) if labelled else np.zeros(batch.num_rows))
        return _centroids(np.concatenate(cell), np.concatenate(label), np.concatenate(xy))


def _centroids(cell: Int64, label: Float64, xy: Float64) -> XeniumNuclei:
    """Return the centres of mass of closed rings; a ring that goes back to its start before its end joins several."""
    if not len(cell):
        return XeniumNuclei(cell, xy)
    first = np.flatnonzero(np.r_[True, (cell[1:] != cell[:-1]) | (label[1:] != label[:-1])])
    last = np.r_[first[1:], len(cell)] - 1
    follows = np.arange(len(cell)) + 1
    follows[last] = first
    ring = np.repeat(np.arange(len(first)), last - first + 1)
    # About its first vertex, since µm of a large slide cancel badly.
    here, there = xy - xy[first][ring], xy[follows] - xy[first][ring]
    cross = here[:, 0] * there[:, 1] - there[:, 0] * here[:, 1]
    area = np.add.reduceat(cross, first)
    moment = np.add.reduceat((here + there) * cross[:, None], first)
    mean = np.add.reduceat(here, first) / (last - first + 1)[:, None]
    flat = np.abs(area) < 1e-9
    centre = np.where(flat[:, None], mean, moment / np.where(flat, 1, 3 * area)[:, None])
    # Counted by how often it leaves its start: the last vertex may repeat it, more than once.
    leaves = (here == 0).all(axis=1) & (there != 0).any(axis=1)
    inner = np.add.reduceat(leaves.astype(np.int64), first) > 1
    return XeniumNuclei(cell[first][~inner], (centre + xy[first])[~inner], int(inner.sum()))


def is_control(name: str) -> bool:
    """Tell by its name whether a feature is a control and no gene."""
    return _CONTROL.match(name) is not None


def id_code(text: str) -> int:
    """Return the code of a cell's id, one int64 for both kinds: "67500", "aaaaficg-1"; -1 for no cell.

    The letters a to p are the digits of a number of 32 bits. Raises ValueError for another text.
    """
    if text in ("", "UNASSIGNED", "-1"):
        return UNASSIGNED
    if found := _TEXT_ID.fullmatch(text):
        return int(found[1].translate(_HEX), 16) << _SUFFIX_BITS | int(found[2])
    return int(text)


def id_text(code: int) -> str:
    """Return the id in words: that of a code of `id_code` (a number below 2^31 is its own id)."""
    if code < 1 << _SUFFIX_BITS:
        return str(code)
    return f"{code >> _SUFFIX_BITS:08x}".translate(_LETTERS) + f"-{code & ((1 << _SUFFIX_BITS) - 1)}"


def cell_codes(column: pa.Array, path: Path, known: dict[str, int]) -> Int64:
    """Return the codes of a column of ids, int64 (N,); `known` remembers those of earlier blocks."""
    if pa.types.is_integer(column.type):
        return np.asarray(pc.fill_null(column.cast(pa.int64()), UNASSIGNED), np.int64)
    coded = _coded(column, path)
    table = [UNASSIGNED]
    for text in coded.dictionary.to_pylist():
        if text not in known:
            try:
                known[text] = id_code(text)
            except ValueError:
                raise UsageError(f"{path}: cell_id {short(text)} is no id of a Xenium cell") from None
        table.append(known[text])
    return np.array(table, np.int64)[np.asarray(pc.fill_null(coded.indices, -1), np.int64) + 1]


def _coded(column: pa.Array, path: Path) -> pa.DictionaryArray:
    """Return a column of texts, bytes or dictionaries of either as dictionary of texts, with int64 indices."""
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column)
    try:
        words = column.dictionary.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise UsageError(f"{path}: names that are no text ({short(error)})") from error
    return pa.DictionaryArray.from_arrays(column.indices.cast(pa.int64()), words)


def numbers(batch: pa.RecordBatch, name: str, path: Path) -> Float64:
    """Return a column as float64 (N,), NaN for what is missing."""
    try:
        column = batch.column(name).cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise UsageError(f"{path}: {name} holds no numbers ({short(error)})") from error
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)


def column_names(path: Path) -> list[str]:
    """Return the names of the columns of a parquet or CSV file."""
    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        with pa_csv.open_csv(path, read_options=pa_csv.ReadOptions(block_size=1 << 16)) as stream:
            return list(stream.schema.names)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: cannot be read ({short(error)})") from error


def read_batches(path: Path, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the named columns of a parquet or CSV file in blocks; raises UsageError where one is missing or damaged."""
    missing = sorted(set(wanted) - set(column_names(path)))
    if missing:
        raise UsageError(f"{path}: no column {', '.join(missing)}")
    try:
        if path.suffix == ".parquet":
            # Buffered, so that a row group that holds the whole file is not read at once.
            with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                yield from file.iter_batches(BATCH_ROWS, columns=list(wanted), use_threads=False)
            return
        real = {"x_location", "y_location", "qv", "x_centroid", "y_centroid", "vertex_x", "vertex_y", "nucleus_area"}
        types = {name: pa.float64() if name in real else pa.string() for name in wanted}
        convert = pa_csv.ConvertOptions(include_columns=list(wanted), column_types=types, strings_can_be_null=False)
        with pa_csv.open_csv(path, convert_options=convert) as stream:
            yield from stream
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: cannot be read ({short(error)})") from error


def _pixel_size(path: Path, manifest: dict[str, Any]) -> float:
    try:
        size = float(manifest["pixel_size"])
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path}: no pixel_size") from None
    if not 0.01 <= size <= 10:
        raise UsageError(f"{path}: pixel_size {size:g} µm is that of no microscope")
    return size
