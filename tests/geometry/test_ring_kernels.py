"""Compiled loops over rings and texts do what their plain forms do."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from cellslide.formats.geojson import SMALLEST_PX2
from cellslide.geometry import kernels
from cellslide.geometry.outlines import ring_bounds, ring_features, sure_rings, to_polygons
from cellslide.store.shapes import TableError, polygons_from_wkb, polygons_to_wkb
from cellslide.types import Float64, Int64
from tests.support.random_cells import ellipses

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled loops here")


def off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)


def rings(n: int = 80, seed: int = 0) -> tuple[Float64, Int64]:
    """Return rings of 1 to 12 points, all anyhow."""
    rng = np.random.default_rng(seed)
    start = np.concatenate([[0], np.cumsum(rng.integers(1, 13, n))]).astype(np.int64)
    return rng.normal(0, 30, (start[-1], 2)) + rng.uniform(0, 5e4, 2), start


def test_bounds_and_features(monkeypatch: pytest.MonkeyPatch) -> None:
    xy, start = rings()
    start = np.insert(start, 5, start[5])  # a ring without a vertex
    compiled = ring_bounds(xy, start), ring_features(xy, start, 0.25, 0.3)
    off(monkeypatch)
    np.testing.assert_array_equal(compiled[0], ring_bounds(xy, start))
    np.testing.assert_allclose(compiled[1], ring_features(xy, start, 0.25, 0.3), rtol=1e-6, atol=1e-6)


def test_wkb_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    xy, start = rings()
    column = polygons_to_wkb(xy, start)
    back = polygons_from_wkb(column)
    part = polygons_from_wkb(column.slice(10, 20))
    with pytest.raises(TableError, match="empty outline"):
        polygons_to_wkb(xy, np.insert(start, 5, start[5]))
    off(monkeypatch)
    assert polygons_to_wkb(xy, start).equals(column)
    for one, other in ((back, polygons_from_wkb(column)), (part, polygons_from_wkb(column.slice(10, 20)))):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(back[0], xy)


@pytest.mark.parametrize("other", [b"\x01\x06\x00\x00\x00\x01\x00\x00\x00" + bytes(40), b"\x01\x03" + bytes(9), b""])
def test_wkb_of_others_is_refused(other: bytes) -> None:
    import pyarrow as pa

    own = polygons_to_wkb(*rings(1)).to_pylist()
    with pytest.raises(TableError, match="not written by cellslide"):
        polygons_from_wkb(pa.array([*own, other], pa.binary()))


@pytest.mark.parametrize("spread", [1.0, 8.0, 300.0])
def test_a_ring_that_is_sure_is_a_valid_polygon(spread: float) -> None:
    rng = np.random.default_rng(1)
    n, k = 4000, 7
    cents = np.rint(rng.normal(0, 100 * spread, (n * k, 2))).astype(np.int64)
    start = np.arange(n + 1, dtype=np.int64) * k
    sure = sure_rings(cents, start, SMALLEST_PX2)
    polygons = to_polygons(cents / 100, start)
    assert sure.any() and not sure.all()
    assert shapely.is_valid(polygons[sure]).all() and (shapely.area(polygons[sure]) >= SMALLEST_PX2).all()


def test_ordinary_outlines_are_sure() -> None:
    cells = ellipses(200)
    assert cells.contour_xy is not None and cells.contour_start is not None
    cents = np.rint(cells.contour_xy * 100).astype(np.int64)
    assert sure_rings(cents, cells.contour_start, SMALLEST_PX2).all()
    assert not sure_rings(cents // 10_000, cells.contour_start, SMALLEST_PX2).any()
    # Twice round is no polygon, though every step turns the same way.
    twice = np.concatenate([cents[:24], cents[:24]])
    assert not sure_rings(twice, np.array([0, 48]), SMALLEST_PX2).any()
