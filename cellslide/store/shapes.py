"""Outlines as GeoParquet inside a SpatialData store: written and read as flat rings, never one object per cell.

Rings are flat pairs: `xy` float64 (P, 2) open rings one after another in level-0 pixels, `start` int64 (N + 1,).
Layout: GeoParquet 1.1, WKB, no coordinate system; SpatialData container 0.2, shapes 0.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from cellslide.geometry import kernels
from cellslide.geometry.columns import slice_rows
from cellslide.store.anndata_columns import TableError, write_mapping
from cellslide.types import Bool, Cells, Float64, Int64, UInt8

MICROMETRES = "micrometres"
ROW_GROUP, STREAM_ROWS = 25_000, 5_000
POLYGON_HEADER = np.frombuffer(b"\x01\x03\x00\x00\x00\x01\x00\x00\x00", np.uint8)
POINT_HEADER = np.frombuffer(b"\x01\x01\x00\x00\x00", np.uint8)
HEADER_BYTES = 13  # byte order, type, number of rings, number of points
NOT_OURS = "shapes.parquet holds more than polygons of one ring; it was not written by cellslide"


def box_rings(box_xyxy: Float64) -> tuple[Float64, Int64]:
    """Return boxes (N, 4) as rectangles of four vertices."""
    x0, y0, x1, y1 = np.asarray(box_xyxy, np.float64).T
    xy = np.stack([x0, y0, x1, y0, x1, y1, x0, y1], axis=1).reshape(-1, 2)
    return xy, np.arange(len(box_xyxy) + 1, dtype=np.int64) * 4


def cell_rings(cells: Cells) -> tuple[Float64, Int64] | None:
    """Return the outlines of `cells`, rectangles for boxes, or None for points."""
    if cells.contour_xy is not None and cells.contour_start is not None:
        return cells.contour_xy, cells.contour_start
    return None if cells.box_xyxy is None else box_rings(cells.box_xyxy)


def ring_boxes(xy: Float64, start: Int64) -> Float64:
    """Return the bounding boxes xyxy (N, 4) of rings that have at least one vertex."""
    if len(start) == 1:
        return np.empty((0, 4))
    low, high = (f.reduceat(xy, start[:-1], axis=0) for f in (np.minimum, np.maximum))
    return np.concatenate([low, high], axis=1)


def check_rings(start: Int64) -> None:
    """Raise TableError for a ring with no vertex."""
    if len(start) > 1 and np.diff(start).min() < 1:
        raise TableError("a nucleus has an empty outline")


def close_rings(xy: NDArray[Any], start: Int64) -> tuple[NDArray[Any], Int64]:
    """Return the rings with each first vertex repeated at the end; raises TableError for a ring with no vertex."""
    check_rings(start)
    n = len(start) - 1
    closed_start = start + np.arange(n + 1)
    source = np.arange(closed_start[-1]) - np.repeat(np.arange(n), np.diff(closed_start))
    source[closed_start[1:] - 1] = start[:-1]
    return xy[source], closed_start


def polygons_to_wkb(xy: Float64, start: Int64) -> pa.Array:
    """Return rings as an arrow column of WKB polygons."""
    if kernels.available():
        from cellslide.geometry.ring_kernels import write_wkb

        check_rings(start)
        ends = np.concatenate([[0], np.cumsum(HEADER_BYTES + 16 * (np.diff(start) + 1))]).astype(np.int64)
        points = np.ascontiguousarray(xy, "<f8").view(np.uint8).ravel()
        return _binary(ends.astype(np.int32), write_wkb(points, start, POLYGON_HEADER, ends))
    return _polygons_to_wkb_plain(xy, start)


def _polygons_to_wkb_plain(xy: Float64, start: Int64) -> pa.Array:
    closed, closed_start = close_rings(np.asarray(xy, np.float64), start)
    counts = np.diff(closed_start)
    offsets = np.concatenate([[0], np.cumsum(HEADER_BYTES + 16 * counts)]).astype(np.int32)
    header = np.empty((len(counts), HEADER_BYTES), np.uint8)
    header[:, :9] = POLYGON_HEADER
    header[:, 9:] = counts.astype("<u4")[:, None].view(np.uint8)
    data = np.empty(offsets[-1], np.uint8)
    is_header = _header_mask(offsets)
    data[is_header] = header.ravel()
    data[~is_header] = closed.astype("<f8").view(np.uint8).ravel()
    return _binary(offsets, data)


def points_to_wkb(xy: Float64) -> pa.Array:
    """Return points (N, 2) as an arrow column of WKB points."""
    data = np.empty((len(xy), 21), np.uint8)
    data[:, :5] = POINT_HEADER
    data[:, 5:] = np.ascontiguousarray(xy, "<f8").view(np.uint8).reshape(-1, 16)
    return _binary(np.arange(len(xy) + 1, dtype=np.int32) * 21, data.ravel())


def polygons_from_wkb(column: pa.Array) -> tuple[Float64, Int64]:
    """Return flat open rings from WKB polygons of one ring; raises TableError for anything else."""
    n = len(column)
    if n == 0:
        return np.empty((0, 2)), np.zeros(1, np.int64)
    _, offset_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[column.offset : column.offset + n + 1]
    data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    if kernels.available():
        return _read_compiled(data, offsets)
    return _read_plain(data, offsets)


def _read_compiled(data: UInt8, offsets: NDArray[np.int32]) -> tuple[Float64, Int64]:
    from cellslide.geometry.ring_kernels import read_wkb

    counts = (np.diff(offsets) - HEADER_BYTES) // 16 - 1
    if (counts < 0).any() or (np.diff(offsets) != HEADER_BYTES + 16 * (counts + 1)).any():
        raise TableError(NOT_OURS)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    points = read_wkb(data, offsets, POLYGON_HEADER, start)
    if len(points) != 16 * start[-1]:
        raise TableError(NOT_OURS)
    return points.view("<f8").reshape(-1, 2).astype(np.float64, copy=False), start


def _read_plain(data: UInt8, offsets: NDArray[np.int32]) -> tuple[Float64, Int64]:
    n = len(offsets) - 1
    is_header = _header_mask(offsets)
    header = data[is_header].reshape(n, HEADER_BYTES)
    counts = (np.diff(offsets) - HEADER_BYTES) // 16
    if (header[:, :9] != POLYGON_HEADER).any() or (header[:, 9:].copy().view("<u4")[:, 0] != counts).any():
        raise TableError(NOT_OURS)
    closed = data[~is_header].view("<f8").reshape(-1, 2)
    closed_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    keep: Bool = np.ones(len(closed), np.bool_)
    keep[closed_start[1:] - 1] = False
    return closed[keep].astype(np.float64), closed_start - np.arange(n + 1)


def _header_mask(offsets: NDArray[np.int32]) -> Bool:
    # Lengths of header and body alternate, so one repeat paints the mask.
    bodies = np.diff(offsets) - HEADER_BYTES
    lengths = np.stack([np.full_like(bodies, HEADER_BYTES), bodies], axis=1).ravel()
    return np.repeat(np.tile([True, False], len(bodies)), lengths)


def _binary(offsets: NDArray[np.int32], data: UInt8) -> pa.Array:
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, buffers)


def geo_metadata(geometry_type: str) -> dict[bytes, bytes]:
    """Return the GeoParquet 1.1 metadata of a file whose column `geometry` holds `geometry_type` in pixels."""
    column = {"encoding": "WKB", "crs": None, "geometry_types": [geometry_type], "edges": "planar"}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    return {b"geo": json.dumps(geo).encode()}


class ShapeWriter:
    """Streams outlines, or points with a radius, into `DIR/shapes.parquet`; the file appears with the first cells."""

    def __init__(self, folder: Path, radius_px: float) -> None:
        """`radius_px` (level-0 pixels) is used for points that carry no area."""
        self.folder, self.radius_px = folder, radius_px
        self.writer: Any = None

    def append(self, cells: Cells, mpp: float) -> None:
        """Add the shapes of `cells`, in row groups of at most ROW_GROUP."""
        for first in range(0, len(cells), ROW_GROUP):
            self._write(slice_rows(cells, first, min(first + ROW_GROUP, len(cells))), mpp)

    def _write(self, cells: Cells, mpp: float) -> None:
        rings = cell_rings(cells)
        if rings is None:
            radius = np.sqrt(cells.area_um2.astype(np.float64) / np.pi) / mpp
            radius = np.where(radius > 0, radius, self.radius_px)
            columns = {"geometry": points_to_wkb(cells.centroid_xy), "radius": radius}
        else:
            columns = {"geometry": polygons_to_wkb(*rings)}
        table = pa.table(columns)
        if self.writer is None:
            self.folder.mkdir(parents=True)
            schema = table.schema.with_metadata(geo_metadata("Point" if rings is None else "Polygon"))
            path = self.folder / "shapes.parquet"
            # No two nuclei have the same outline.
            self.writer = pq.ParquetWriter(
                path, schema, compression="zstd", compression_level=1, use_dictionary=False, write_statistics=False
            )
        self.writer.write_table(table, row_group_size=ROW_GROUP)

    def close(self) -> bool:
        """Finish the file; returns whether there is one."""
        if self.writer is None:
            return False
        self.writer.close()
        return True


def _in_one(arrays: list[pa.Array]) -> pa.Array:
    return arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays)


class RingStream:
    """Reads outlines in their order, a few thousand at a time, so that no whole row group is in memory."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._batches = _outlines(file)
        self._rest: list[pa.Array] = []

    def take(self, n: int) -> tuple[Float64, Int64]:
        """Return the next `n` outlines as flat rings."""
        parts = self._rest
        while sum(map(len, parts)) < n:
            batch = next(self._batches, None)
            if batch is None:
                raise TableError("the outlines end before the nuclei do; write the table again with --overwrite")
            parts.append(batch)
        found = _in_one(parts)
        self._rest = [found.slice(n)] if n < len(found) else []
        return polygons_from_wkb(found.slice(0, n))


