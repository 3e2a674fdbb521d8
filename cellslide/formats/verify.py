"""Whether what lies in a slide's folder agrees: record, table, GeoJSON, parquet and CSV, row by row; the slide's hash.

Nothing is written. Each file is read once in blocks of rows and compared with what the table would give, so memory does
not grow with the slide. What differs is said in words; what is merely not there is no fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from cellslide.errors import UsageError, one_line, short
from cellslide.formats.arrow_files import CSV_NAME, PARQUET_NAME, arrow_blocks
from cellslide.formats.geojson import GZ_NAME, PROBABILITIES, ZIP_NAME, Profile
from cellslide.formats.verify_geojson import compare_geojson
from cellslide.slides.identity import is_slide
from cellslide.store.cell_table import BLOCK_ROWS, CellTable, open_table
from cellslide.store.file_list import changed_bytes
from cellslide.store.foreign_files import is_plain
from cellslide.store.lock import who_works
from cellslide.store.run_record import RUN_FILE, TABLE, differences, flatten, read_record, to_dict
from cellslide.store.table_schema import NOT_NUCLEUS, SCHEMA_VERSION
from cellslide.store.uuids import SeenPlaces, make_uuids, pack_places
from cellslide.types import RunRecord

COMPLETE = ("done", "done_with_errors")
# Of the record in the table and that in run.json: times and memory are written last, formats may be written again, and
# vectors may lie beside the table.
COMPARED = ("cellslide_version", "slide", "config", "weights", "seed", "started", "counts")
NOT_COMPARED = ("config.embed.", "config.output.")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(slots=True)
class Verdict:
    """What was found in one folder: files that were read, where they differ, and what else is worth knowing.

    running  who works there now: what is half written is not looked at.
    """

    folder: Path
    cells: int | None = None
    running: str | None = None
    checked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return not self.faults

    def read(self, name: str, compare: Callable[[], Iterator[str]]) -> None:
        """Note a file and where it differs; one that cannot be read differs too."""
        self.checked.append(name)
        try:
            self.faults += [f"{name}: {words}" for words in compare()]
        except Exception as error:  # Libraries raise what they like on a damaged file.
            self.faults.append(f"{name}: cannot be read ({one_line(f'{type(error).__name__}: {error}')[:200]})")


def find_folders(paths: Sequence[Path]) -> list[Path]:
    """Return the slides' folders that `paths` are, or hold one level below, once each, in a fixed order.

    Raises UsageError naming the first path that has none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        here = [path] if _is_slide_folder(path) else sorted(p for p in path.glob("*") if _is_slide_folder(p))
        if not here:
            raise UsageError(f"{path}: no folder of a slide here or one level below; `cellslide segment -o` makes them")
        found.update(dict.fromkeys(here))
    return list(found)


def _is_slide_folder(path: Path) -> bool:
    return (path / RUN_FILE).is_file() or (path / TABLE / "zarr.json").is_file()


def verify_folder(folder: Path) -> Verdict:
    """Compare all that lies in a slide's folder; whatever is wrong is in the verdict, nothing is raised."""
    verdict, records = Verdict(folder, running=who_works(folder)), list[RunRecord]()
    if verdict.running is not None:
        verdict.notes.append(f"a run works here now ({verdict.running}); look again when it has ended")
        return verdict
    if (folder / RUN_FILE).is_file():
        verdict.read(RUN_FILE, lambda: _record_faults(folder, records))
    else:
        verdict.faults.append(f"{RUN_FILE}: missing")
    record = records[0] if records else None
    verdict.notes += _notes(folder, record)
    if record is not None and is_plain(Path(record.slide["path"])):
        verdict.read("the slide", lambda: _slide_faults(record))
    try:
        # What is compared with the table, row by row, may have been exported anew since.
        words = changed_bytes(folder, (GZ_NAME, ZIP_NAME, PARQUET_NAME, CSV_NAME))
        verdict.faults += [f"{RUN_FILE} lists another {line}" for line in words]
    except OSError as error:
        verdict.faults.append(f"{RUN_FILE}: what it lists cannot be read ({short(error)})")
    try:
        table = open_table(folder / TABLE)
    except Exception as error:  # zarr and json raise what they like on a damaged store.
        verdict.faults.append(f"{TABLE}: cannot be read ({one_line(f'{type(error).__name__}: {error}')[:200]})")
        return verdict
    with table:
        verdict.cells = len(table)
        if table.version < SCHEMA_VERSION:
            # What lies beside it says otherwise what a class is; no file can be compared with another.
            verdict.faults.append(
                f"{TABLE}: of schema version {table.version}, where a class is not the decision; the same command "
                f"again, or `cellslide export {folder}`, brings it up to date"
            )
            return verdict
        verdict.read(TABLE, lambda: _table_faults(table, record))
        _read_files(folder, table, verdict)
    return verdict


