"""The cell table as GeoJSON that QuPath 0.4 to 0.7 reads: one detection per nucleus, streamed by blocks of cells.

What QuPath demands and this keeps: rings closed and valid on its grid of 0.01 px (one bad ring costs the whole file),
UUIDs as `id`, a colour with every class, measurements finite numbers. Its reader holds a whole file, or zip entry, as
a tree in memory (about 1 GB per 100,000 cells), hence the entries of at most 50,000.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from cellslide.geometry.outlines import GRID_PX, ring_areas, sure_rings, valid_rings
from cellslide.store.anndata_columns import Columns
from cellslide.store.atomic import beside
from cellslide.store.cell_table import CellChunk, CellTable
from cellslide.store.shapes import close_rings
from cellslide.types import Float64, Int64, take_rings

Origin = Literal["bounds", "level0"]
Profile = Literal["lean", "full"]

ENTRY_CELLS = 50_000
BLOCK_CELLS = 5_000
COMPRESSION, ISAL_LEVEL = 4, 2
# What zlib calls window bits: with the head of a gzip file, whose date stays 0, or bare, as in a zip.
GZIP_BITS, ZIP_BITS = 31, -15
SMALLEST_PX2 = 0.25
LARGEST_PX = 99_999_999
# The parts of a feature: id, coordinates, class, measurements.
_FEATURE = (
    b',\n{"type":"Feature","id":%%b,"geometry":{"type":%b},"properties":'
    b'{"objectType":"detection",%%b"measurements":{%%b}}}'
)
_POINT, _POLYGON = (_FEATURE % kind for kind in (b'"Point","coordinates":%b', b'"Polygon","coordinates":[[%b]]'))
GZ_NAME, ZIP_NAME = "cells.geojson.gz", "cells.geojson.zip"
LEAN_OBS, FULL_OBS = ("gate",), ("gate", "abstained", "projected_prob", "mass_lost")
PROBABILITIES = {"prob": "prob", "prob_local": "prob local", "prob_global": "prob global"}


def write_geojson(table: CellTable, out_dir: Path, origin: Origin = "bounds", profile: Profile = "lean") -> Path:
    """Write `cells.geojson.gz`, or `cells.geojson.zip` above ENTRY_CELLS cells, and remove the other; returns its path.

    `origin` "bounds" subtracts the corner of the slide's bounds, as QuPath shows it; "level0" keeps level-0 pixels.
    """
    big = len(table) > ENTRY_CELLS
    target, stale = (out_dir / name for name in ((ZIP_NAME, GZ_NAME) if big else (GZ_NAME, ZIP_NAME)))
    with beside(target) as scratch:
        (_write_zip if big else _write_gz)(scratch, _Layout.of(table, origin, profile), table)
    stale.unlink(missing_ok=True)
    return target


@dataclass(frozen=True, slots=True)
class _Layout:
    """What every feature of one file has in common; `shift_px` is subtracted from level-0 pixels."""

    shift_px: Float64
    classes: tuple[dict[str, Any], ...]
    class_names: tuple[str, ...]
    obs: tuple[str, ...]
    obsm: tuple[str, ...] = ()
    features: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, table: CellTable, origin: Origin, profile: Profile) -> _Layout:
        bounds = table.slide.bounds if origin == "bounds" else None
        colored = zip(table.decisions, table.decision_colors, strict=True)
        classes = tuple({"name": name, "color": list(color)} for name, color in colored)
        full = profile == "full"
        return cls(
            np.array(bounds[:2] if bounds else (0, 0), np.float64),
            classes,
            table.class_names,
            tuple(name for name in (FULL_OBS if full else LEAN_OBS) if name in table.columns),
            tuple(name for name in PROBABILITIES if full and name in table.matrices),
            table.features if full else (),
        )


def _write_gz(path: Path, layout: _Layout, table: CellTable) -> None:
    with path.open("wb") as stream:
        squeeze = _compressor(GZIP_BITS)
        _write_collection(lambda text: stream.write(squeeze.compress(text)), _texts(table, layout))
        stream.write(squeeze.flush())


def _write_zip(path: Path, layout: _Layout, table: CellTable) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION) as archive:
        texts = _texts(table, layout)
        for part in range(-(-len(table) // ENTRY_CELLS)):
            # Opened by name, an entry is dated 1980, so that a rerun gives the same bytes.
            with archive.open(f"cells-{part:03d}.geojson", "w") as stream:
                stream._compressor = _compressor(ZIP_BITS)  # type: ignore[attr-defined]  # it knows but its own
                _write_collection(stream.write, _first(texts, ENTRY_CELLS // BLOCK_CELLS))


def _compressor(window_bits: int) -> Any:
    """Return what compresses a stream: ISA-L where there is one, several times faster at the same size, else zlib."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.compressobj(COMPRESSION, zlib.DEFLATED, window_bits)
    return isal_zlib.compressobj(ISAL_LEVEL, isal_zlib.DEFLATED, window_bits)


