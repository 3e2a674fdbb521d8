"""Tiles -> slide: nothing lost, doubled or cut at a seam, whatever the tiles, in bounded memory and one order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
from scipy.spatial import cKDTree

from cellslide.bench import FakeDetector, detect_cells, square_slide, synthetic_maps
from cellslide.geometry import kernels
from cellslide.nuclei.hover_decode import decode_hover
from cellslide.nuclei.merge import BAND_UM, SAME_POINT_UM, SeamMerger, merge_stream, to_cells
from cellslide.slides.tiles import TileGrid, tile_grid
from cellslide.types import Cells, HoverDecode, HoverMaps, Instances, Plane, SlideInfo, Tile, concat


def grid_over(info: SlideInfo, mpp: float, size_px: int, overlap_px: int) -> TileGrid:
    return tile_grid(Plane.of(info, mpp), size_px, overlap_px)


def merged(parts: Iterator[Cells], grid: TileGrid) -> Cells:
    return concat(list(merge_stream(parts, grid)))


def as_rows(cells: Cells) -> list[tuple[bytes, ...]]:
    """Return everything about each nucleus that must not depend on the tiles, sorted."""
    assert cells.contour_xy is not None and cells.contour_start is not None
    rings = np.split(cells.contour_xy, cells.contour_start[1:-1])
    prob = [b""] * len(cells) if cells.class_prob is None else [p.tobytes() for p in cells.class_prob]
    return sorted(
        (c.tobytes(), ring.tobytes(), area.tobytes(), score.tobytes(), p)
        for c, ring, area, score, p in zip(cells.centroid_xy, rings, cells.area_um2, cells.score, prob, strict=True)
    )


def instances_at(tile: Tile, xy: list[tuple[float, float]], radius: list[float], cut: bool = False) -> Instances:
    """Return discs (16-gons) given in plane pixels as the tile would report them."""
    turn = np.arange(16) * (np.pi / 8)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    centre, r = np.array(xy, float).reshape(-1, 2) - tile.read_xyxy[:2], np.array(radius, float)
    return Instances(
        centroid_xy=centre,
        score=np.full(len(r), 0.5, np.float32),
        area_px=(np.pi * r**2).astype(np.float32),
        cut=np.full(len(r), cut),
        contour_xy=(centre[:, None] + r[:, None, None] * circle).reshape(-1, 2).astype(np.float32),
        contour_start=np.arange(len(r) + 1, dtype=np.int64) * 16,
    )


def window(image: np.ndarray, xyxy: tuple[int, int, int, int]) -> np.ndarray:
    """Return a read box of an image (..., H, W), zeros where it leaves the image."""
    x0, y0, x1, y1 = xyxy
    part = image[..., y0:y1, x0:x1]
    missing = [(0, y1 - y0 - part.shape[-2]), (0, x1 - x0 - part.shape[-1])]
    return np.pad(part, [(0, 0)] * (image.ndim - 2) + missing)


class Whole:
    """Decodes a drawn slide tile by tile: a network that sees exactly what is there."""

    def __init__(self, size_px: int, n: int, seed: int) -> None:
        self.maps = synthetic_maps(n, size_px, seed, radius_px=(6, 12)).hover_maps()
        self.size_px = size_px

    def parts(self, grid: TileGrid, info: SlideInfo) -> Iterator[Cells]:
        for tile in grid.tiles():
            m = self.maps
            assert m.type_prob is not None
            maps = HoverMaps(*(window(a, tile.read_xyxy) for a in (m.foreground, m.foreground_prob, m.hv, m.type_prob)))
            yield to_cells(decode_hover(maps, HoverDecode("fixed", 11, 3)), tile, grid.plane, info)


def test_decoded_nuclei_do_not_depend_on_the_tile_size() -> None:
    whole = Whole(1000, 700, seed=1)
    info = square_slide(1000, mpp=0.25)
    results = []
    for size, overlap in ((256, 96), (512, 96), (1024, 128)):
        grid = grid_over(info, 0.25, size, overlap)
        results.append(as_rows(merged(whole.parts(grid, info), grid)))
    assert len(results[0]) > 650
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_perfect_detections_do_not_depend_on_the_tile_size(mpp: float) -> None:
    # At 0.5 µm/px the slide's 0.31 µm pixels are resampled by an uneven factor.
    info = square_slide(6000, mpp=0.25 if mpp == 0.25 else 0.31)
    plane = Plane.of(info, mpp)
    drawn = FakeDetector.over(plane.width_px, 3000)
    # Whole sixty-fourths are exact in a tile's float32 outlines wherever the tile begins.
    detector = replace(drawn, centre=np.rint(drawn.centre * 64) / 64)
    results = []
    for size in (256, 512, 1024):
        grid = tile_grid(plane, size, 64)
        cells = merged(detect_cells(detector, grid, info), grid)
        np.testing.assert_array_equal(np.sort(cells.row), cells.row)
        bare = [(c.tobytes(), a.tobytes()) for c, a in zip(cells.centroid_xy, cells.area_um2, strict=True)]
        results.append(sorted(bare))
    centre, reach = detector.centre, detector.radius[:, None]
    assert len(results[0]) >= ((centre > reach) & (centre < plane.width_px - reach)).all(axis=1).sum() > 2500
    assert results[0] == results[1] == results[2]


def test_no_duplicates_and_no_more_losses_than_one_tile_has() -> None:
    info = square_slide(8000)
    grid = grid_over(info, 0.25, 1024, 128)
    detector = FakeDetector.over(8000, 20_000, jitter_px=0.6, miss=0.005)
    cells = merged(detect_cells(detector, grid, info), grid)
    tree = cKDTree(detector.centre)
    distance, nearest = tree.query(cells.centroid_xy)
    assert distance.max() < 4
    assert len(np.unique(nearest)) == len(nearest)
    seen = np.unique(np.concatenate([detector.seen(tile) for tile in grid.tiles()]))
    lost = len(np.setdiff1d(seen, nearest))
    assert lost <= 0.005 * len(detector.centre)


def test_centroids_placed_on_either_side_of_a_seam_are_not_both_disowned() -> None:
    info = square_slide(1000)
    grid = grid_over(info, 0.25, 576, 128)
    left, right = grid.tile(0), grid.tile(1)
    seam = left.own_xyxy[2]
    parts = [
        to_cells(instances_at(left, [(seam + 2, 100)], [12]), left, grid.plane, info),
        to_cells(instances_at(right, [(seam - 2, 100)], [12]), right, grid.plane, info),
    ]
    assert [len(p) for p in parts] == [1, 1]
    assert len(merged(iter(parts), grid)) == 1


def test_a_nucleus_seen_differently_by_two_tiles_stays_once() -> None:
    info = square_slide(1000)
    grid = grid_over(info, 0.25, 576, 128)
    left, right = grid.tile(0), grid.tile(1)
    seam = left.own_xyxy[2]
    # Each tile owns what it saw: the centroids are 20 px apart, the outlines overlap.
    shifted = [
        to_cells(instances_at(left, [(seam - 10, 100)], [26]), left, grid.plane, info),
        to_cells(instances_at(right, [(seam + 10, 100)], [25]), right, grid.plane, info),
    ]
    kept = merged(iter(shifted), grid)
    assert kept.centroid_xy.tolist() == [[seam - 10, 100]]  # the larger
    # One tile splits what the other saw whole.
    split = [
        to_cells(instances_at(left, [(seam - 1, 100)], [26]), left, grid.plane, info),
        to_cells(instances_at(right, [(seam - 12, 100), (seam + 13, 100)], [13, 13]), right, grid.plane, info),
    ]
    kept = merged(iter(split), grid)
    assert kept.centroid_xy.tolist() == [[seam - 1, 100]]


def test_touching_neighbours_from_two_tiles_both_stay() -> None:
    info = square_slide(1000)
    grid = grid_over(info, 0.25, 576, 128)
    left, right = grid.tile(0), grid.tile(1)
    seam = left.own_xyxy[2]
    # They share about a tenth of their area, which peers take for one nucleus.
    parts = [
        to_cells(instances_at(left, [(seam - 9, 100)], [11]), left, grid.plane, info),
        to_cells(instances_at(right, [(seam + 9, 100)], [11]), right, grid.plane, info),
    ]
    assert len(merged(iter(parts), grid)) == 2


def test_the_owner_wins_over_a_larger_stranger() -> None:
    info = square_slide(1000)
    grid = grid_over(info, 0.25, 576, 128)
    left, right = grid.tile(0), grid.tile(1)
    seam = left.own_xyxy[2]
    parts = [
        to_cells(instances_at(left, [(seam - 5, 100)], [10]), left, grid.plane, info),
        to_cells(instances_at(right, [(seam - 4, 100)], [14]), right, grid.plane, info),
    ]
    assert merged(iter(parts), grid).centroid_xy.tolist() == [[seam - 5, 100]]


def test_cut_nuclei_are_dropped_except_at_the_edge_of_the_plane() -> None:
    info = square_slide(1000)
    grid = grid_over(info, 0.25, 576, 128)
    tile = grid.tile(0)
    at_plane = to_cells(instances_at(tile, [(9.0, 300.0), (300.0, 9.0)], [9, 9], cut=True), tile, grid.plane, info)
    assert len(at_plane) == 2
    inner = to_cells(instances_at(tile, [(567.0, 300.0), (300.0, 567.0)], [9, 9], cut=True), tile, grid.plane, info)
    assert len(inner) == 0
    last = grid.tile(len(grid) - 1)
    x0, _, x1, _ = last.read_xyxy
    assert x1 > 1000  # leaves the plane, so its right edge cuts nothing
    assert len(to_cells(instances_at(last, [(990.0, 900.0)], [10], cut=True), last, grid.plane, info)) == 1
    assert len(to_cells(instances_at(last, [(x0 + 9.0, 900.0)], [9], cut=True), last, grid.plane, info)) == 0


def test_a_nucleus_that_its_owner_cuts_is_kept_by_the_neighbour() -> None:
    info = square_slide(1000)
    grid = grid_over(info, 0.25, 576, 64)
    left, right = grid.tile(0), grid.tile(1)
    seam = left.own_xyxy[2]
    x = seam + BAND_UM / 0.25 + 1  # beyond the band: the right tile owns it
    # A lopsided nucleus: 48 px to the left of its centroid, 15 to the right. The right tile cuts it, the left sees it
    # all.
    whole = instances_at(left, [(x - 16.5, 200)], [31.5])
    whole = replace(whole, centroid_xy=whole.centroid_xy + (16.5, 0))
    assert x - 48 < right.read_xyxy[0] and x + 15 < left.read_xyxy[2]
    seen = to_cells(whole, left, grid.plane, info)
    assert seen.centroid_xy.tolist() == [[x, 200]]
    clipped = to_cells(instances_at(right, [(right.read_xyxy[0] + 30, 200)], [30], cut=True), right, grid.plane, info)
    assert len(clipped) == 0
    assert len(merged(iter([seen, clipped]), grid)) == 1


def test_far_strangers_are_left_to_their_owner() -> None:
    info = square_slide(1000)
    grid = grid_over(info, 0.25, 576, 128)
    left = grid.tile(0)
    seam = left.own_xyxy[2]
    band_px = BAND_UM / 0.25
    got = to_cells(
        instances_at(left, [(seam + band_px - 1, 100), (seam + band_px + 1, 200)], [5, 5]), left, grid.plane, info
    )
    assert got.centroid_xy[:, 1].tolist() == [100]


def test_level0_frame_area_and_row() -> None:
    info = replace(square_slide(2000), mpp_x=0.25, mpp_y=0.2, height_px=2500)
    grid = grid_over(info, 0.5, 320, 64)
    tile = grid.tile(grid.n_cols + 1)
    own = tile.own_xyxy
    spots = [(own[0] + 50.0, own[1] + 50.0), (own[0] + 50.0, own[1] - 2.0), (own[0] + 60.0, own[3] + 1.0)]
    cells = to_cells(instances_at(tile, spots, [4, 4, 4]), tile, grid.plane, info)
    np.testing.assert_allclose(cells.centroid_xy, np.array(spots) * (2.0, 2.5), atol=1e-3)
    assert (cells.row - tile.row).tolist() == [0, -1, 1]
    np.testing.assert_allclose(cells.area_um2, np.pi * 16 * 0.25, rtol=1e-6)
    assert cells.contour_xy is not None
    np.testing.assert_allclose(cells.contour_xy[0], (np.array(spots[0]) + (4, 0)) * (2.0, 2.5), atol=1e-3)
    np.testing.assert_array_equal(cells.centroid_xy * 1024, np.rint(cells.centroid_xy * 1024))


def test_nuclei_found_beside_the_slide_are_dropped() -> None:
    info = square_slide(500)
    grid = grid_over(info, 0.25, 576, 128)
    tile = grid.tile(0)
    assert len(to_cells(instances_at(tile, [(505, 100), (495, 100)], [8, 8]), tile, grid.plane, info)) == 1


@pytest.mark.parametrize("kind", ["box", "point"])
def test_boxes_and_points(kind: str) -> None:
    info = square_slide(3000)
    grid = grid_over(info, 0.25, 512, 64)
    detector = FakeDetector.over(3000, 2000, jitter_px=0.5)
    parts = []
    for tile in grid.tiles():
        found = detector.detect(tile)
        assert found.contour_xy is not None
        ring = found.contour_xy.reshape(-1, 24, 2)
        box = np.concatenate([ring.min(axis=1), ring.max(axis=1)], axis=1)
        bare = replace(found, contour_xy=None, contour_start=None, box_xyxy=box if kind == "box" else None)
        parts.append(to_cells(bare, tile, grid.plane, info))
    cells = merged(iter(parts), grid)
    inside = ((detector.centre > 20) & (detector.centre < 2980)).all(axis=1)
    distance, nearest = cKDTree(cells.centroid_xy).query(detector.centre[inside])
    assert distance.max() < 4 and len(np.unique(nearest)) == inside.sum()
    assert len(np.unique(cKDTree(detector.centre).query(cells.centroid_xy)[1])) == len(cells)
    assert (cells.box_xyxy is not None) == (kind == "box")


def seam_cells(boxes: list[tuple[float, float, float, float]], kind: str, gap_um: float = SAME_POINT_UM) -> Cells:
    """Return what is left of boxes that two neighbouring tiles report by turns, one mpp 0.25 tile each."""
    info = square_slide(1000)
    grid = grid_over(info, 0.25, 512, 128)
    parts = []
    for k, tile in enumerate((grid.tile(0), grid.tile(1))):
        box = np.array(boxes[k::2], np.float32) - np.tile(tile.read_xyxy[:2], 2).astype(np.float32)
        centre = ((box[:, :2] + box[:, 2:]) / 2).astype(np.float64)
        score = np.full(len(box), 0.5, np.float32)
        none = np.zeros(len(box), np.bool_)
        area = np.prod(box[:, 2:] - box[:, :2], axis=1) if kind == "box" else np.zeros(len(box), np.float32)
        found = Instances(centre, score, area, none, box_xyxy=box if kind == "box" else None)
        parts.append(to_cells(found, tile, grid.plane, info))
    return concat(list(merge_stream(iter(parts), grid, gap_um)))


def test_boxes_of_neighbours_stay_and_boxes_of_one_nucleus_do_not() -> None:
    # Two spindles side by side, slanting: their boxes share 0.44 of the smaller, 0.28 of both.
    slanting = [(436.0, 100.0, 454.0, 118.0), (442.0, 106.0, 460.0, 124.0)]
    assert len(seam_cells(slanting, "box")) == 2
    # One nucleus, of which one tile's box is larger all round, its centre 1.8 um away.
    same = [(436.0, 100.0, 454.0, 118.0), (438.0, 100.0, 466.0, 118.0)]
    assert len(seam_cells(same, "box")) == 1


def test_points_across_a_seam_are_one_within_the_radius_of_the_model() -> None:
    spots = [(441.0, 100.0, 441.0, 100.0), (455.0, 100.0, 455.0, 100.0)]  # 3.5 um apart
    assert len(seam_cells(spots, "point")) == 2
    assert len(seam_cells(spots, "point", 4.0)) == 1


def test_points_a_little_beside_the_slide_are_moved_onto_it() -> None:
    info = square_slide(500)
    grid = grid_over(info, 0.25, 576, 128)
    tile = grid.tile(0)
    xy = np.array([(-3.0, 100.0), (504.0, 300.0), (250.0, -7.0)])
    none = np.zeros(3, np.float32)
    found = Instances(xy, none + 0.5, none, none > 0)
    cells = to_cells(found, tile, grid.plane, info)
    np.testing.assert_allclose(cells.centroid_xy, [(0, 100), (500, 300)], atol=0.001)
    assert (cells.centroid_xy < 500).all()


def simulation() -> tuple[list[Cells], TileGrid]:
    info = square_slide(4000)
    grid = grid_over(info, 0.25, 512, 128)
    return list(detect_cells(FakeDetector.over(4000, 8000, jitter_px=1.5, miss=0.02), grid, info)), grid


def test_final_order_and_grouping_of_parts() -> None:
    parts, grid = simulation()
    blocks = list(merge_stream(parts, grid))
    whole = concat(blocks)
    keys = np.stack([whole.row, whole.centroid_xy[:, 0], whole.centroid_xy[:, 1]], axis=1)
    assert keys.tolist() == sorted(keys.tolist())
    assert [len(np.unique(b.row)) for b in blocks] == [1] * len(blocks)
    regrouped = [concat(parts[i : i + 7]) for i in range(0, len(parts), 7)]
    for other in (regrouped, [p for p in parts if len(p)], [concat(parts)]):
        again = concat(list(merge_stream(iter(other), grid)))
        assert as_rows(again) == as_rows(whole)
        np.testing.assert_array_equal(again.centroid_xy, whole.centroid_xy)
        np.testing.assert_array_equal(again.tile_index, whole.tile_index)


def test_streaming_equals_one_merge_and_keeps_few_rows() -> None:
    parts, grid = simulation()
    streamed = concat(list(merge_stream(parts, grid)))
    merger = SeamMerger(grid)
    pooled = merger.add_row(grid.n_rows - 1, concat(parts)) + merger.finish()
    np.testing.assert_array_equal(concat(pooled).centroid_xy, streamed.centroid_xy)
    taken = 0

    def counted() -> Iterator[Cells]:
        nonlocal taken
        for part in parts:
            taken += 1
            yield part

    for block in merge_stream(counted(), grid):
        assert taken <= (block.row[0] + 2) * grid.n_cols + 1


def test_nothing_in_nothing_out_and_wrong_order() -> None:
    parts, grid = simulation()
    assert list(merge_stream([], grid)) == []
    empty = parts[0].take(np.zeros(len(parts[0]), bool))
    assert list(merge_stream([empty, empty], grid)) == []
    with pytest.raises(ValueError, match="after a later one"):
        list(merge_stream([parts[grid.n_cols], parts[0]], grid))
    with pytest.raises(ValueError, match="after a later one"):
        list(merge_stream([parts[2], parts[1]], grid))


def test_missing_tiles_leave_the_band_to_the_neighbour() -> None:
    parts, grid = simulation()
    without = [p for p in parts if not len(p) or p.tile_index[0] != grid.n_cols + 1]
    cells = concat(list(merge_stream(without, grid)))
    own = grid.tile(grid.n_cols + 1).own_xyxy
    x, y = cells.centroid_xy.T
    hole = (x > own[0]) & (x < own[2]) & (y > own[1]) & (y < own[3])
    band_px = BAND_UM / 0.25
    deep = hole & (x > own[0] + band_px) & (x < own[2] - band_px) & (y > own[1] + band_px) & (y < own[3] - band_px)
    assert hole.any() and not deep.any()


@pytest.mark.parametrize("kind", ["mask", "box", "point"])
def test_without_compiled_loops_the_merge_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels.available():
        pytest.skip(str(kernels.why_not()))
    parts, grid = simulation()
    for i, part in enumerate(parts):
        if kind != "mask" and part.contour_xy is not None:
            ring = part.contour_xy.reshape(-1, 24, 2)
            box = np.concatenate([ring.min(axis=1), ring.max(axis=1)], axis=1) if kind == "box" else None
            parts[i] = replace(part, contour_xy=None, contour_start=None, box_xyxy=box)
    compiled = list(merge_stream(parts, grid))
    monkeypatch.setattr(kernels, "available", lambda: False)
    plain = list(merge_stream(parts, grid))
    assert len(plain) == len(compiled) > 3
    for one, other in zip(plain, compiled, strict=True):
        for field in fields(Cells):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


def test_equal_x_is_sorted_by_y_and_equal_places_keep_tile_order() -> None:
    info = square_slide(1000)
    grid = grid_over(info, 0.25, 1000, 64)
    spots = [(100.0, 900.0), (300.0, 50.0), (100.0, 40.0), (50.0, 800.0), (100.0, 500.0), (300.0, 20.0)]
    cells = to_cells(instances_at(grid.tile(0), spots, [4] * 6), grid.tile(0), grid.plane, info)
    again = replace(cells, score=np.arange(6, dtype=np.float32))
    kept = merged(iter([concat([again, again.take(np.array([2]))])]), grid)
    assert kept.centroid_xy.tolist() == [[50, 800], [100, 40], [100, 40], [100, 500], [100, 900], [300, 20], [300, 50]]
    assert kept.score[[0, 3, 4]].tolist() == [3, 4, 0]