def _read_files(folder: Path, table: CellTable, verdict: Verdict) -> None:
    packed = [name for name in (GZ_NAME, ZIP_NAME) if (folder / name).is_file()]
    for name in packed:
        verdict.read(name, lambda name=name: compare_geojson(folder / name, table))  # type: ignore[misc]
    if len(packed) > 1:
        verdict.faults.append(f"{GZ_NAME} and {ZIP_NAME}: one of them is left from an earlier run")
    if (folder / PARQUET_NAME).is_file():
        verdict.read(PARQUET_NAME, lambda: _compare_parquet(folder / PARQUET_NAME, table))
    if (folder / CSV_NAME).is_file():
        verdict.read(CSV_NAME, lambda: _compare_csv(folder / CSV_NAME, table))


def _record_faults(folder: Path, found: list[RunRecord]) -> Iterator[str]:
    """Read the record into `found`; yield what it does not say, and that it is not complete."""
    record = read_record(folder)
    if record is None:
        return
    found.append(record)
    if record.status not in COMPLETE:
        yield f"the run is not complete (status {record.status}{f', {record.error}' if record.error else ''})"
    for name in ("cellslide_version", "device", "engine", "precision", "started"):
        if not getattr(record, name):
            yield f"says no {name}"
    for weights in record.weights:
        if not _SHA256.fullmatch(weights.sha256):
            yield f"weights {weights.id} have no hash"
    failed = record.counts.tiles_failed + record.counts.tiles_missing
    if failed != len(record.failed_tiles):
        yield f"{failed} tiles failed or are missing, {len(record.failed_tiles)} are listed"


def _slide_faults(record: RunRecord) -> Iterator[str]:
    path, known = Path(record.slide["path"]), record.slide.get("sha256_head")
    if known is not None and not is_slide(path, known):
        yield f"{path}: another slide than the one that was read, by size or content"


def _notes(folder: Path, record: RunRecord | None) -> Iterator[str]:
    if record is not None:
        if not is_plain(Path(record.slide["path"])):
            yield f"the slide {record.slide['path']} is not here, so its hash was not checked"
        if record.counts.tiles_failed:
            yield f"{record.counts.tiles_failed} of {record.counts.tiles} tiles failed"
        if record.counts.tiles_missing:
            yield f"{record.counts.tiles_missing} tiles inside the tissue are missing in the slide's file"
    for path in sorted((*folder.glob("*.tmp-*"), *folder.glob(".*.tmp"))):
        yield f"{path.name} was left by a run that was killed"


def _table_faults(table: CellTable, record: RunRecord | None) -> Iterator[str]:
    n = len(table)
    if record is not None:
        counted = record.counts.nuclei + record.counts.rejected
        if counted != n:
            yield f"{n} objects, {RUN_FILE} says {counted}"
        kept, said = (_compared(r) for r in (table.run, record))
        if words := differences(kept, said):
            yield f"its record is not {RUN_FILE}: {words}"
    lengths = {name: _length(table, f"obs/{name}") for name in table.columns}
    lengths |= {f"obsm/{name}": _length(table, f"obsm/{name}") for name in table.matrices}
    for name, length in lengths.items():
        if length != n:
            yield f"{name} has {length} rows, expected {n}"
    yield from _row_faults(table)