def _first(texts: Iterator[bytes], n: int) -> Iterator[bytes]:
    for _, text in zip(range(n), texts, strict=False):
        yield text


def _write_collection(write: Callable[[bytes], object], texts: Iterator[bytes]) -> None:
    opening = b'{"type":"FeatureCollection","features":[\n'
    for text in texts:
        # Every feature begins with the comma that parts it from the one before. A few bytes on their own at the start
        # would cost ISA-L its grip on the rest.
        write(opening + text[2:] if opening else text)
        opening = b""
    write(opening + b"\n]}\n")


def _texts(table: CellTable, layout: _Layout) -> Iterator[bytes]:
    """Yield the features by BLOCK_CELLS."""
    features = bool(layout.features)
    for chunk in table.iter_chunks(
        BLOCK_CELLS, obs=layout.obs, obsm=layout.obsm, features=features, probabilities=False
    ):
        yield _features(chunk, layout)


def _features(chunk: CellChunk, layout: _Layout) -> bytes:
    """Return the features of a chunk, each as `,\\n{...}`.

    orjson writes whole columns, which are cut into the texts of features: an object a feature takes longer.
    """
    kinds = [b'"classification":%b,' % orjson.dumps(kind) for kind in layout.classes]
    rows = zip(
        map(orjson.dumps, chunk.uuid.tolist()),
        _coordinates(chunk, layout),
        ((kinds[k] if k >= 0 else b"") for k in chunk.class_index.tolist()),
        _measured(chunk, layout),
        strict=True,
    )
    feature = _POINT if chunk.cells.contour_xy is None else _POLYGON
    return b"".join([feature % row for row in rows])


def _coordinates(chunk: CellChunk, layout: _Layout) -> list[bytes]:
    """Return a valid closed ring for each cell, or its centroid; raises ValueError for a place that no slide has."""
    cells = chunk.cells
    centroid_xy = cells.centroid_xy - layout.shift_px
    if cells.contour_xy is None or cells.contour_start is None:
        return _point_texts(_cents(centroid_xy), np.arange(len(chunk) + 1))
    cents, start = _ring_cents(cells.contour_xy - layout.shift_px, cells.contour_start, centroid_xy)
    return _point_texts(*close_rings(cents, start))


def _point_texts(cents: Int64, start: Int64) -> list[bytes]:
    """Return points [start[i], start[i + 1]) of (P, 2), in hundredths, as `[x,y],[x,y]`."""
    text = orjson.dumps(_pixels(cents), option=orjson.OPT_SERIALIZE_NUMPY)
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("]")) + 1
    # Between two points stands a comma; before the first a bracket.
    first, stop = np.concatenate([[1], ends[:-1] + 1])[start[:-1]].tolist(), ends[start[1:] - 1].tolist()
    return [text[a:b] for a, b in zip(first, stop, strict=True)]


