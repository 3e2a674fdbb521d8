"""Nuclei: what a network says of a tile, those of a tile, those of the slide."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellslide.types.arrays import Bool, Float32, Float64, Int32, Int64, UInt8, check_lengths


@dataclass(frozen=True, slots=True)
class HoverMaps:
    """Network output of one tile, small enough to hand to another process.

    foreground       uint8 (H, W), 1 where the nucleus logit wins (a tie is background).
    foreground_prob  float16 (H, W).
    hv               float32 (2, H, W): horizontal, vertical.
    type_prob        float16 (K + 1, H, W) with background first, or None.
    """

    foreground: UInt8
    foreground_prob: NDArray[np.float16]
    hv: Float32
    type_prob: NDArray[np.float16] | None = None


@dataclass(frozen=True, slots=True)
class NoOutput:
    """Why the network gave nothing for a tile."""

    error: str


@dataclass(frozen=True, slots=True)
class Instances:
    """Nuclei of one tile, in tile pixels.

    centroid_xy   float64 (N, 2).
    score         float32 (N,), the detector's confidence, 0..1.
    area_px       float32 (N,), 0 for points.
    class_prob    float32 (N, K) over the model's classes, rows sum to 1, or None.
    box_xyxy      float32 (N, 4) or None.
    contour_xy, contour_start
                  float32 (P, 2) and int64 (N + 1,): outline of nucleus i is contour_xy[start[i]:start[i+1]], open ring,
                  or None for boxes and points.
    cut           bool (N,): touches the edge of the read box.
    embedding     float32 (N, D) or None.
    """

    centroid_xy: Float64
    score: Float32
    area_px: Float32
    cut: Bool
    class_prob: Float32 | None = None
    box_xyxy: Float32 | None = None
    contour_xy: Float32 | None = None
    contour_start: Int64 | None = None
    embedding: Float32 | None = None

    def __post_init__(self) -> None:
        _check_columns(self, ("score", "area_px", "cut", "class_prob", "box_xyxy", "embedding"))

    def __len__(self) -> int:
        return len(self.centroid_xy)

    def take(self, rows: NDArray[Any]) -> Instances:
        """Return the rows given by a boolean mask or by indices, in that order."""
        return _take(self, rows)


@dataclass(frozen=True, slots=True)
class Cells:
    """Nuclei in level-0 pixels; columns as in `Instances`, plus where they came from.

    tile_index   int32 (N,), the tile that found the nucleus.
    row          int32 (N,), the tile row whose own boxes hold the centroid: the first key of the final order.
    area_um2     float32 (N,).
    """

    centroid_xy: Float64
    tile_index: Int32
    row: Int32
    score: Float32
    area_um2: Float32
    class_prob: Float32 | None = None
    box_xyxy: Float64 | None = None
    contour_xy: Float64 | None = None
    contour_start: Int64 | None = None
    embedding: Float32 | None = None

    def __post_init__(self) -> None:
        _check_columns(self, ("tile_index", "row", "score", "area_um2", "class_prob", "box_xyxy", "embedding"))

    def __len__(self) -> int:
        return len(self.centroid_xy)

    def take(self, rows: NDArray[Any]) -> Cells:
        """Return the rows given by a boolean mask or by indices, in that order."""
        return _take(self, rows)


Record = TypeVar("Record", Instances, Cells)


def _check_columns(record: Record, names: tuple[str, ...]) -> None:
    n = len(record.centroid_xy)
    check_lengths(record, n, names)
    if (record.contour_xy is None) != (record.contour_start is None):
        raise ValueError("contour_xy and contour_start go together")
    if record.contour_start is not None:
        check_lengths(record, n + 1, ("contour_start",))


def _take(record: Record, rows: NDArray[Any]) -> Record:
    rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
    columns: dict[str, Any] = {}
    for spec in fields(record):
        column = getattr(record, spec.name)
        if column is not None and not spec.name.startswith("contour_"):
            columns[spec.name] = column[rows]
    if record.contour_start is not None and record.contour_xy is not None:
        columns["contour_xy"], columns["contour_start"] = take_rings(record.contour_xy, record.contour_start, rows)
    return type(record)(**columns)


def take_rings(xy: NDArray[Any], start: Int64, rows: NDArray[Any]) -> tuple[NDArray[Any], Int64]:
    """Return the rings `rows` of a flat (vertices, offsets) pair, in that order."""
    lengths = (start[1:] - start[:-1])[rows]
    new_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    gather = np.repeat(start[:-1][rows] - new_start[:-1], lengths) + np.arange(new_start[-1])
    return xy[gather], new_start


def concat(records: list[Record]) -> Record:
    """Join records row-wise; an optional column must be present in all or in none."""
    if not records:
        raise ValueError("nothing to join")
    columns: dict[str, Any] = {}
    for spec in fields(records[0]):
        if spec.name == "contour_start":
            continue
        parts = [getattr(r, spec.name) for r in records]
        present = [p for p in parts if p is not None]
        if present and len(present) != len(parts):
            raise ValueError(f"column {spec.name} is missing in some records")
        columns[spec.name] = np.concatenate(present) if present else None
    if records[0].contour_start is not None:
        lengths = [np.diff(r.contour_start) for r in records if r.contour_start is not None]
        columns["contour_start"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    return type(records[0])(**columns)