def _compared(record: RunRecord) -> dict[str, str]:
    content = to_dict(record)
    flat = flatten({name: content[name] for name in COMPARED})
    return {key: value for key, value in flat.items() if not key.startswith(NOT_COMPARED)}


def _length(table: CellTable, path: str) -> int:
    node = table.group[path]
    column: Any = node["codes"] if isinstance(node, zarr.Group) else node
    return int(column.shape[0])


def _row_faults(table: CellTable) -> Iterator[str]:
    """Yield what is wrong in the rows: ids, places, classes, probabilities; and UUIDs that do not fit their places."""
    wrong = dict.fromkeys(("cell_id", "x, y", "class", "class_top", "is_nucleus", "class_prob", "prob", "uuid"), 0)
    ids = set[str]()
    blocks = range(0, len(table), BLOCK_ROWS)
    seen = SeenPlaces(table.vector("y", first, min(first + BLOCK_ROWS, len(table))) for first in blocks)
    key, size = _uuid_key(table), (table.slide.width_px, table.slide.height_px)
    for start in blocks:
        stop = min(start + BLOCK_ROWS, len(table))
        xy = np.stack([table.vector(name, start, stop) for name in ("x", "y")], axis=1)
        uuid = table.vector("uuid", start, stop)
        ids.update(uuid.tolist())
        wrong["cell_id"] += int((table.vector("cell_id", start, stop) != np.arange(start, stop)).sum())
        wrong["x, y"] += int((~((xy >= 0) & (xy <= size)).all(axis=1)).sum())
        for name, count in _bad_classes(table, start, stop).items():
            wrong[name] += count
        wrong["class_prob"] += _bad_share(table.vector("class_prob", start, stop))
        if "prob" in table.matrices:
            sums = table.matrix("prob", start, stop).sum(axis=1)
            wrong["prob"] += int((np.abs(sums[np.isfinite(sums)] - 1) > 1e-3).sum())
        if key is not None:
            place = pack_places(xy[:, 0], xy[:, 1])
            wrong["uuid"] += int((uuid != make_uuids(key, place, seen.repeats(place)).astype(str)).sum())
    yield from (f"{name} cannot be right in {count} rows" for name, count in wrong.items() if count)
    if len(ids) != len(table):
        yield f"{len(table) - len(ids)} UUIDs are given twice"


def _uuid_key(table: CellTable) -> str | None:
    """Return what the UUIDs were made from, None where they came with another tool's nuclei or are of version 5.

    Tables written before version 8 keep the ids that they have.
    """
    sha256 = table.run.config.get("spec", {}).get("weights_sha256")
    if sha256 is None or "source_id" in table.columns:
        return None
    if len(table) and UUID(str(table.vector("uuid", 0, 1)[0])).version == 5:
        return None
    return f"{table.run.slide.get('sha256_head') or table.slide.slide_id}/{sha256}"


def _bad_classes(table: CellTable, start: int, stop: int) -> dict[str, int]:
    """Return in how many rows the decision, the most probable class, or the mark of a rejected object cannot be."""
    k, (decision, top) = len(table.class_names), (table.codes(name, start, stop) for name in ("class", "class_top"))
    abstained = decision == k
    if "abstained" in table.columns:
        abstained = np.asarray(table.vector("abstained", start, stop), np.bool_)
    rejected = decision == (table.class_names.index(NOT_NUCLEUS) if NOT_NUCLEUS in table.class_names else k + 1)
    is_nucleus = np.asarray(table.vector("is_nucleus", start, stop), np.bool_)
    return {
        "class": int((decision != np.where(abstained, k, top)).sum()),
        "class_top": int(((top < -1) | (top >= k)).sum()),
        "is_nucleus": int((is_nucleus == rejected).sum()),
    }


