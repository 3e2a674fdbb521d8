"""Crops: what a region gives is what reading each crop alone gives, and what the whole picture shows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from cellslide.inference.crops import (
    CropCutter,
    crop_corners,
    cut_naive,
    fit_crops,
    grid_centres,
    inside_span,
    mirrored,
    plan_regions,
    read_region,
)
from cellslide.slides.slide import Slide, open_slide, slide_from_array
from cellslide.types import CropSpec, Float64, Plane, UInt8
from tests.painted import write_pyramid

CPU = torch.device("cpu")
SPECS = (
    CropSpec(16, 16, "reflect"),
    CropSpec(15, 15, "zero"),
    CropSpec(48, 12, "zero", "area"),
    CropSpec(48, 18, "reflect", "bilinear"),
    CropSpec(40, 15, "reflect", "area"),
)


@pytest.fixture(scope="module")
def picture() -> UInt8:
    return np.random.default_rng(0).integers(0, 256, (150, 230, 3), dtype=np.uint8)


def places(width: int, height: int, n: int = 60) -> Float64:
    """Random places, and the corners, edges and halves where rounding decides."""
    rng = np.random.default_rng(1)
    rim = [(0, 0), (width, height), (0.5, height - 0.5), (width - 1, 0), (width / 2, 0), (64.5, 64.5), (65.5, 64.5)]
    return np.concatenate([np.array(rim, np.float64), rng.uniform(0, (width, height), (n, 2))])


def cut_by_region(slide: Slide, plane: Plane, xy: Float64, spec: CropSpec, region_px: int) -> torch.Tensor:
    corners = crop_corners(xy, spec.field_px)
    out = torch.full((len(xy), 3, spec.input_px, spec.input_px), torch.nan)
    for region in plan_regions(xy, [(corners, spec.field_px)], region_px):
        cutter = CropCutter(read_region(slide, plane, region.box, (spec.border,)), plane, CPU)
        out[torch.from_numpy(region.rows)] = cutter.cut(corners[region.rows], spec)
    return out


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("mpp", [0.25, 0.4], ids=["level0", "resampled"])
def test_regions_give_what_each_read_gives(picture: UInt8, spec: CropSpec, mpp: float) -> None:
    slide = slide_from_array(picture, 0.25)
    plane = Plane.of(slide.info, mpp)
    xy = plane.from_level0(places(230, 150))
    naive = cut_naive(slide, plane, xy, spec)
    assert naive.shape == (len(xy), 3, spec.input_px, spec.input_px)
    for region_px in (32, 64, 1000):
        assert torch.equal(cut_by_region(slide, plane, xy, spec, region_px), naive)


@pytest.mark.parametrize("border", ["zero", "reflect"])
@pytest.mark.parametrize("field", [16, 31])
def test_crops_show_the_picture_with_its_border(picture: UInt8, border: str, field: int) -> None:
    slide = slide_from_array(picture, 0.25)
    plane = Plane.of(slide.info, 0.25)
    xy = places(230, 150)
    mode = {"zero": {"mode": "constant"}, "reflect": {"mode": "reflect"}}[border]
    padded = np.pad(picture, ((64, 64), (64, 64), (0, 0)), **mode)
    crops = cut_by_region(slide, plane, xy, CropSpec(field, field, border), 64).numpy()
    for crop, (x, y) in zip(crops, xy, strict=True):
        # Python's round is the rule: halves to even.
        x0, y0 = round(x - field / 2) + 64, round(y - field / 2) + 64
        np.testing.assert_array_equal(crop.transpose(1, 2, 0), padded[y0 : y0 + field, x0 : x0 + field])


def test_a_slide_smaller_than_the_field_is_mirrored_again_and_again() -> None:
    small = np.random.default_rng(2).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    slide = slide_from_array(small, 0.25)
    plane = Plane.of(slide.info, 0.25)
    xy = np.array([[5.0, 3.0], [0.0, 0.0], [10.0, 7.0]])
    spec = CropSpec(40, 40, "reflect")
    crops = cut_by_region(slide, plane, xy, spec, 64)
    padded = np.pad(small, ((40, 40), (40, 40), (0, 0)), mode="reflect")
    for crop, (x, y) in zip(crops.numpy(), xy, strict=True):
        x0, y0 = round(x - 20) + 40, round(y - 20) + 40
        np.testing.assert_array_equal(crop.transpose(1, 2, 0), padded[y0 : y0 + 40, x0 : x0 + 40])
    assert torch.equal(crops, cut_naive(slide, plane, xy, spec))


def test_a_real_pyramid_is_cut_at_its_pixel_size(tmp_path: Path, picture: UInt8) -> None:
    write_pyramid(tmp_path / "s.tif", picture, 0.25, level_downsamples=(1, 2))
    with open_slide(tmp_path / "s.tif") as slide:
        plane = Plane.of(slide.info, 0.5)
        xy = plane.from_level0(places(230, 150))
        spec = CropSpec(24, 12, "reflect")
        assert torch.equal(cut_by_region(slide, plane, xy, spec, 64), cut_naive(slide, plane, xy, spec))


def test_every_cell_belongs_to_one_region() -> None:
    xy = np.random.default_rng(3).uniform(0, (5000, 900), (400, 2))
    corners = [(crop_corners(xy, 224), 224), (crop_corners(xy, 1024), 1024)]
    regions = list(plan_regions(xy, corners, 1024))
    assert len(regions) == 5
    assert sorted(np.concatenate([r.rows for r in regions]).tolist()) == list(range(400))
    for region in regions:
        low, high = corners[1][0][region.rows].min(axis=0), corners[1][0][region.rows].max(axis=0) + 1024
        assert region.box == (*low.tolist(), *high.tolist())
    assert not list(plan_regions(np.empty((0, 2)), [(np.empty((0, 2), np.int64), 224)]))


def test_a_crop_outside_its_region_is_refused(picture: UInt8) -> None:
    slide = slide_from_array(picture, 0.25)
    plane = Plane.of(slide.info, 0.25)
    cutter = CropCutter(read_region(slide, plane, (10, 10, 50, 50), ("zero",)), plane, CPU)
    cutter.cut(np.array([[34, 34]]), CropSpec(16, 16, "zero"))
    with pytest.raises(ValueError, match="leaves the region"):
        cutter.cut(np.array([[35, 34]]), CropSpec(16, 16, "zero"))


@pytest.mark.parametrize("size", [1, 2, 9])
def test_mirroring_is_numpys(size: int) -> None:
    line = np.arange(size)
    expected = np.pad(line, 30, mode="reflect") if size > 1 else np.zeros(61, int)
    np.testing.assert_array_equal(mirrored(np.arange(-30, size + 30), size), expected)


def test_the_span_holds_what_is_mirrored() -> None:
    for size in (1, 7, 50):
        for first in range(-60, 60, 3):
            for field in (1, 8, 41):
                low, high = inside_span(first, first + field, size, "reflect")
                shown = mirrored(np.arange(first, first + field), size)
                assert (0 <= low <= shown.min() and shown.max() < high <= size) or first >= size or first + field <= 0


def test_resampling_is_what_it_is_called() -> None:
    crops = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (3, 3, 24, 24), dtype=np.uint8))
    published = functional.interpolate(crops.float(), size=(9, 9), mode="bilinear", align_corners=False)
    assert torch.equal(fit_crops(crops, CropSpec(24, 9, resample="bilinear")), published)
    halves = crops.float().reshape(3, 3, 12, 2, 12, 2).mean(dim=(3, 5))
    np.testing.assert_allclose(fit_crops(crops, CropSpec(24, 12)), halves, rtol=1e-5)
    # Means over 8/3 pixels: what each output covers adds up to the whole.
    thirds = fit_crops(crops, CropSpec(24, 9))
    np.testing.assert_allclose(thirds.mean(dim=(2, 3)), crops.float().mean(dim=(2, 3)), rtol=1e-5)
    first = (crops[:, :, 0].float() * 1)[..., :3] @ torch.tensor([1.0, 1.0, 2 / 3]) / (8 / 3)
    row = fit_crops(crops[:, :, :1].expand(-1, -1, 24, -1), CropSpec(24, 9))[:, :, 0, 0]
    np.testing.assert_allclose(row, first, rtol=1e-5)
    assert fit_crops(crops, CropSpec(24, 24)).dtype == torch.float32


def test_grid_centres_lie_in_the_middle_of_boxes() -> None:
    xy = np.array([[0.0, 0.0], [63.9, 64.0], [130.0, 10.0]])
    np.testing.assert_array_equal(grid_centres(xy, 64), [[32, 32], [32, 96], [160, 32]])
    assert crop_corners(grid_centres(xy, 64), 512)[0, 0] == math.floor(32 - 256)
