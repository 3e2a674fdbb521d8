"""Training data: targets, resampling, splits, augmentation, and crops that depend on their number alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cellslide.errors import UsageError
from cellslide.train.augment import crop_matrix, recolor, warp
from cellslide.train.data import (
    CropDataset,
    TrainImage,
    TrainSet,
    choose_samples,
    load_sets,
    loaders,
    mirror_pad,
    resample_image,
    resample_labels,
    targets_of,
)
from cellslide.train.hover.recipe import HoverRecipe
from cellslide.train.recipe import AugmentConfig, DatasetConfig, build, load_recipe
from cellslide.train.targets import IGNORE, hover_map, point_labels, single_nuclei
from cellslide.train.task import FitOptions, Run
from tests.conftest import CHECKOUT
from tests.support.train_sets import painted, write_set

CALM = AugmentConfig(rotate_p=0, scale_p=0, stain_p=0, color_p=0, blur_p=0, sharpen_p=0, jpeg_p=0, noise_p=0)
SMALL = {"crop_px": 64, "batch_size": 2, "epoch_samples": 4, "epochs": 2}


def test_hover_map_runs_from_minus_one_to_one_on_each_side_of_the_centre() -> None:
    labels = np.zeros((9, 12), np.int32)
    labels[2:7, 3:8] = 4
    labels[0, 10:12] = 2
    horizontal, vertical = hover_map(labels)
    np.testing.assert_allclose(horizontal[4, 3:8], [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_allclose(vertical[2:7, 5], [-1, -0.5, 0, 0.5, 1])
    assert not horizontal[labels == 0].any() and not vertical[0].any()
    # A nucleus does not change with its neighbours.
    np.testing.assert_array_equal(
        hover_map(np.where(labels == 4, 4, 0))[:, labels == 4], hover_map(labels)[:, labels == 4]
    )


def test_hover_map_of_a_lopsided_nucleus_scales_each_side_by_itself() -> None:
    labels = np.zeros((4, 8), np.int32)
    labels[0:3, 0:2] = 1
    labels[1, 2:8] = 1
    horizontal = hover_map(labels)[0]
    assert horizontal.min() == -1 and horizontal.max() == 1
    # Columns have mean 39/12 = 2.75 -> 3, so the left side is 3 px long and the right 4 px.
    np.testing.assert_allclose(horizontal[1], [-1, -2 / 3, -1 / 3, 0, 0.25, 0.5, 0.75, 1], atol=1e-6)


def test_point_labels_are_sure_near_a_point_and_where_it_is_far_and_bright() -> None:
    image = np.full((40, 40, 3), 230, np.uint8)
    image[:, 30:] = 60
    labels = point_labels(image, np.array([[5.5, 5.5]]), radius_px=2.0, background_px=12.0)
    assert (labels == 1).sum() == pytest.approx(np.pi * 4, abs=3) and labels[5, 5] == 1
    assert labels[30, 20] == 0 and labels[5, 10] == IGNORE
    assert (labels[:, 30:] == IGNORE).all()


def test_only_lone_convex_blobs_are_trusted() -> None:
    labels = np.zeros((30, 60), np.int32)
    labels[5:15, 5:15] = 1
    labels[5:15, 30:38], labels[5:15, 38:46] = 2, 3
    labels[20:28, 5:8] = labels[25:28, 5:20] = 5
    assert single_nuclei(labels).tolist() == [True, True, False, False, False, False]


def test_labels_are_resampled_by_majority_and_images_by_area() -> None:
    labels = np.zeros((8, 8), np.int32)
    labels[0:4, 0:4], labels[4:8, 5:8] = 7, 9
    np.testing.assert_array_equal(resample_labels(labels, (2, 2)), [[7, 0], [0, 9]])
    assert resample_labels(labels, (8, 8)) is labels
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, ::2] = 200
    np.testing.assert_array_equal(resample_image(image, 0.5), np.full((2, 2, 3), 100))


def test_image_and_labels_are_warped_alike() -> None:
    image, labels, _ = painted(3)
    image = np.repeat((labels * 20).astype(np.uint8)[..., None], 3, axis=2)
    for seed in range(8):
        matrix = crop_matrix(np.random.default_rng(seed), CALM, np.array([32.0, 32.0]), 64)
        crop, crop_labels = warp(image, labels.astype(np.int32), matrix, 64)
        np.testing.assert_array_equal(crop[..., 0], crop_labels * 20)
        assert sorted(np.bincount(crop_labels.ravel())) == sorted(np.bincount(labels.ravel()))


def test_what_lies_outside_is_not_known() -> None:
    image, labels, _ = painted(3)
    matrix = crop_matrix(np.random.default_rng(0), replace(CALM, flip=False), np.array([0.0, 0.0]), 64)
    _, crop_labels = warp(image, labels.astype(np.int32), matrix, 64)
    assert (crop_labels == IGNORE).mean() == pytest.approx(0.75, abs=0.01)


def test_recolouring_repeats_and_can_be_turned_off() -> None:
    image, _, _ = painted(1)
    np.testing.assert_array_equal(recolor(np.random.default_rng(0), CALM, image), image)
    strong = AugmentConfig(stain_p=1, color_p=1, blur_p=1, noise_p=1, jpeg_p=1)
    one, two, other = (recolor(np.random.default_rng(seed), strong, image) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, two)
    assert (one != other).mean() > 0.5 and one.dtype == np.uint8 and one.shape == image.shape


def test_mirrored_nuclei_get_numbers_of_their_own() -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[8:12, 3:6], labels[15:20, 15:20], labels[0, 0] = 1, 2, IGNORE
    item = _item(labels, label_class=[0, 5, 6], label_hover=[True, True, False])
    padded = mirror_pad(item, 10)
    assert padded.labels.shape == (40, 40) and (padded.labels == IGNORE).sum() == 1
    pieces = [int(k) for k in np.unique(padded.labels) if k > 0]
    # Nucleus 1 and its images left, above and below; nucleus 2 joined with its own reflections at the corner.
    assert [int(padded.label_class[k]) for k in pieces].count(5) == 6
    assert [int(padded.label_class[k]) for k in pieces].count(6) == 1
    assert all(padded.label_hover[k] == (padded.label_class[k] == 5) for k in pieces)


def test_targets_leave_out_what_is_not_known() -> None:
    labels = np.zeros((16, 16), np.int32)
    labels[2:6, 2:6], labels[8:12, 8:12], labels[0] = 1, 2, IGNORE
    crops = targets_of(np.zeros((16, 16, 3), np.uint8), labels, np.array([0, 3, IGNORE]), np.array([True, True, False]))
    assert crops.foreground[0, 0] == -1 and crops.foreground[3, 3] == 1 and crops.foreground[15, 15] == 0
    assert crops.types[3, 3] == 3 and crops.types[9, 9] == -1 and crops.types[15, 15] == 0
    assert crops.hover_valid[3, 3] and not crops.hover_valid[9, 9] and not crops.hover_valid[0, 0]


def test_patients_are_split_and_test_rows_never_enter(tmp_path: Path) -> None:
    rows = [{"patient": "A"}, {"patient": "B"}, {"patient": "B", "split": "extra"}, {"patient": "C", "split": "test"}]
    root = write_set(tmp_path / "set", [*rows, {"patient": "D"}])
    recipe = build(HoverRecipe, {**SMALL, "datasets": {"set": {"val": {"patients": ["B"]}, "exclude_patients": ["D"]}}})
    found = _load(root, recipe)
    assert [i.name for i in found.train] == ["0"] and [i.name for i in found.val] == ["1", "2"]
    other = write_set(tmp_path / "other", [{"patient": "B"}, {"patient": "E"}])
    assert [i.name for i in load_sets([root, other], recipe)[1].train] == ["1"]
    with pytest.raises(UsageError, match="no such patient C"):
        _load(root, build(HoverRecipe, {"datasets": {"set": {"val": {"patients": ["C"]}}}}))
    with pytest.raises(UsageError, match="test data never enters"):
        build(HoverRecipe, {"datasets": {"set": {"split": "test"}}})
    with pytest.raises(UsageError, match="named elsewhere"):
        load_sets([root], build(HoverRecipe, {"datasets": {"elsewhere": {}}}))


def test_organs_and_images_validate_by_name(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", [{"organ": "lung"}, {"organ": "kidney"}, {"organ": "skin"}])
    val = {"organs": ["lung"], "images": ["2"]}
    found = _load(root, build(HoverRecipe, {**SMALL, "datasets": {"set": {"val": val}}}))
    assert [i.name for i in found.val] == ["0", "2"] and [i.name for i in found.train] == ["1"]
    for key in ("organs", "images"):
        with pytest.raises(UsageError, match=rf"val\.{key}.*absent"):
            _load(root, build(HoverRecipe, {**SMALL, "datasets": {"set": {"val": {key: ["absent"]}}}}))


def test_folds_keep_patients_organs_and_neighbours_together(tmp_path: Path) -> None:
    patients = write_set(tmp_path / "patients", [{"patient": f"P{i // 3}"} for i in range(24)])
    organs = write_set(tmp_path / "organs", [{"organ": f"organ {i % 6}", "split": "val"} for i in range(18)])
    runs = write_set(tmp_path / "runs", [{"organ": "colon"}] * 10)
    doubtful = write_set(tmp_path / "doubtful", [{"patient": f"P{i}"} for i in range(8)])
    paths = [patients, organs, runs, doubtful]
    configs = {"doubtful": DatasetConfig(folds=False)}
    validated: list[list[str]] = [[], [], []]
    for k in range(1, 5):
        chosen = choose_samples(paths, configs, DatasetConfig(), f"{k}/4")
        for part, key in zip(chosen[:2], ("patient", "organ"), strict=True):
            assert not {getattr(s, key) for s in part.train} & {getattr(s, key) for s in part.val}
        places = [int(s.stem) for s in chosen[2].val]
        assert places == list(range(min(places), max(places) + 1))
        # Labels that are no truth do not validate, and their patients do not teach what validates elsewhere.
        assert not chosen[3].val
        assert not {s.patient for s in chosen[3].train} & {s.patient for s in chosen[0].val}
        for found, part in zip(validated, chosen, strict=False):
            found += [s.stem for s in part.val]
    assert [len(set(found)) for found in validated] == [24, 18, 10] == [len(found) for found in validated]
    # A patient's part does not depend on what else is in the set.
    alone = choose_samples([doubtful], {}, DatasetConfig(), "2/4")[0]
    both = choose_samples(paths, {}, DatasetConfig(), "2/4")
    assert {s.patient for s in alone.val} == {s.patient for s in both[3].val}


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "one/5", "3"])
def test_a_fold_that_cannot_be_is_refused(fold: str) -> None:
    with pytest.raises(UsageError, match="fold"):
        build(HoverRecipe, {**SMALL, "fold": fold})


def test_pixel_size_comes_from_manifest_recipe_or_nuclei(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", [{"patient": "A", "mpp": ""}])
    with pytest.raises(UsageError, match=r"datasets\.set\.mpp"):
        _load(root, build(HoverRecipe, SMALL))
    fixed = _load(root, build(HoverRecipe, {**SMALL, "datasets": {"set": {"mpp": 0.25}}})).train[0]
    assert fixed.image.shape == (32, 32, 3) == (*fixed.labels.shape, 3) and fixed.mpp == 0.25
    guess = {"set": {"mpp": "from-nuclei", "nucleus_um": 5.0}}
    item = _load(root, build(HoverRecipe, {**SMALL, "datasets": guess})).train[0]
    # Discs of 10 px that are to be 5 µm wide.
    assert item.mpp == pytest.approx(0.5, rel=0.03)


def test_point_sets_teach_foreground_and_types_only(tmp_path: Path) -> None:
    root = write_set(tmp_path / "points", [{"patient": "A"}], masks=False, points=True)
    item = _load(root, build(HoverRecipe, {**SMALL, "model": {"classes": ["a", "b"]}})).train[0]
    assert not item.label_hover.any() and (item.labels == IGNORE).any()
    assert item.label_class.tolist() == [0, *([1, 2] * 4)]
    untyped = _load(root, build(HoverRecipe, SMALL)).train[0]
    assert set(untyped.label_class.tolist()) == {IGNORE}


def test_label_65535_is_not_known(tmp_path: Path) -> None:
    from PIL import Image

    root = write_set(tmp_path / "set", [{"patient": "A"}])
    mask = np.asarray(Image.open(root / "masks/0.png")).astype(np.uint16)
    mask[mask == 1] = 65535
    Image.fromarray(mask).save(root / "masks/0.png")
    item = _load(root, build(HoverRecipe, SMALL)).train[0]
    assert (item.labels == IGNORE).sum() == (mask == 65535).sum() > 0 and len(item.label_class) == 9


def test_a_crop_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", [{"patient": p} for p in "ABC"])
    recipe = build(HoverRecipe, SMALL)
    sets = load_sets([root], recipe)
    crops = CropDataset(sets, recipe)
    _equal(crops[7], CropDataset(sets, recipe)[7])
    assert not torch.equal(crops[7].image, crops[8].image)
    assert not torch.equal(crops[7].image, CropDataset(sets, replace(recipe, seed=1))[7].image)


def test_workers_change_nothing_and_epochs_never_repeat(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", [{"patient": p} for p in "ABC"])
    recipe = build(HoverRecipe, SMALL)
    sets = load_sets([root], recipe)
    here, there = (loaders(Run(recipe, FitOptions(root, workers=n), sets), None)[0] for n in (0, 1))
    for epoch in (0, 1):
        for loader in (here, there):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for one, two in zip(here, there, strict=True):
            _equal(one, two)
    assert list(here.sampler) == [4, 5, 6, 7]


def test_recipe_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("optim: {lr: 8e-4, schedule: cosine}\ndatasets: {a: {mpp: 0.17}, b: {mpp: from-nuclei}}\n")
    recipe = load_recipe(HoverRecipe, path, {"seed": 3, "epochs": None})
    assert recipe.optim.lr == 8e-4 and recipe.seed == 3 and recipe.epochs == HoverRecipe().epochs
    assert build(HoverRecipe, recipe.as_dict()) == recipe
    for text, said in (
        ("optim: {rl: 1}", "unknown key rl"),
        ("crop_px: 100", "multiple of 16"),
        ("optim: {schedule: linear}", "exponential, cosine"),
        ("datasets: {a: {mpp: guess}}", "from-nuclei"),
        ("epochs: many", "of type int"),
        ("[1]", "mapping"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=said):
            load_recipe(HoverRecipe, path)


def test_the_example_recipes_are_valid() -> None:
    found = sorted((CHECKOUT / "examples/train-nuclei-small").glob("*.yaml"))
    assert len(found) >= 2
    for path in found:
        recipe = load_recipe(HoverRecipe, path)
        assert recipe.datasets["tnbc"].val.patients and recipe.optim.schedule == "cosine"


def _load(root: Path, recipe: HoverRecipe) -> TrainSet:
    return load_sets([root], recipe)[0]


def _item(labels: np.ndarray, label_class: list[int], label_hover: list[bool]) -> TrainImage:
    image = np.zeros((*labels.shape, 3), np.uint8)
    return TrainImage("x", "set", image, labels, np.array(label_class, np.int32), np.array(label_hover), None, 0.5)


def _equal(one: tuple[torch.Tensor, ...], two: tuple[torch.Tensor, ...]) -> None:
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left, right)