def _bad_share(values: NDArray[Any]) -> int:
    known = values[~np.isnan(values)]
    return int(((known < 0) | (known > 1)).sum())


def _compare_parquet(path: Path, table: CellTable) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        names = list(file.schema_arrow.names)
        batches = (pa.Table.from_batches([batch]) for batch in file.iter_batches(BLOCK_ROWS))
        yield from _compare_rows(table, names, batches, geometry=True)


def _compare_csv(path: Path, table: CellTable) -> Iterator[str]:
    with pa_csv.open_csv(path) as file:
        names = list(file.schema.names)
    expected = next(arrow_blocks(table, text=True, profile=_profile(table, names))).schema
    types = {name: expected.field(name).type for name in names if name in expected.names}
    convert = pa_csv.ConvertOptions(column_types=types, null_values=[""])
    with pa_csv.open_csv(path, convert_options=convert) as file:
        batches = (pa.Table.from_batches([batch]) for batch in file)
        yield from _compare_rows(table, names, batches, geometry=False)


def _compare_rows(table: CellTable, names: list[str], batches: Iterator[pa.Table], geometry: bool) -> Iterator[str]:
    """Yield where the rows of a file are not those that the table gives; `names` are its columns."""
    rows, wrong = _Rows(batches), dict[str, int]()
    for block in arrow_blocks(table, geometry=geometry, text=not geometry, profile=_profile(table, names)):
        if block.column_names != names:
            yield "its columns are not those of the table; export it again"
            return
        there = rows.take(block.num_rows)
        if there.num_rows != block.num_rows:
            break
        for name in names if block.num_rows else ():
            wrong[name] = wrong.get(name, 0) + _unequal(block.column(name), there.column(name))
    rows.drain()
    if rows.n != len(table):
        yield f"{rows.n} rows, {TABLE} has {len(table)}"
    yield from (f"{name} differs in {count} rows from {TABLE}" for name, count in wrong.items() if count)


def _profile(table: CellTable, names: list[str]) -> Profile:
    """Return the profile that a file with these columns was written with."""
    full = tuple(f"{word}: " for key, word in PROBABILITIES.items() if key in table.matrices)
    return "full" if any(name.startswith(full) for name in names) else "lean"


class _Rows:
    """Rows of a file, taken in other steps than those in which they come; `n` were met so far."""

    def __init__(self, batches: Iterator[pa.Table]) -> None:
        self.batches, self.n = batches, 0
        self.held: pa.Table | None = None

    def take(self, count: int) -> pa.Table:
        """Return the next rows, fewer at the end of the file."""
        while self.held is None or self.held.num_rows < count:
            batch = next(self.batches, None)
            if batch is None:
                break
            self.n += batch.num_rows
            self.held = batch if self.held is None else pa.concat_tables([self.held, batch])
        held = pa.table({}) if self.held is None else self.held
        self.held = None if self.held is None else held.slice(count)
        return held.slice(0, count)

    def drain(self) -> None:
        """Count what is left."""
        self.n += sum(batch.num_rows for batch in self.batches)


def _unequal(expected: Any, found: Any) -> int:
    """Return in how many rows two columns differ; a missing text is an empty one, NaN equals NaN."""
    a, b = (_decoded(column) for column in (expected, found))
    if pa.types.is_floating(a.type):
        x, y = (np.asarray(column.to_numpy(), np.float64) for column in (a, b))
        return int((~((x == y) | (np.isnan(x) & np.isnan(y)))).sum())
    if a.type != b.type:
        b = b.cast(a.type)
    if pa.types.is_string(a.type):
        a, b = (pc.fill_null(column, "") for column in (a, b))
    return int(pc.sum(pc.fill_null(pc.not_equal(a, b), True)).as_py() or 0)


def _decoded(column: Any) -> Any:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
