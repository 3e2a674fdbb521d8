"""Outlines: area-true, always valid and simple, and back to masks."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from scipy import ndimage

from cellslide.bench import synthetic_maps
from cellslide.geometry.outlines import (
    SHAPE_FEATURES,
    rasterise,
    ring_areas,
    ring_bounds,
    ring_features,
    to_polygons,
    trace_outlines,
    valid_rings,
)
from cellslide.nuclei.hover_decode import hover_instances
from cellslide.types import HoverDecode


def rings(*polygons: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    start = np.concatenate([[0], np.cumsum([len(p) for p in polygons])]).astype(np.int64)
    return np.concatenate([np.array(p, float).reshape(-1, 2) for p in polygons]), start


def traced(*rows: str) -> list[tuple[float, float]]:
    mask = np.array([[c == "#" for c in row] for row in rows])
    xy, _ = trace_outlines(mask.astype(np.int32), 1)
    return [tuple(p) for p in xy.tolist()]


def test_single_pixel_is_a_diamond() -> None:
    assert sorted(traced("   ", " # ", "   ")) == [(1.0, 1.5), (1.5, 1.0), (1.5, 2.0), (2.0, 1.5)]


@pytest.mark.parametrize("radius_px", [(3.0, 4.0), (4.0, 7.0), (7.5, 13.5)])
def test_area_is_kept(radius_px: tuple[float, float]) -> None:
    labels = synthetic_maps(200, 384, seed=1, radius_px=radius_px).truth
    n = int(labels.max())
    xy, start = trace_outlines(labels, n)
    mask = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    share = ring_areas(xy, start)[mask > 0] / mask[mask > 0]
    assert abs(share.mean() - 1) <= 0.03
    assert np.percentile(np.abs(share - 1), 95) < 0.05


@pytest.mark.parametrize("density", [0.3, 0.5, 0.6, 0.8])
def test_any_mask_gives_valid_simple_polygons(density: float) -> None:
    labels, n = ndimage.label(np.random.default_rng(7).random((60, 45)) < density)
    xy, start = trace_outlines(labels, n)
    polygons = to_polygons(xy, start)
    assert shapely.is_valid(polygons).all() and (shapely.area(polygons) > 0).all()
    snapped = shapely.set_precision(polygons, 0.01)
    assert shapely.is_valid(snapped).all() and not shapely.is_empty(snapped).any()
    assert (shapely.get_type_id(snapped) == 3).all()
    # Filling gives every pixel of the mask back; what is filled besides are holes without a diagonal way out.
    filled = rasterise(xy, start, labels.shape)
    solid = np.zeros(labels.shape, bool)
    for i, box in enumerate(ndimage.find_objects(labels), start=1):
        solid[box] |= ndimage.binary_fill_holes(labels[box] == i, np.ones((3, 3)))
    np.testing.assert_array_equal(filled > 0, solid)


def test_rasterise_undoes_trace() -> None:
    labels = hover_instances(synthetic_maps(150, 256, seed=2).hover_maps(), HoverDecode())
    xy, start = trace_outlines(labels, int(labels.max()))
    assert labels.max() > 100
    np.testing.assert_array_equal(rasterise(xy, start, labels.shape), labels)


def test_outline_at_the_edges_of_the_map() -> None:
    labels = np.ones((4, 6), np.int32)
    xy, start = trace_outlines(labels, 1)
    np.testing.assert_array_equal(ring_bounds(xy, start), [[0, 0, 6, 4]])
    assert ring_areas(xy, start)[0] == 4 * 6 - 0.5


def test_bridge_hole_diagonal_and_pieces() -> None:
    bridge = shapely.Polygon(traced("###   ###", "#########", "###   ###"))
    assert bridge.is_valid and bridge.area == 3 * 9 - 6 - 0.5
    hole = shapely.Polygon(traced("#####", "#   #", "#   #", "#####"))
    assert hole.area == 20 - 0.5
    diagonal = shapely.Polygon(traced("##   ", "##   ", "  ###", "  ###"))
    assert diagonal.is_valid and diagonal.area == 6 - 0.5  # two pieces, the larger is taken
    around = shapely.Polygon(traced("#### ", "#  # ", "#   #", "#####"))
    assert around.is_valid


def test_collinear_vertices_are_merged_and_absent_labels_are_empty() -> None:
    labels = np.zeros((30, 30), np.int32)
    labels[5:25, 5:25] = 3
    xy, start = trace_outlines(labels, 4)
    assert np.diff(start).tolist() == [0, 0, 8, 0]
    assert ring_areas(xy, start).tolist() == [0, 0, 399.5, 0]
    assert np.isnan(ring_bounds(xy, start)[[0, 1, 3]]).all()
    empty_xy, empty_start = trace_outlines(np.zeros((5, 5), np.int32), 2)
    assert len(empty_xy) == 0 and empty_start.tolist() == [0, 0, 0]


def test_ring_features_of_an_ellipse_far_from_the_origin() -> None:
    turn = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    a, b, tilt, mpp_x, mpp_y = 12.0, 6.0, 0.7, 0.25, 0.5
    x, y = a * np.cos(turn) * np.cos(tilt) - b * np.sin(turn) * np.sin(tilt), 0.0
    y = a * np.cos(turn) * np.sin(tilt) + b * np.sin(turn) * np.cos(tilt)
    ring = np.stack([x / mpp_x + 180_000.25, y / mpp_y + 95_000.5], axis=1)
    xy, start = np.concatenate([ring, ring[::-1], np.zeros((1, 2))]), np.array([0, 720, 1440, 1440, 1441])
    table = dict(zip(SHAPE_FEATURES, ring_features(xy, start, mpp_x, mpp_y).T, strict=True))
    perimeter = np.hypot(
        *np.diff(
            np.stack(
                [
                    x,
                    y,
                ]
            ),
            axis=1,
            append=np.array([[x[0]], [y[0]]]),
        )
    ).sum()
    want = {
        "area_um2": np.pi * a * b,
        "perimeter_um": perimeter,
        "major_axis_um": 2 * a,
        "minor_axis_um": 2 * b,
        "eccentricity": np.sqrt(1 - (b / a) ** 2),
        "circularity": 4 * np.pi * np.pi * a * b / perimeter**2,
    }
    assert set(want) == set(SHAPE_FEATURES)
    for name, value in want.items():
        np.testing.assert_allclose(table[name], [value, value, 0, 0], rtol=1e-3, err_msg=name)


def test_ring_features_agree_with_masks() -> None:
    from skimage.measure import regionprops_table

    labels = synthetic_maps(40, 256, seed=6).truth
    n = int(labels.max())
    xy, start = trace_outlines(labels, n)
    got = ring_features(xy, start, 1.0, 1.0)
    want = regionprops_table(labels, properties=("area", "axis_major_length", "axis_minor_length", "eccentricity"))
    for column, name in ((0, "area"), (2, "axis_major_length"), (3, "axis_minor_length"), (4, "eccentricity")):
        np.testing.assert_allclose(got[:, column], want[name], rtol=0.02, atol=0.02)


def test_valid_rings_mends_only_what_is_broken() -> None:
    square = [(0.0, 0.0), (4.004, 0.0), (4.0, 4.0), (0.0, 4.0)]
    bow_tie = [(0.0, 0.0), (4.0, 4.0), (4.0, 0.0), (0.0, 2.0)]
    spike = [(0.0, 0.0), (4.0, 0.0), (4.0, 4.0), (4.0, 9.0), (4.0, 4.0), (0.0, 4.0)]
    speck = [(1.0, 1.0), (1.001, 1.0), (1.001, 1.001)]
    line = [(0.0, 0.0), (5.0, 5.0)]
    touch = [(0.0, 0.0), (4.0, 0.0), (2.0, 2.0), (4.0, 4.0), (0.0, 4.0), (2.0, 2.0)]
    xy, start, ok = valid_rings(*rings(square, bow_tie, spike, speck, line, touch))
    assert ok.tolist() == [True, True, True, False, False, True]
    assert np.diff(start)[[3, 4]].tolist() == [0, 0]
    np.testing.assert_array_equal(xy[:4], [(0, 0), (4, 0), (4, 4), (0, 4)])
    polygons = to_polygons(xy, start)[ok]
    assert shapely.is_valid(polygons).all()
    assert not shapely.is_empty(shapely.set_precision(polygons, 0.01)).any()
    np.testing.assert_allclose(shapely.area(polygons), [16, 16 / 3, 16, 4], atol=0.05)
    np.testing.assert_array_equal(xy, np.round(xy, 2))


def test_valid_rings_survives_shrinking_to_the_grid() -> None:
    labels, n = ndimage.label(np.random.default_rng(3).random((60, 60)) < 0.55)
    xy, start = trace_outlines(labels, n)
    for scale in (0.07, 0.31, 1.984):
        small, small_start, ok = valid_rings(xy * scale + 1234.567, start)
        polygons = to_polygons(small, small_start)[ok]
        assert ok.mean() > 0.9
        assert shapely.is_valid(polygons).all() and (shapely.area(polygons) > 0).all()


def test_rasterise_clips_and_later_rings_win() -> None:
    xy, start = rings(
        [(-5, -5), (3, -5), (3, 3), (-5, 3)], [(2, 2), (9, 2), (9, 9), (2, 9)], [(50, 50), (60, 50), (55, 60)]
    )
    got = rasterise(xy, start, (6, 5))
    want = np.zeros((6, 5), int)
    want[:3, :3], want[2:, 2:] = 1, 2
    np.testing.assert_array_equal(got, want)
