"""Rows of records with few copies: of one as views, of several as if they stood end to end."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide import kernels
from cellslide.types import Int64, Record, take_rings


def slice_rows(record: Record, begin: int, end: int) -> Record:
    """Return rows [begin, end) as views, without a copy."""
    columns: dict[str, Any] = {}
    for spec in fields(record):
        column = getattr(record, spec.name)
        if column is not None and not spec.name.startswith("contour_"):
            columns[spec.name] = column[begin:end]
    if record.contour_xy is not None and record.contour_start is not None:
        start = record.contour_start[begin : end + 1]
        columns["contour_xy"] = record.contour_xy[start[0] : start[-1]]
        columns["contour_start"] = start - start[0]
    return type(record)(**columns)


def take_across(records: list[Record], rows: Int64) -> Record:
    """Return rows of `records` counted end to end, in that order; optional columns are in all records or in none."""
    columns: dict[str, Any] = {}
    for spec in fields(records[0]):
        parts = [column for record in records if (column := getattr(record, spec.name)) is not None]
        if parts and not spec.name.startswith("contour_"):
            columns[spec.name] = np.concatenate(parts)[rows]
    if records[0].contour_start is not None:
        columns["contour_xy"], columns["contour_start"] = rings_across(records, rows)
    return type(records[0])(**columns)


def rings_across(records: list[Record], rows: Int64) -> tuple[NDArray[Any], Int64]:
    """Return the outlines of such rows as flat rings; every record has some."""
    records, rows = _needed(records, rows)
    rings = [
        (r.contour_xy, r.contour_start) for r in records if r.contour_xy is not None and r.contour_start is not None
    ]
    lengths = np.concatenate([start[1:] - start[:-1] for _, start in rings])
    if not kernels.available():
        start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return take_rings(np.concatenate([xy for xy, _ in rings]), start, rows)
    from cellslide.ring_kernels import copy_rings

    new_start = np.concatenate([[0], np.cumsum(lengths[rows])]).astype(np.int64)
    place = np.full(len(lengths), -1, np.int64)
    place[rows] = new_start[:-1]
    out = np.empty((int(new_start[-1]), 2), rings[0][0].dtype)
    begin = 0
    for xy, start in rings:
        part = place[begin : begin + len(start) - 1]
        copy_rings(xy, start, part, out)
        begin += len(part)
    return out, new_start


def _needed(records: list[Record], rows: Int64) -> tuple[list[Record], Int64]:
    """Return the records that hold any of `rows`, at least one, and where those rows are among them."""
    sizes = np.array([len(record) for record in records])
    ends = np.cumsum(sizes)
    holder = np.searchsorted(ends, rows, side="right")
    used = np.zeros(len(records), np.bool_)
    used[holder] = True
    if used.all():
        return records, rows
    used[0] |= not used.any()
    skipped = np.cumsum(np.where(used, 0, sizes))
    return [record for record, needed in zip(records, used, strict=True) if needed], rows - skipped[holder]
