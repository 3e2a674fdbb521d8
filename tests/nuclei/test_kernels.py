"""The compiled form of decoding gives what the plain one gives, to the last bit, whatever the maps look like."""

from __future__ import annotations

from dataclasses import fields

import cv2
import numpy as np
import pytest
from scipy import ndimage

from cellslide.bench import synthetic_maps
from cellslide.bench.decode import identical
from cellslide.geometry import kernels
from cellslide.geometry.outlines import trace_outlines
from cellslide.nuclei import hover_decode as decode
from cellslide.nuclei import hover_reference as plain
from cellslide.nuclei.hover_energy import sobel_kernels, stretch
from cellslide.types import HoverDecode, HoverMaps, Instances, Int32

if not kernels.available():
    pytest.skip(f"no compiled kernels here: {kernels.why_not()}", allow_module_level=True)

from cellslide.geometry import label_kernels as shape_kernels
from cellslide.nuclei import gradient_kernels
from cellslide.nuclei import hover_labels as compiled_form
from cellslide.nuclei import watershed_kernels as label_kernels

CONFIGS = [
    HoverDecode("published", 21, 10),
    HoverDecode("published", 11, 3),
    HoverDecode("fixed", 21, 10),
    HoverDecode("fixed", 11, 3),
    HoverDecode("fixed", 5, 3, min_object_px=1, energy_threshold=0.3, foreground_threshold=0.7),
]
SHAPES = [(64, 64), (97, 33), (31, 130), (5, 7), (1, 9), (9, 1)]


def random_maps(shape: tuple[int, int], seed: int, steps: int = 0, typed: bool = True) -> HoverMaps:
    """Smooth noise as maps: blobs with holes, specks and borders; values of `steps` levels are full of ties."""
    rng = np.random.default_rng(seed)

    def smooth(*lead: int, sigma: float) -> np.ndarray:
        field = ndimage.gaussian_filter(rng.standard_normal((*lead, *shape)), (*(0 for _ in lead), sigma, sigma))
        return field / (np.abs(field).max() + 1e-9)

    prob = np.clip(0.5 + 2 * smooth(sigma=2.0), 0, 1).astype(np.float16)
    hv = smooth(2, sigma=1.5)
    hv = np.round(hv * steps) / steps if steps else hv
    types = np.abs(smooth(4, sigma=3.0)).astype(np.float16) if typed else None
    return HoverMaps((prob > 0.5).astype(np.uint8), prob, hv.astype(np.float32), types)


def both(maps: HoverMaps, config: HoverDecode) -> tuple[Instances, Instances]:
    compiled = decode.decode_hover(maps, config)
    with kernels.left_out():
        return compiled, decode.decode_hover(maps, config)


def assert_same(one: Instances, other: Instances) -> None:
    for field in fields(Instances):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.mode}-{c.kernel_px}")
def test_both_forms_agree_on_drawn_nuclei(config: HoverDecode) -> None:
    maps = synthetic_maps(150, 320, seed=9, noise=0.1).hover_maps()
    one, other = both(maps, config)
    assert len(one) > 100
    assert_same(one, other)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.mode}-{c.kernel_px}")
@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_agree_on_noise(config: HoverDecode, shape: tuple[int, int]) -> None:
    for seed in range(3):
        assert_same(*both(random_maps(shape, seed, typed=seed > 0), config))


@pytest.mark.parametrize("mode", ["published", "fixed"])
def test_both_forms_agree_where_markers_tie(mode: str) -> None:
    maps = random_maps((80, 90), 4, steps=2)
    config = HoverDecode(mode, 5, 1, energy_threshold=0.6)  # type: ignore[arg-type]
    runs, n = label_kernels.components(maps.foreground, 1, config.min_object_px)
    energy = compiled_form._energy(maps.hv, runs, config)
    level, blob, calm = label_kernels.lay_out(runs, energy, config.energy_threshold, maps.foreground.shape)
    markers, _ = label_kernels.components(compiled_form._opened(calm), 1, config.min_marker_px)
    _, whole = label_kernels.flood(runs, n, markers, level, blob, False)
    assert not whole  # or the maps would show nothing
    assert_same(*both(maps, config))


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("shape", [(40, 64), (33, 61), (1, 5), (7, 1)])
def test_components_are_those_of_scipy(shape: tuple[int, int], value: int) -> None:
    mask = (np.random.default_rng(shape[0]).random(shape) < 0.55).astype(np.uint8)
    want, n = ndimage.label(mask == value)
    runs, found = label_kernels.components(mask, value, 4)
    assert found == n
    large = np.bincount(want.ravel(), minlength=n + 1) >= 4
    large[0] = False
    got = np.zeros(shape, np.int32)
    for row, begin, end, group in zip(runs.row, runs.begin, runs.end, runs.group, strict=True):
        got[row, begin:end] = group + 1
    np.testing.assert_array_equal(got, np.where(large[want], want, 0))
    assert np.repeat(np.arange(shape[0]), np.diff(runs.row_start)).tolist() == runs.row.tolist()


