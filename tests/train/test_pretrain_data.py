"""What a pretraining sees: fields of data sets and slides, views at a physical size, nuclei by one index for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.config import OutputConfig, SegmentConfig, TissueConfig
from cellslide.errors import UsageError
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import segment_slide
from cellslide.slides.inputs import SlideInput
from cellslide.train.pixels import OnSlide
from cellslide.train.pretrain.data import BoxCrops, MuseViews, ShardedDraws, crop_to, sample_views, shown_boxes, side_of
from cellslide.train.pretrain.fields import Sources, load_fields, places_of
from cellslide.train.pretrain.recipe import CellDETRPretrainRecipe, MuseRecipe, ViewConfig
from tests.classify.test_rows import INFER
from tests.painted import DISC, paint_slide
from tests.support.fakes import fake_model
from tests.support.pretrain_sets import PLAIN, grey_field, grey_of, grey_sets
from tests.support.train_sets import write_set

VIEWS = ViewConfig(0, 64, 32, 3, (0.7, 1.1), (0.4, 0.8), 1.5)
RECIPE = MuseRecipe(mpp=0.5, field_px=200, min_nuclei=1)


def _recipe(**changes: object) -> MuseRecipe:
    settings = {"batch_size": 2, "epochs": 2, "epoch_samples": 4, "max_nuclei": 12, "views": (VIEWS,), "augment": PLAIN}
    return MuseRecipe(**{**settings, **changes})


@pytest.mark.parametrize("seed", range(4))
def test_a_nucleus_has_one_index_in_every_view(seed: int) -> None:
    """The grey value under a nucleus tells which it is, whatever scale, place, flip and turn the view has."""
    field = grey_field()
    views = sample_views(np.random.default_rng(seed), field, VIEWS, PLAIN)
    assert [len(v.image) for v in views] == [64, 64, 32, 32, 32] and len(views[0].index) > 1
    for view in views:
        for (x, y), nucleus in zip(view.xy, view.index, strict=True):
            if 3 < min(x, y) and max(x, y) < len(view.image) - 3:
                assert abs(int(view.image[int(y), int(x), 0]) - grey_of(nucleus)) <= 1
    shared = set(views[0].index) & set(views[1].index)
    assert shared and any(set(views[0].index) - set(v.index) for v in views)


def test_a_view_covers_what_its_pixel_size_says() -> None:
    field = grey_field(mpp=0.25)
    assert side_of(0.5, 64, field) == 128
    assert side_of(5.0, 64, field) == 160, "a field that is too small is shown whole"
    view = crop_to(field.pixels.read((0, 0, 160, 160)), field.xy, 128, (10, 4), 64)
    assert view.xy[0] == pytest.approx((8.5 / 2, 10.5 / 2)) and view.index[0] == 0
    assert abs(int(view.image[5, 4, 0]) - grey_of(0)) <= 1


def test_samples_are_padded_tables_that_only_the_draw_decides() -> None:
    first, again = (MuseViews(grey_sets(), _recipe())[5] for _ in range(2))
    other = MuseViews(grey_sets(), _recipe())[6]
    assert first.global_.shape == (2, 3, 64, 64) and first.local.shape == (3, 3, 32, 32)
    assert first.xy.shape == (5, 12, 2) and first.seen.shape == (5, 12)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.global_, other.global_)
    # A nucleus takes part only where a global view, which the teacher sees, shows it.
    assert not (first.seen.any(0) & ~first.seen[:2].any(0)).any() and first.seen[:2].any()
    capped = MuseViews(grey_sets(), _recipe(max_nuclei=2))[5]
    assert capped.seen[:2].any(0).all() and capped.seen.shape == (5, 2)


def test_views_grow_with_the_epoch() -> None:
    wide = ViewConfig(1, 96, 48, 0, (0.5, 0.5), (0.5, 0.5))
    views = MuseViews(grey_sets(), _recipe(views=(VIEWS, wide)))
    assert views[3].global_.shape[-1] == 64 and views[4].global_.shape[-1] == 96
    assert views[4].local.shape == (0, 3, 48, 48)
    with pytest.raises(UsageError, match=r"views\.from_epoch"):
        _recipe(views=(wide,))


def test_boxes_follow_their_nuclei() -> None:
    recipe = CellDETRPretrainRecipe(crop_px=96, mpp=0.4, batch_size=2, epochs=1, epoch_samples=2, augment=PLAIN)
    for draw in range(4):
        crop = BoxCrops(grey_sets(), recipe)[draw]
        boxes = crop.boxes[crop.valid].numpy() * 96
        whole = [box for box in boxes if (box[:2] - box[2:] / 2 > 1).all() and (box[:2] + box[2:] / 2 < 95).all()]
        assert whole
        for cx, cy, w, h in whole:
            pixels = crop.image[0].numpy().astype(int)
            near = np.hypot(*np.mgrid[0:96, 0:96][::-1] - np.array([cx, cy])[:, None, None]) < w
            rows, cols = np.nonzero((np.abs(pixels - pixels[int(cy), int(cx)]) < 3) & near)
            # Resampling blends the outermost pixels, on both sides alike.
            middle = (cols.min() + cols.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
            assert middle == pytest.approx((cx, cy), abs=0.8)
            assert (np.ptp(cols) + 1, np.ptp(rows) + 1) == pytest.approx((w, h), abs=3.2)


def test_points_get_boxes_and_slivers_none() -> None:
    recipe = CellDETRPretrainRecipe(crop_px=160, mpp=0.5, box_um=8.0, batch_size=2, epochs=1, epoch_samples=2)
    sets = [type(s)(s.name, s.weight, (grey_field(boxes=False),)) for s in grey_sets()]
    crop = BoxCrops(sets, recipe)[0]
    assert crop.boxes[crop.valid].numpy()[:, 2:] * 160 == pytest.approx(16, abs=1e-3)
    corners = np.array([[[-10, 5], [2, 15]], [[-10, 5], [4, 15.0]]])
    assert shown_boxes(corners, 20) == pytest.approx(np.array([[0.1, 0.5, 0.2, 0.5]]))


def test_devices_share_the_draws_of_each_step() -> None:
    alone = ShardedDraws(3, 4, 0, 1)
    pair = [ShardedDraws(3, 4, rank, 2) for rank in range(2)]
    for sampler in (alone, *pair):
        sampler.set_epoch(2)
    mixed = [list(s) for s in pair]
    steps = [mixed[0][2 * k : 2 * k + 2] + mixed[1][2 * k : 2 * k + 2] for k in range(3)]
    assert sum(steps, []) == list(alone) == list(range(24, 36)) and len(pair[0]) == 6


def test_data_sets_give_places_from_masks_and_points(tmp_path: Path) -> None:
    rows = [{"patient": "A"}, {"patient": "B", "split": "test"}]
    masks = write_set(tmp_path / "masks", rows)
    points = write_set(tmp_path / "points", rows[:1], masks=False, points=True)
    found = load_fields(Sources((str(masks), str(points))), RECIPE)
    assert [(s.name, len(s.fields), s.n_nuclei) for s in found] == [("masks", 1, 8), ("points", 1, 8)]
    of_mask, of_point = (s.fields[0] for s in found)
    assert np.isnan(of_point.box_xyxy).all() and of_mask.mpp == 0.5
    order = np.lexsort(of_point.xy.T), np.lexsort(np.round(of_mask.xy).T)
    assert of_mask.xy[order[1]] == pytest.approx(of_point.xy[order[0]], abs=0.2)
    assert (of_mask.box_xyxy[:, 2:] - of_mask.box_xyxy[:, :2] == 10).all()
    with pytest.raises(UsageError, match="min_nuclei"):
        load_fields(Sources((str(masks),)), replace(RECIPE, min_nuclei=9))


def test_boxes_of_masks_are_half_open_and_skip_what_is_not_known() -> None:
    mask = np.zeros((20, 30), np.int32)
    mask[3:7, 5:15], mask[10:12, 0:4], mask[0:2, 20:30] = 4, 9, 65535
    xy, box = places_of(mask)
    assert box.tolist() == [[5, 3, 15, 7], [0, 10, 4, 12]] and xy.tolist() == [[10, 5], [2, 11]]


def test_slides_give_fields_of_the_nuclei_that_segment_found(tmp_path: Path) -> None:
    places = [(x, y) for y in range(30, 300, 40) for x in range(30, 500, 40)]
    paint_slide(tmp_path / "s.tif", 520, 310, 0.25, places, 9.0, background="tissue")
    with pytest.raises(UsageError, match="--nuclei"):
        load_fields(Sources((str(tmp_path / "s.tif"),), tmp_path), RECIPE)
    settings = SegmentConfig(tissue=TissueConfig(enabled=False), infer=INFER, output=OutputConfig(formats=("zarr",)))
    with open_segmenter(fake_model(), settings) as segmenter:
        segment_slide(SlideInput(tmp_path / "s.tif", slide_id="s"), segmenter, tmp_path / "out")
    given = Sources((str(tmp_path / "s.tif"),), tmp_path / "out")
    by_output = load_fields(Sources((str(tmp_path / "out"),)), RECIPE)[0]
    fields = load_fields(given, RECIPE)[0].fields
    assert by_output.name == "slides" and len(by_output.fields) == len(fields) == 2
    assert sum(len(f.xy) for f in fields) == len(places)
    for field in fields:
        assert isinstance(field.pixels, OnSlide) and field.mpp == 0.5 and field.height_px == 155
        pixels = field.pixels.read((0, 0, field.width_px, field.height_px))
        assert pixels.shape == (field.height_px, field.width_px, 3)
        at = pixels[field.xy[:, 1].astype(int), field.xy[:, 0].astype(int)].astype(int)
        assert np.abs(at - DISC).max() < 12
        size = field.box_xyxy[:, 2:] - field.box_xyxy[:, :2]
        assert size == pytest.approx(9, abs=1.6), "18 px at 0.25 are 9 at 0.5"