def _outlines(file: pq.ParquetFile) -> Iterator[pa.Array]:
    # All row groups at once would be fetched before the first is decoded.
    for i in range(file.metadata.num_row_groups):
        for batch in file.iter_batches(STREAM_ROWS, row_groups=[i], columns=["geometry"], use_threads=False):
            yield batch.column(0)


class ShapeReader:
    """Reads outlines by row range; row groups are read once in a sequential pass."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, pq.ParquetFile(path)
        meta = self.file.metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self.first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._last: tuple[int, pa.Table] | None = None

    def close(self) -> None:
        """Close the file."""
        self._last = None
        self.file.close()

    def columns(self, start: int, stop: int) -> pa.Table:
        """Return rows [start, stop) of all columns as an arrow table."""
        a = int(np.searchsorted(self.first, start, side="right")) - 1
        b = int(np.searchsorted(self.first, stop, side="left"))
        if b <= a:
            return self.file.schema_arrow.empty_table()
        parts = [self._group(i, ends=int(self.first[i + 1]) <= stop) for i in range(a, b)]
        table = parts[0] if len(parts) == 1 else pa.concat_tables(parts)
        return table.slice(start - int(self.first[a]), stop - start)

    def _group(self, i: int, ends: bool) -> pa.Table:
        """Return a row group; one that the next range begins in, and not `ends` here, is kept."""
        last, self._last = self._last, None
        group = last[1] if last and last[0] == i else self.file.read_row_group(i, use_threads=False)
        if not ends:
            self._last = i, group
        return group

    def rings(self, start: int, stop: int) -> tuple[Float64, Int64]:
        """Return the outlines of rows [start, stop)."""
        if stop <= start:
            return np.empty((0, 2)), np.zeros(1, np.int64)
        return polygons_from_wkb(_in_one(self.columns(start, stop).column("geometry").chunks))

    def stream(self) -> RingStream:
        """Return what reads the outlines in order, from the first on."""
        return RingStream(self.file)


def frame_steps(axes: str, scales: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Return how an element's coordinates become those of each frame: its name, and x and y of a unit in it."""
    kinds = [{"name": n, "type": "channel"} if n == "c" else {"name": n, "type": "space", "unit": "unit"} for n in axes]
    steps = []
    for name, (x, y) in scales.items():
        unit = "micrometer" if name == MICROMETRES else "unit"
        out = [axis if axis["type"] == "channel" else {**axis, "unit": unit} for axis in kinds]
        by = [{"c": 1.0, "x": x, "y": y}[n] for n in axes]
        step: dict[str, Any] = {"type": "identity"} if set(by) == {1.0} else {"type": "scale", "scale": by}
        steps.append({**step, "input": {"name": axes, "axes": kinds}, "output": {"name": name, "axes": out}})
    return steps


