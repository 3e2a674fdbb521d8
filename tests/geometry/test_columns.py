"""Rows picked from several records are those of the records joined."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from cellslide.geometry import kernels
from cellslide.geometry.columns import Rings, rings_across, slice_across, slice_rows, take_across
from cellslide.types import Cells, concat
from tests.support.random_cells import as_kind, ellipses


def same(one: Cells, other: Cells) -> None:
    for field in fields(Cells):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["mask", "box", "point"])
def test_rows_across_records(kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: compiled)
    whole = as_kind(ellipses(60), kind)
    ends = [0, 7, 7, 30, 60]
    parts = [whole.take(np.arange(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    rng = np.random.default_rng(0)
    for rows in (rng.permutation(60), np.array([3, 59, 0]), np.arange(30, 60), np.empty(0, np.int64)):
        same(take_across(parts, rows), concat(parts).take(rows))
        if kind == "mask":
            xy, start = rings_across([Rings.of(parts[:2]), Rings.of(parts[2:])], rows)
            np.testing.assert_array_equal(xy, whole.take(rows).contour_xy)
            assert start[0] == 0 and len(start) == len(rows) + 1


@pytest.mark.parametrize("kind", ["mask", "box", "point"])
def test_a_slice_is_what_is_taken(kind: str) -> None:
    cells = as_kind(ellipses(30), kind)
    for begin, end in ((0, 30), (4, 19), (29, 30), (7, 7)):
        part = slice_rows(cells, begin, end)
        same(part, cells.take(np.arange(begin, end)))
        assert np.shares_memory(part.centroid_xy, cells.centroid_xy) or begin == end


@pytest.mark.parametrize("kind", ["mask", "box", "point"])
def test_a_slice_across_records_is_that_of_the_records_joined(kind: str) -> None:
    whole = as_kind(ellipses(60), kind)
    ends = [0, 7, 7, 30, 60]
    parts = [whole.take(np.arange(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    for begin, end in ((0, 60), (3, 31), (7, 30), (8, 9), (59, 60), (30, 30)):
        same(slice_across(parts, begin, end), slice_rows(whole, begin, end))