@pytest.mark.parametrize("kernel_px", [3, 5, 7, 11, 21, 31])
@pytest.mark.parametrize("shape", [(48, 50), (6, 40), (2, 2)])
def test_gradient_is_opencvs_bit_for_bit(kernel_px: int, shape: tuple[int, int]) -> None:
    image = stretch(np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    mask = (np.random.default_rng(2).random(shape) < 0.6).astype(np.uint8)
    runs, _ = label_kernels.components(mask, 1, 1)
    derive, smooth = sobel_kernels(kernel_px)
    for axis, (along, across) in enumerate([(derive, smooth), (smooth, derive)]):
        want = cv2.Sobel(image, cv2.CV_64F, 1 - axis, axis, ksize=kernel_px)
        got = gradient_kernels.gradient(image, runs, along, across, axis == 1)
        if kernel_px > 5:
            np.testing.assert_array_equal(got[:-2], want[mask > 0])
            assert got[-2:].tolist() == [want.min(), want.max()]
        else:  # OpenCV has shortcuts for small kernels, with another order of sums
            np.testing.assert_allclose(got[:-2], want[mask > 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("density", [0.3, 0.6, 0.85])
def test_outlines_are_those_of_the_plain_form(density: float) -> None:
    rng = np.random.default_rng(5)
    labels = np.where(rng.random((60, 47)) < density, rng.integers(1, 7, (60, 47)), 0)
    labels[20:40, 10:30] = np.where(rng.random((20, 20)) < 0.9, 9, 3)
    labels = labels.astype(np.int32)
    got = trace_outlines(labels, 12)
    with kernels.left_out():
        want = trace_outlines(labels, 12)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_maps_that_do_not_fit_each_other_are_refused() -> None:
    good = synthetic_maps(20, 96).hover_maps()
    labels = plain.hover_labels(good, HoverDecode())
    assert good.type_prob is not None
    for bad in (
        HoverMaps(good.foreground, good.foreground_prob, good.hv[:, :50], good.type_prob),
        HoverMaps(good.foreground, good.foreground_prob[:, :50], good.hv, good.type_prob),
        HoverMaps(good.foreground, good.foreground_prob, good.hv, good.type_prob[:, :50]),
        HoverMaps(good.foreground, good.foreground_prob, good.hv[:1], good.type_prob),
    ):
        with pytest.raises(ValueError, match="96, 96"):
            decode.hover_instances(bad, HoverDecode())
        with pytest.raises(ValueError, match="96, 96"):
            decode.measure_instances(labels, bad)
    for wrong in (np.full((4, 4), 3, np.int32), np.full((4, 4), -1, np.int32)):
        with pytest.raises(ValueError, match="label"):
            shape_kernels.trace(wrong, 2)


def test_parts_of_maps_and_read_only_maps_are_taken_and_nothing_is_compiled_for_them() -> None:
    decode.prepare()
    compiled = [label_kernels.components, gradient_kernels.gradient, label_kernels.lay_out, label_kernels.flood]
    compiled += [label_kernels.fill_holes, shape_kernels.measure, shape_kernels.trace]
    before = [len(kernel.signatures) for kernel in compiled]
    maps = synthetic_maps(60, 200, seed=3).hover_maps()
    assert maps.type_prob is not None
    want = decode.decode_hover(cut(maps, copy=True), CONFIGS[3])
    part = cut(maps, copy=False)
    for column in (part.foreground, part.foreground_prob, part.hv, part.type_prob):
        assert column is not None
        column.flags.writeable = False
    assert_same(decode.decode_hover(part, CONFIGS[3]), want)
    decode.decode_hover(part, CONFIGS[0])
    assert [len(kernel.signatures) for kernel in compiled] == before


def cut(maps: HoverMaps, copy: bool) -> HoverMaps:
    parts = (maps.foreground, maps.foreground_prob, maps.hv, maps.type_prob)
    cropped = [part[..., 13:150, 40:181] for part in parts if part is not None]
    return HoverMaps(*(part.copy() if copy else part for part in cropped))


def test_hv_steps_hold_and_round() -> None:
    hv = np.array([[-9.0, -2.0, -0.4, 0.125], [0.5, 1.99, 2.5, np.nan]], np.float32)
    out = np.empty_like(hv)
    gradient_kernels.hv_steps(hv, 2.0, 8.0, out)
    np.testing.assert_array_equal(out, np.rint(np.clip(hv, -2, 2) * np.float32(8)))


def test_nan_maps_do_no_harm() -> None:
    maps = synthetic_maps(20, 128, seed=1).hover_maps()
    maps.hv[:, 40:60, 40:60] = np.nan
    for config in CONFIGS:
        labels: Int32 = decode.hover_instances(maps, config)
        assert labels.shape == (128, 128) and labels.min() >= 0


def test_share_of_identical_nuclei_counts_pixels_not_numbers() -> None:
    want = np.zeros((6, 12), np.int32)
    want[1:3, 1:4], want[1:3, 5:8], want[4, 1:5], want[4, 7:10] = 1, 2, 3, 7
    got = np.where(want > 0, want + 4, 0).astype(np.int32)
    assert identical(want, got) == 1.0 and identical(want, want) == 1.0
    got[1, 5] = 0  # one loses a pixel
    got[4, 5] = got[4, 1]  # one gains one
    assert identical(want, got) == 0.5
    got[4, 7:10] = got[1, 1]  # two become one
    assert identical(want, got) == 0.0
