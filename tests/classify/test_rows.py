"""Typing of a slide: what the crops show, whatever the order, batch, grouping, grid, interruption or rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellslide.classify import Classifier, classify_array, open_classifier, prepare
from cellslide.classify.columns import Rule
from cellslide.classify.decision import DecisionConfig
from cellslide.classify.engine import Seconds
from cellslide.classify.slide import estimate, in_time
from cellslide.config import ClassifyConfig, InferConfig, OutputConfig
from cellslide.errors import CellslideError, UsageError
from cellslide.inference.crops import REGION_PX
from cellslide.slides.slide import slide_from_array
from cellslide.types import Calibration, PathProbs, Plane, UInt8
from cellslide.weights.organs import Organ
from tests.support.fake_classifier import SPEC, FakeNuClass, fake_loaded

NAMES = ("pink", "blue")
BREAST = Organ("breast", 0)
INFER = InferConfig(device="cpu", batch_size=4, workers=0)
OUTPUT = OutputConfig(formats=("zarr", "geojson"))


def config(**changes: object) -> ClassifyConfig:
    return ClassifyConfig(**{"infer": INFER, "output": OUTPUT, **changes})


def classifier(
    module: FakeNuClass | None = None, spec: dict[str, object] | None = None, **changes: object
) -> Classifier:
    return open_classifier(fake_loaded(module, **(spec or {})), config(**changes))


def rule(gate: str = "mix", calibration: Calibration = SPEC.calibration, **changes: object) -> Rule:
    taxonomy = changes.pop("taxonomy", None)
    return Rule(DecisionConfig(gate, **changes), calibration, NAMES, taxonomy)


@pytest.fixture(scope="module")
def picture() -> UInt8:
    return np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def xy() -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.concatenate([rng.uniform(0, (500, 300), (90, 2)), [[0, 0], [500, 300], [499.5, 0], [250, 150]]])


def typed(c: Classifier, image: UInt8, places: np.ndarray, organ: int = 0) -> PathProbs:
    return classify_array(c, image, SPEC.mpp, places, organ)


def assert_same(a: PathProbs, b: PathProbs, rows: np.ndarray | slice = slice(None)) -> None:
    for name in ("local", "global_", "gate"):
        np.testing.assert_array_equal(getattr(a, name)[rows], getattr(b, name), err_msg=name)


def expected(image: UInt8, x: float, y: float) -> tuple[np.ndarray, np.ndarray, float]:
    """What the fake network says of a cell, from the pixels by numpy alone."""
    padded = np.pad(image, ((64, 64), (64, 64), (0, 0)), mode="reflect").astype(np.float64) / 255
    parts = []
    for field, trim in ((16, 4), (64, 0)):
        x0, y0 = round(x - field / 2) + 64, round(y - field / 2) + 64
        crop = padded[y0 + trim : y0 + field - trim, x0 + trim : x0 + field - trim]
        parts.append(crop.mean(axis=(0, 1)))
    probs = []
    for mean in parts:
        margin = 10 * (mean[2] - mean[0])
        probs.append(np.exp([-margin, margin]) / np.exp([-margin, margin]).sum())
    return probs[0], probs[1], float(parts[1][1])


def test_each_cell_gets_what_its_crops_show(picture: UInt8, xy: np.ndarray) -> None:
    probs = typed(classifier(), picture, xy)
    for i, (x, y) in enumerate(xy):
        local, global_, gate = expected(picture, x, y)
        np.testing.assert_allclose(probs.local[i], local, atol=1e-5)
        np.testing.assert_allclose(probs.global_[i], global_, atol=1e-5)
        assert probs.gate[i] == pytest.approx(gate, abs=1e-5)


def test_order_and_company_change_no_bit(picture: UInt8, xy: np.ndarray) -> None:
    c = classifier()
    whole = typed(c, picture, xy)
    order = np.random.default_rng(2).permutation(len(xy))
    assert_same(whole, typed(c, picture, xy[order]), order)
    assert_same(whole, typed(c, picture, xy[40:47]), slice(40, 47))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_size_changes_nothing(picture: UInt8, xy: np.ndarray, batch: int) -> None:
    one = typed(classifier(), picture, xy)
    other = typed(classifier(infer=replace(INFER, batch_size=batch)), picture, xy)
    for name in ("local", "global_", "gate"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-6)


def test_regions_change_nothing(picture: UInt8, xy: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = typed(classifier(), picture, xy)
    monkeypatch.setattr("cellslide.classify.cells.plan_regions", _small_regions())
    assert_same(whole, typed(classifier(), picture, xy))


def _small_regions() -> object:
    from cellslide.inference.crops import plan_regions

    return lambda centre, crops, size: plan_regions(centre, crops, 96)


def test_memory_that_runs_out_halves_the_batch(picture: UInt8, xy: np.ndarray) -> None:
    hungry = classifier(FakeNuClass(fits=3), infer=replace(INFER, batch_size=16))
    assert_same(typed(classifier(infer=replace(INFER, batch_size=2)), picture, xy), typed(hungry, picture, xy))
    assert hungry.batch_size == 2
    with pytest.raises(CellslideError, match="--context-size"):
        typed(classifier(FakeNuClass(fits=0)), picture, xy[:2])


def test_one_backbone_serves_both_paths(picture: UInt8, xy: np.ndarray) -> None:
    assert_same(typed(classifier(), picture, xy), typed(classifier(FakeNuClass(shares_backbone=True)), picture, xy))


def test_organ_reaches_the_network(picture: UInt8, xy: np.ndarray) -> None:
    breast, lung, unknown = (typed(classifier(), picture, xy, organ).local for organ in (0, 1, -1))
    assert np.abs(breast - lung).max() > 1e-3 and np.abs(breast - unknown).max() > 1e-3


def test_local_paths_alone_cut_no_context(picture: UInt8, xy: np.ndarray) -> None:
    c = classifier(paths="local")
    probs = typed(c, picture, xy)
    np.testing.assert_array_equal(probs.local, typed(classifier(), picture, xy).local)
    assert np.isnan(probs.global_).all() and np.isnan(probs.gate).all()
    assert c.module.seen["context"] == c.module.seen["global"] == 0
    assert prepare(slide_from_array(picture, 0.5), xy, c).n_contexts == 0


def test_adaptive_skips_where_the_local_path_is_sure(picture: UInt8, xy: np.ndarray) -> None:
    c, whole = classifier(adaptive=0.6), typed(classifier(), picture, xy)
    probs = typed(c, picture, xy)
    from cellslide.classify.decision import temper

    sure = temper(whole.local, SPEC.calibration.temperature_local).max(axis=1) >= 0.6
    assert 0 < sure.sum() < len(xy)
    np.testing.assert_array_equal(np.isnan(probs.gate), sure)
    np.testing.assert_array_equal(probs.local, whole.local)
    np.testing.assert_array_equal(probs.global_[~sure], whole.global_[~sure])
    assert c.module.seen["context"] < classifier_contexts(picture, xy)
    assert_same(typed(classifier(adaptive=1.0), picture, xy), whole)


def classifier_contexts(picture: UInt8, xy: np.ndarray) -> int:
    c = classifier()
    typed(c, picture, xy)
    return c.module.seen["context"]


def test_cells_of_one_box_share_a_context(picture: UInt8, xy: np.ndarray) -> None:
    c = classifier(context_grid=64, infer=replace(INFER, batch_size=16))
    probs, whole = typed(c, picture, xy), typed(classifier(), picture, xy)
    np.testing.assert_array_equal(probs.local, whole.local)
    boxes = np.floor(xy / 64)
    for box in np.unique(boxes, axis=0):
        same = (boxes == box).all(axis=1)
        assert len(np.unique(probs.gate[same])) == 1
    middle = (np.floor(xy / 64) + 0.5) * 64
    np.testing.assert_allclose(probs.gate, typed(classifier(), picture, middle).gate, atol=1e-6)
    work = prepare(slide_from_array(picture, 0.5), xy, c)
    assert work.n_contexts == len(np.unique(boxes, axis=0)) < len(xy)
    order = np.random.default_rng(3).permutation(len(xy))
    assert_same(probs, typed(c, picture, xy[order]), order)


def test_grid_and_context_suit_the_patch() -> None:
    with pytest.raises(UsageError, match="--context-grid 24: must be a multiple of 16 px"):
        classifier(context_grid=24)
    with pytest.raises(UsageError, match="--context-size 34: must be a multiple of 4 px"):
        classifier(context_size=34)
    c = classifier(context_size=32, context_grid=24)
    assert c.spec.context.input_px == 32 and c.spec.context.field_px == 64


def test_regions_of_a_grid_hold_whole_boxes(picture: UInt8) -> None:
    slide = slide_from_array(np.zeros((64, 3 * REGION_PX, 3), np.uint8), 0.5)
    xy = np.stack([np.arange(0, 3 * REGION_PX, 37.0), np.full(333, 30.0)[: len(np.arange(0, 3 * REGION_PX, 37.0))]], 1)
    work = prepare(slide, xy, classifier(context_grid=1008))
    owners: dict[tuple[int, ...], int] = {}
    for k, region in enumerate(work.regions):
        for place in work.context[region.rows]:
            assert owners.setdefault(tuple(place), k) == k
    assert len(work.regions) == 3


def test_measured_time_is_above_nothing(picture: UInt8, xy: np.ndarray) -> None:
    c = classifier()
    each = c.measure()
    assert min(each.local, each.context, each.fusion) > 0
    work = prepare(slide_from_array(picture, 0.5), xy, c)
    least, most = work.seconds(Seconds(1.0, 10.0, 0.5))
    assert least == len(xy) and most == len(xy) * 1.5 + work.n_contexts * 10
    assert f"{len(xy):,} cells" in estimate(work, c) and "cpu" in estimate(work, c)
    assert [in_time(s) for s in (0.2, 45, 600, 36000)] == ["1 s", "45 s", "10 min", "10.0 h"]


def test_no_cells_are_no_work(picture: UInt8) -> None:
    assert len(typed(classifier(), picture, np.empty((0, 2)))) == 0


def test_pixel_size_of_the_classifier_is_used(picture: UInt8) -> None:
    """The same place, read from a picture at twice the resolution, gives nearly the same colours."""
    import cv2

    smooth = cv2.GaussianBlur(picture, (0, 0), 6)
    large = cv2.resize(smooth, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    places = np.array([[100.0, 80.0], [400.0, 200.0]])
    small = typed(classifier(), smooth, places)
    fine = classify_array(classifier(), large, SPEC.mpp / 2, places * 2, 0)
    np.testing.assert_allclose(small.local, fine.local, atol=1e-4)
    assert Plane.of(slide_from_array(large, SPEC.mpp / 2).info, SPEC.mpp).scale_x == 2
