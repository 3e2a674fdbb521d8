"""HoverMaps -> Instances: equal to the published form, independent of the tile in "fixed" mode, and sound at the
edges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from cellslide.bench import RawMaps, plain_hover, synthetic_maps
from cellslide.geometry.outlines import ring_areas
from cellslide.nuclei.hover_decode import decode_hover, hover_instances, measure_instances
from cellslide.nuclei.hover_energy import gradient_range
from cellslide.types import HoverDecode, HoverMaps
from tests.reference.hover_published import published_instances

MAGNIFICATIONS = {40: HoverDecode("published", 21, 10), 20: HoverDecode("published", 11, 3)}
OURS = HoverDecode("fixed", kernel_px=11, min_marker_px=3)


def fixture_maps(shared: Path, name: str) -> RawMaps:
    file = shared / "parity" / f"{name}.npz"
    if not file.is_file():
        pytest.skip(f"{name} is not among the shared fixtures")
    with np.load(file) as data:
        return RawMaps(data["np_prob"], data["hv"], data["nt_prob"], data["gen_inst"])


@pytest.mark.parametrize("magnification", [40, 20])
@pytest.mark.parametrize("name", ["pp_clean", "pp_noisy", "pp_dense"])
def test_published_fixtures(shared: Path, name: str, magnification: int) -> None:
    raw = fixture_maps(shared, name)
    with np.load(shared / "parity" / f"{name}.npz") as data:
        want = {key[4:]: data[key] for key in data.files if key.startswith(f"m{magnification}_")}
    labels = hover_instances(raw.hover_maps(), MAGNIFICATIONS[magnification])
    np.testing.assert_array_equal(labels, want["inst"])
    got = published_instances(labels, np.argmax(raw.types, axis=0))
    np.testing.assert_array_equal(got.ids, want["ids"])
    np.testing.assert_array_equal(got.bbox, want["bbox"])
    np.testing.assert_array_equal(got.centroid_xy, want["centroid"])
    np.testing.assert_array_equal(got.type_id, want["type"])
    np.testing.assert_array_equal(got.type_prob, want["type_prob"])
    np.testing.assert_array_equal(np.diff(got.contour_start), want["contour_len"])
    np.testing.assert_array_equal(got.contour_xy, want["contour_xy"])


@pytest.mark.parametrize("magnification", [40, 20])
@pytest.mark.parametrize("n", [60, 160])
def test_equals_the_plain_form_on_crowded_maps(n: int, magnification: int) -> None:
    config = MAGNIFICATIONS[magnification]
    raw = synthetic_maps(n, 384, seed=n, noise=0.12)
    labels, nuclei = plain_hover(raw, config.kernel_px, config.min_marker_px)
    got = hover_instances(raw.hover_maps(), config)
    np.testing.assert_array_equal(got, labels)
    record = published_instances(got, np.argmax(raw.types, axis=0))
    assert [p.type_id for p in nuclei] == record.type_id.tolist()
    assert [p.centroid for p in nuclei] == [tuple(c) for c in record.centroid_xy.tolist()]
    np.testing.assert_array_equal(np.concatenate([p.contour for p in nuclei]), record.contour_xy)


def touching_pair(size: int = 64, noise: float = 0.0) -> RawMaps:
    """Two equal discs, mirror images, that share a border: full of pixels of equal value."""
    rows, cols = np.indices((size, size))
    left = np.hypot(cols - 22, rows - 32) <= 10
    right = np.fliplr(np.roll(left, 1, axis=1))
    truth = np.where(left, 1, np.where(right, 2, 0)).astype(np.int32)
    hv = np.zeros((2, size, size), np.float32)
    for label in (1, 2):
        y, x = np.nonzero(truth == label)
        hv[0, y, x], hv[1, y, x] = (x - x.mean()) / 10, (y - y.mean()) / 10
    foreground = np.stack([truth == 0, truth > 0]).astype(np.float32)
    return RawMaps(foreground, hv, np.stack([truth == 0, truth == 1, truth == 2]).astype(np.float32), truth)


def test_ties_follow_the_plain_form() -> None:
    raw = touching_pair()
    labels, nuclei = plain_hover(raw, 11, 3)
    assert len(nuclei) == 2
    np.testing.assert_array_equal(hover_instances(raw.hover_maps(), MAGNIFICATIONS[20]), labels)


def crop(maps: HoverMaps, top: int, left: int, size: int) -> HoverMaps:
    rows, cols = slice(top, top + size), slice(left, left + size)
    assert maps.type_prob is not None
    return HoverMaps(
        maps.foreground[rows, cols],
        maps.foreground_prob[rows, cols],
        np.ascontiguousarray(maps.hv[:, rows, cols]),
        maps.type_prob[:, rows, cols],
    )


def described(maps: HoverMaps, config: HoverDecode, corner: tuple[int, int], inside: tuple[int, int]) -> list[tuple]:
    """Everything about the nuclei whose outline lies inside a square of the whole map, in the frame of the whole
    map."""
    found = decode_hover(maps, config)
    rows = []
    assert found.contour_xy is not None and found.contour_start is not None and found.class_prob is not None
    for i in range(len(found)):
        ring = found.contour_xy[found.contour_start[i] : found.contour_start[i + 1]] + corner
        if ring.min() >= inside[0] and ring.max() <= inside[1]:
            prob = found.class_prob[i].tobytes()
            rows.append((*(ring[0].tolist()), ring.tobytes(), found.area_px[i], found.score[i], prob))
    return sorted(rows)


@pytest.mark.parametrize("kernel_px", [11, 21])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_fixed_mode_gives_the_same_nuclei_in_a_crop(kernel_px: int, noise: float) -> None:
    maps = synthetic_maps(200, 384, seed=5, radius_px=(6, 12), noise=noise).hover_maps()
    config = HoverDecode("fixed", kernel_px, 3)
    top, left, size, margin = 61, 83, 229, 40
    part = crop(maps, top, left, size)
    # Inside both a nucleus and the whole group it touches, plus the reach of the kernel.
    low, high = max(top, left) + margin, min(top, left) + size - margin
    whole = described(maps, config, (0, 0), (low, high))
    assert len(whole) >= 15
    assert described(part, config, (left, top), (low, high)) == whole


def test_fixed_mode_ignores_what_else_is_in_the_tile() -> None:
    raw = synthetic_maps(40, 256, seed=3, radius_px=(6, 10), noise=0.05)
    raw.foreground[:, :, 200:], raw.hv[:, :, 200:] = [[[1.0]], [[0.0]]], 0.0
    wild = raw.hv.copy()
    wild[0, 100:140:2, 230:240], wild[0, 101:140:2, 230:240] = 2.0, -2.0
    wild[0, :, 245:] = 2.0
    calm, loud = raw.hover_maps(), RawMaps(raw.foreground, wild, raw.types, raw.truth).hover_maps()
    np.testing.assert_array_equal(hover_instances(calm, OURS), hover_instances(loud, OURS))
    published = MAGNIFICATIONS[20]
    assert not np.array_equal(hover_instances(calm, published), hover_instances(loud, published))


def test_touching_small_nuclei_are_split() -> None:
    raw = synthetic_maps(330, 256, seed=8, radius_px=(4, 7), noise=0.05)
    labels = hover_instances(raw.hover_maps(), OURS)
    truth = raw.truth
    touching = ndimage.label(truth > 0)[1]
    n = len(np.unique(truth)) - 1
    assert touching < 0.6 * n  # or the test would show nothing
    pairs, overlap = np.unique(np.stack([truth.ravel(), labels.ravel()]), axis=1, return_counts=True)
    size, found = np.bincount(truth.ravel()), np.bincount(labels.ravel())
    iou = overlap / (size[pairs[0]] + found[pairs[1]] - overlap)
    matched = np.count_nonzero((iou > 0.5) & (pairs > 0).all(axis=0))
    assert matched >= 0.97 * n
    assert len(np.unique(labels)) - 1 <= 1.03 * n


def test_gradient_range_is_the_answer_to_a_step() -> None:
    import cv2

    step = np.zeros((64, 64))
    step[:, 32:] = 1.0
    ramp = np.tile(np.arange(64.0), (64, 1))
    for kernel in (11, 21):
        unit = cv2.Sobel(ramp, cv2.CV_64F, 1, 0, ksize=kernel)[32, 32]
        peak = cv2.Sobel(step, cv2.CV_64F, 1, 0, ksize=kernel).max() / unit
        assert gradient_range(kernel) == pytest.approx((-2 * peak, peak))


def test_hv_gradient_range_is_used() -> None:
    maps = synthetic_maps(60, 192, seed=2, radius_px=(5, 8)).hover_maps()
    strict = HoverDecode("fixed", 11, 3, hv_gradient_range=(-0.05, 0.6))
    assert len(decode_hover(maps, strict)) < len(decode_hover(maps, OURS))


@pytest.mark.parametrize("mode", ["published", "fixed"])
def test_areas_scores_and_classes(mode: str) -> None:
    raw = synthetic_maps(80, 320, seed=4)
    maps = raw.hover_maps()
    found = decode_hover(maps, HoverDecode(mode, 21, 10))  # type: ignore[arg-type]
    labels = hover_instances(maps, HoverDecode(mode, 21, 10))  # type: ignore[arg-type]
    assert found.contour_xy is not None and found.contour_start is not None and found.class_prob is not None
    assert len(found) == len(np.unique(labels)) - 1 >= 75
    share = ring_areas(found.contour_xy, found.contour_start) / found.area_px
    assert abs(share.mean() - 1) < 0.03
    ids = np.unique(labels)[1:]
    for i in (0, len(ids) // 2, len(ids) - 1):
        mask = labels == ids[i]
        rows, cols = np.nonzero(mask)
        assert found.area_px[i] == mask.sum()
        np.testing.assert_allclose(found.centroid_xy[i], (cols.mean() + 0.5, rows.mean() + 0.5))
        np.testing.assert_allclose(found.score[i], maps.foreground_prob[mask].astype(float).mean(), rtol=1e-6)
        assert maps.type_prob is not None
        mean = maps.type_prob[1:, mask].astype(float).mean(axis=1)
        np.testing.assert_allclose(found.class_prob[i], mean / mean.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.class_prob.sum(axis=1), 1, rtol=1e-6)


def test_cut_marks_what_touches_the_edge() -> None:
    labels = np.zeros((40, 50), np.int32)
    labels[0:5, 10:15], labels[10:15, 0:5], labels[35:40, 10:15], labels[10:15, 45:50], labels[20:25, 20:25] = (
        1,
        2,
        3,
        4,
        5,
    )
    maps = HoverMaps((labels > 0).astype(np.uint8), np.ones((40, 50), np.float16), np.zeros((2, 40, 50), np.float32))
    found = measure_instances(labels, maps)
    assert found.cut.tolist() == [True, True, True, True, False]
    assert found.class_prob is None


def test_only_background_types_give_even_odds() -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[5:12, 5:12] = 7
    types = np.zeros((5, 20, 20), np.float16)
    types[0] = 1
    maps = HoverMaps(
        (labels > 0).astype(np.uint8), np.ones((20, 20), np.float16), np.zeros((2, 20, 20), np.float32), types
    )
    np.testing.assert_allclose(measure_instances(labels, maps).class_prob, [[0.25] * 4])
    record = published_instances(labels, np.zeros((20, 20), np.int32))
    assert record.ids.tolist() == [7] and record.type_id.tolist() == [0]


def test_background_majority_takes_the_second_class() -> None:
    labels = np.zeros((12, 12), np.int32)
    labels[2:8, 2:8] = 1
    types = np.zeros((12, 12), np.int32)
    types[2:4, 2:8], types[4, 2:7] = 2, 3
    record = published_instances(labels, types)
    assert record.type_id.tolist() == [2]
    assert record.type_prob[0] == pytest.approx(12 / 36, rel=1e-6)


@pytest.mark.parametrize("mode", ["published", "fixed"])
@pytest.mark.parametrize("shape", [(64, 64), (33, 97), (16, 16)])
def test_empty_and_full_maps(mode: str, shape: tuple[int, int]) -> None:
    config = HoverDecode(mode, 11, 3)  # type: ignore[arg-type]
    for value in (0, 1):
        foreground = np.full(shape, value, np.uint8)
        hv = np.zeros((2, *shape), np.float32)
        maps = HoverMaps(foreground, foreground.astype(np.float16), hv, np.ones((3, *shape), np.float16))
        found = decode_hover(maps, config)
        assert len(found) in (0, value)
        assert found.contour_start is not None and len(found.contour_start) == len(found) + 1
        assert found.class_prob is not None and found.class_prob.shape == (len(found), 2)


def test_specks_are_dropped_and_foreground_threshold_counts() -> None:
    raw = touching_pair()
    maps = raw.hover_maps()
    maps.foreground[2:5, 2:5] = 1  # nine pixels
    assert hover_instances(maps, OURS)[:8, :8].max() == 0
    doubtful = HoverMaps(maps.foreground, (maps.foreground * 0.7).astype(np.float16), maps.hv, maps.type_prob)
    assert len(decode_hover(doubtful, replace(OURS, foreground_threshold=0.6))) == 2
    assert len(decode_hover(doubtful, replace(OURS, foreground_threshold=0.8))) == 0