def _pixels(cents: Int64) -> Float64:
    if cents.size and np.abs(cents).max() > LARGEST_PX * 100:
        raise ValueError(f"{np.abs(cents).max() // 100} is too large to be a pixel coordinate")
    return cents / 100


def _cents(xy: Float64) -> Int64:
    return np.rint(xy * 100).astype(np.int64)


def _ring_cents(xy: Float64, start: Int64, centroid_xy: Float64) -> tuple[Int64, Int64]:
    """Return valid open rings in hundredths of a pixel."""
    cents = np.rint(xy / GRID_PX).astype(np.int64)
    sure = sure_rings(cents, start, SMALLEST_PX2)
    if sure.all():
        return cents, start
    rest = np.flatnonzero(~sure)
    mended, mended_start = _mended_cents(*take_rings(xy, start, rest), centroid_xy[rest])
    # The rings that are sure, then the others, picked in their order.
    order = np.arange(len(sure))
    order[rest] = len(sure) + np.arange(len(rest))
    return take_rings(np.concatenate([cents, mended]), np.concatenate([start, start[-1] + mended_start[1:]]), order)


def _mended_cents(xy: Float64, start: Int64, centroid_xy: Float64) -> tuple[Int64, Int64]:
    """Return valid open rings in hundredths of a pixel; a ring of next to no area becomes a pixel about its centroid.

    A valid ring of ordinary size stays one polygon when QuPath snaps it to the same grid, slivers need not.
    """
    rings, ring_start, alive = valid_rings(xy, start)
    alive &= ring_areas(rings, ring_start) >= SMALLEST_PX2
    if not alive.all():
        parts = np.split(rings, ring_start[1:-1])
        for i in np.flatnonzero(~alive):
            parts[i] = np.round(centroid_xy[i], 2) + [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]
        rings = np.concatenate(parts)
        ring_start = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return _cents(rings), ring_start


def _measured(chunk: CellChunk, layout: _Layout) -> list[bytes]:
    """Return the measurements of each cell; a value that is not finite is left out, since JSON does not know it."""
    # Adding zero makes -0 to 0.
    columns = {name: np.round(values, places) + 0.0 for name, values, places in _measurements(chunk, layout)}
    keys = [orjson.dumps(name) + b":" for name in columns]
    rows = list(zip(*map(_number_texts, columns.values()), strict=True))
    whole = b",".join(key.replace(b"%", b"%%") + b"%b" for key in keys)
    found = [whole % row for row in rows]
    gaps = ~np.isfinite(np.stack([*columns.values()]))
    for i in np.flatnonzero(gaps.any(axis=0)).tolist():
        found[i] = b",".join(key + value for key, value in zip(keys, rows[i], strict=True) if value != b"null")
    return found


def _number_texts(values: Float64) -> list[bytes]:
    """Return numbers (N,) as JSON, `null` for one that is not finite."""
    return orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")


def _measurements(chunk: CellChunk, layout: _Layout) -> Iterator[tuple[str, Float64, int]]:
    """Yield name, values (N,) and decimals."""
    yield "probability", chunk.class_prob.astype(np.float64), 4
    yield "score", chunk.cells.score.astype(np.float64), 4
    if chunk.cells.contour_xy is not None:  # A point has no area, and 0 would say that it is known.
        yield "area µm²", chunk.cells.area_um2.astype(np.float64), 2
    for name in layout.obs:
        values = chunk.columns.obs[name]
        if isinstance(values, np.ndarray):
            yield name, values.astype(np.float64), 4
    yield from _wide(chunk.columns, layout)


def _wide(columns: Columns, layout: _Layout) -> Iterator[tuple[str, Float64, int]]:
    for name in layout.obsm:
        for k, word in enumerate(layout.class_names):
            yield f"{PROBABILITIES[name]}: {word}", columns.obsm[name][:, k].astype(np.float64), 4
    if columns.x is not None:
        for k, name in enumerate(layout.features):
            if name != "area_um2":
                yield name.replace("_um", " µm").replace("_", " "), columns.x[:, k].astype(np.float64), 4
