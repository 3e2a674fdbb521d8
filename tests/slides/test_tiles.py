"""The grid: own boxes partition the plane, read boxes hold them, indices name places."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellslide.errors import UsageError
from cellslide.slides.tiles import TileGrid, fitting_grid, own_level0, select_tiles, tile_grid
from cellslide.slides.tissue import TissueMask
from cellslide.types import Plane


def plane(width: int, height: int, scale_x: float = 1.0, scale_y: float = 1.0) -> Plane:
    return Plane(0.5, scale_x, scale_y, width, height)


def owners(grid: TileGrid) -> np.ndarray:
    """Return how many tiles own each plane pixel, and add up what lies outside as -1."""
    count = np.zeros((grid.plane.height_px, grid.plane.width_px), int)
    for tile in grid.tiles():
        x0, y0, x1, y1 = tile.own_xyxy
        assert 0 <= x0 < x1 <= grid.plane.width_px and 0 <= y0 < y1 <= grid.plane.height_px
        count[y0:y1, x0:x1] += 1
    return count


@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 130), st.floats(0, 0.5))
@settings(max_examples=60, deadline=None)
def test_own_boxes_partition_the_plane(width: int, height: int, size: int, share: float) -> None:
    overlap = int(size * share)
    grid = tile_grid(plane(width, height), size, overlap)
    assert (owners(grid) == 1).all()
    tiles = list(grid.tiles())
    assert [t.index for t in tiles] == list(range(len(grid))) == [t.row * grid.n_cols + t.col for t in tiles]
    for tile in tiles:
        (rx0, ry0, rx1, ry1), (x0, y0, x1, y1) = tile.read_xyxy, tile.own_xyxy
        assert rx0 <= x0 and ry0 <= y0 and x1 <= rx1 and y1 <= ry1
        assert rx1 - rx0 == ry1 - ry0 == size == tile.size_px
        # Half an overlap of context on each side that is not the plane's edge.
        for own, read, edge in ((x0, rx0, 0), (y0, ry0, 0), (-x1, -rx1, -width), (-y1, -ry1, -height)):
            assert own == edge or own - read >= overlap // 2


@pytest.mark.parametrize(
    ("length", "count"), [(1, 1), (100, 1), (256, 1), (257, 2), (448, 2), (449, 3), (640, 3), (641, 4)]
)
def test_as_few_tiles_as_cover_the_plane(length: int, count: int) -> None:
    grid = tile_grid(plane(length, 10), 256, 64)
    assert (grid.n_cols, grid.n_rows, len(grid)) == (count, 1, count)


def test_boxes_of_a_known_grid() -> None:
    grid = tile_grid(plane(449, 300), 256, 64)
    assert [t.own_xyxy for t in grid.tiles()][:3] == [(0, 0, 224, 224), (224, 0, 416, 224), (416, 0, 449, 224)]
    assert grid.tile(5).read_xyxy == (384, 192, 640, 448)
    assert grid.tile(5).own_xyxy == (416, 224, 449, 300)
    with pytest.raises(IndexError):
        grid.tile(6)


@pytest.mark.parametrize(("size", "overlap"), [(256, 129), (256, -1), (0, 0)])
def test_wrong_overlap_names_the_flag(size: int, overlap: int) -> None:
    with pytest.raises(UsageError, match="--overlap"):
        tile_grid(plane(100, 100), size, overlap)


def test_one_small_tile_serves_a_small_plane() -> None:
    """Of the multiples allowed, two steps at least; never more than asked; not for networks of one size."""
    for edge, size in ((300, 304), (304, 304), (305, 320), (20, 32), (1024, 1024), (3000, 1024)):
        grid = fitting_grid(plane(20, edge), 1024, 64, 16)
        assert (grid.size_px, grid.overlap_px) == (size, min(64, size // 2)), edge
    assert fitting_grid(plane(300, 20), 1024, 64, None) == tile_grid(plane(300, 20), 1024, 64)
    assert fitting_grid(plane(3000, 20), 16, 0, 16).size_px == 16


def test_select_keeps_tiles_whose_own_box_meets_the_mask() -> None:
    grid = tile_grid(plane(400, 200, scale_x=2.0, scale_y=2.5), 100, 20)
    mask = np.zeros((50, 80), np.bool_)  # Cells of 10 x 10 level-0 pixels: x 0..800, y 0..500.
    mask[30, 50] = True  # Level-0 x 500..510, y 300..310; in the plane 250..255, 120..124.
    tissue = TissueMask(mask, 10.0, 10.0, 800, 500)
    chosen = select_tiles(grid, tissue)
    assert [t.own_xyxy for t in chosen] == [(250, 90, 330, 170)]
    assert own_level0(grid.plane, chosen[0]) == (500, 225, 660, 425)
    assert select_tiles(grid, None) == list(grid.tiles())
    assert select_tiles(grid, TissueMask(np.zeros((5, 8), np.bool_), 100, 100, 800, 500)) == []
