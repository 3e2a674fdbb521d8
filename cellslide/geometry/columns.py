"""Rows of records with few copies: of one as views, of several as if they stood end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.geometry import kernels
from cellslide.types import Int64, Record, concat, take_rings


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


def slice_across(records: list[Record], begin: int, end: int) -> Record:
    """Return rows [begin, end) of `records` counted end to end: views where one record holds them all."""
    parts: list[Record] = []
    for record in records:
        low, high = max(begin, 0), min(end, len(record))
        if low < high:
            parts.append(slice_rows(record, low, high))
        begin, end = begin - len(record), end - len(record)
    if len(parts) > 1:
        return concat(parts)
    return parts[0] if parts else slice_rows(records[0], 0, 0)


def take_across(records: Sequence[Record], rows: Int64) -> Record:
    """Return rows of `records` counted end to end, in that order; optional columns are in all records or in none."""
    columns = {name: column[rows] for name, column in _light(records)}
    if records[0].contour_start is not None:
        columns["contour_xy"], columns["contour_start"] = rings_across([Rings.of(records)], rows)
    return type(records[0])(**columns)


def join_light(records: Sequence[Record]) -> Record:
    """Join records row-wise without their outlines."""
    return type(records[0])(**dict(_light(records)))


def _light(records: Sequence[Record]) -> Iterator[tuple[str, Any]]:
    """Yield each column that the records have, but for outlines, joined."""
    for spec in fields(records[0]):
        if not spec.name.startswith("contour_") and getattr(records[0], spec.name) is not None:
            yield spec.name, np.concatenate([getattr(record, spec.name) for record in records])


@dataclass(frozen=True, slots=True)
class Rings:
    """Outlines of several records, as if they stood end to end.

    parts   vertices (P, 2) and offsets (N + 1,) of each.
    length  int64 (N,), vertices of each outline of all parts.
    ends    int64, where each part's outlines end.
    """

    parts: list[tuple[NDArray[Any], Int64]]
    length: Int64
    ends: Int64

    @classmethod
    def of(cls, records: Sequence[Record]) -> Rings:
        """Refer to the outlines of records that all have some."""
        parts = [
            (r.contour_xy, r.contour_start) for r in records if r.contour_xy is not None and r.contour_start is not None
        ]
        lengths = [start[1:] - start[:-1] for _, start in parts]
        return cls(parts, np.concatenate(lengths), np.cumsum([len(part) for part in lengths]))


def rings_across(rings: Sequence[Rings], rows: Int64) -> tuple[NDArray[Any], Int64]:
    """Return the outlines `rows`, counted over all of `rings`, as flat vertices (P, 2) and offsets (N + 1,)."""
    lengths = np.concatenate([one.length for one in rings])
    parts = [part for one in rings for part in one.parts]
    if not kernels.available():
        start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return take_rings(np.concatenate([xy for xy, _ in parts]), start, rows)
    from cellslide.geometry.ring_kernels import copy_rings

    new_start = np.concatenate([[0], np.cumsum(lengths[rows])]).astype(np.int64)
    place = np.full(len(lengths), -1, np.int64)
    place[rows] = new_start[:-1]
    out = np.empty((int(new_start[-1]), 2), parts[0][0].dtype)
    ends = _ends(rings)
    for number in np.flatnonzero(np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(ends))):
        xy, start = parts[number]
        copy_rings(xy, start, place[ends[number] - len(start) + 1 : ends[number]], out)
    return out, new_start


def _ends(rings: Sequence[Rings]) -> Int64:
    """Return where each part's outlines end, counted over all of `rings`."""
    before = np.cumsum([0] + [len(one.length) for one in rings[:-1]])
    return np.concatenate([first + one.ends for first, one in zip(before, rings, strict=True)])
