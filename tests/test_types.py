"""Records check their lengths, and rows and outlines stay together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellslide.types import Instances, Level, Plane, SlideInfo, Tile, concat


def _instances(lengths: list[int]) -> Instances:
    n = len(lengths)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.repeat(np.arange(n), lengths)
    return Instances(
        centroid_xy=np.stack([np.arange(n), np.arange(n)], 1).astype(np.float64),
        score=np.linspace(0, 1, n, dtype=np.float32),
        area_px=np.arange(n, dtype=np.float32),
        cut=np.zeros(n, np.bool_),
        contour_xy=np.stack([ids, np.arange(len(ids))], 1).astype(np.float32),
        contour_start=start,
    )


def _info(width: int, height: int, mpp_x: float, mpp_y: float) -> SlideInfo:
    return SlideInfo("s", Path("s.tif"), "generic", width, height, mpp_x, mpp_y, "vendor", (Level(width, height, 1.0),))


@pytest.mark.parametrize("rows", [np.array([2, 0]), np.array([True, False, True, False]), np.array([], np.int64)])
def test_taken_rows_keep_their_outlines(rows: np.ndarray) -> None:
    taken = _instances([3, 4, 5, 0]).take(rows)
    wanted = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
    assert taken.centroid_xy[:, 0].tolist() == wanted.tolist()
    assert taken.contour_xy is not None and taken.contour_start is not None
    for i, row in enumerate(wanted):
        ring = taken.contour_xy[taken.contour_start[i] : taken.contour_start[i + 1]]
        assert len(ring) == [3, 4, 5, 0][row] and (ring[:, 0] == row).all()


def test_joined_records_are_the_rows_one_after_the_other() -> None:
    whole = _instances([3, 4, 5])
    joined = concat([whole.take(np.array([0])), whole.take(np.array([1, 2]))])
    assert joined.contour_xy is not None and joined.contour_start is not None
    assert np.array_equal(joined.contour_xy, whole.contour_xy) and joined.contour_start.tolist() == [0, 3, 7, 12]


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="Instances.score has 2 rows, expected 1"):
        Instances(np.zeros((1, 2)), np.zeros(2, np.float32), np.zeros(1, np.float32), np.zeros(1, np.bool_))


def test_an_optional_column_in_some_records_only_is_refused() -> None:
    bare = Instances(np.zeros((1, 2)), np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1, np.bool_))
    with pytest.raises(ValueError, match="contour_xy"):
        concat([_instances([3]), bare])


def test_plane_covers_the_slide_and_converts_both_axes() -> None:
    plane = Plane.of(_info(1001, 333, 0.25, 0.5), 0.5)
    assert (plane.width_px, plane.height_px) == (501, 333)
    xy = np.array([[10.0, 20.0]])
    assert plane.to_level0(xy).tolist() == [[20.0, 20.0]]
    assert plane.from_level0(plane.to_level0(xy)).tolist() == xy.tolist()


def test_a_pixel_size_off_by_rounding_does_not_resample() -> None:
    assert Plane.of(_info(100, 100, 0.499, 0.499), 0.5).scale_x == 1.0
    assert Plane.of(_info(100, 100, 0.48, 0.48), 0.5).scale_x == pytest.approx(1.0417, abs=1e-4)


def test_tile_points_move_by_the_read_box() -> None:
    tile = Tile(3, 1, 1, (448, 448, 960, 960), (480, 480, 928, 928))
    assert tile.size_px == 512
    assert tile.to_plane(np.array([[1.5, 2.5]])).tolist() == [[449.5, 450.5]]