def mark_store(root: zarr.Group, shapes: bool, mpp: tuple[float, float] = (1.0, 1.0)) -> None:
    """Write the group attributes by which SpatialData knows the store and, where there are shapes, their frames.

    mpp  µm per pixel of level 0 in x and y: "global" is level-0 pixels, MICROMETRES their µm.
    """
    root.attrs.update({"spatialdata_attrs": {"version": "0.2", "spatialdata_software_version": "0.7.3"}})
    for name in ("shapes", "tables"):
        root.require_group(name)
    if not shapes:
        return
    attrs: dict[str, Any] = {
        "encoding-type": "ngff:shapes",
        "axes": ["x", "y"],
        "coordinateTransformations": frame_steps("xy", {"global": (1.0, 1.0), MICROMETRES: mpp}),
        "spatialdata_attrs": {"version": "0.3"},
    }
    root.require_group("shapes/nuclei").attrs.update(attrs)


def link_shapes(group: zarr.Group, has_shapes: bool) -> None:
    """Say in the table `group` which shapes its rows annotate."""
    # SpatialData refuses shapes without rows and a table that names absent ones: with no cells it stands alone.
    link = {"region": "nuclei", "region_key": "region", "instance_key": "instance_id"}
    if has_shapes:
        write_mapping(group, "uns/spatialdata_attrs", link)
    attrs = {name: text if has_shapes else None for name, text in link.items()}
    group.attrs.update({"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2", **attrs})
