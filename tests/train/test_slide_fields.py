"""Boxes and points learned from slides: windows as the whole plane gives them, untyped nuclei, validation, workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide import import_cells
from cellslide.errors import UsageError
from cellslide.train.augment import crop_matrix, warp
from cellslide.train.celldetr.data import BoxDataset, collate, load_box_sets
from cellslide.train.celldetr.recipe import CellDETRRecipe
from cellslide.train.celldetr.training import CLASS_HEAD, CellDETRTraining
from cellslide.train.data import image_of
from cellslide.train.fit import fit
from cellslide.train.points.data import IGNORED, FieldDataset, load_point_sets
from cellslide.train.points.recipe import PointsRecipe
from cellslide.train.recipe import AugmentConfig, build
from cellslide.train.slide_fields import SIGHT, SlideFields
from cellslide.train.task import FitOptions, build_recipe
from cellslide.train.tasks import celldetr, points
from tests.conftest import CHECKOUT
from tests.support.labelled_slides import LabelledSlide, labelled_slide
from tests.support.layouts import write_pannuke
from tests.train.test_celldetr import TINY
from tests.train.test_points import MODEL

BOXES: dict[str, Any] = {
    "crop_px": 64, "batch_size": 2, "epoch_samples": 4, "epochs": 1, "mpp": 0.25, "val_fields": 2,
    "model": {"config": TINY, "classes": ["a", "b"]}, "optim": {"lr": 1e-3, "warmup_steps": 0},
}  # fmt: skip


def boxes(**changes: Any) -> CellDETRRecipe:
    return build(CellDETRRecipe, {**BOXES, **changes})


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> LabelledSlide:
    return labelled_slide(tmp_path_factory.mktemp("slides"))


def _fields(slide: LabelledSlide, **changes: Any) -> SlideFields:
    item = load_box_sets([slide.folder], boxes(**changes))[0].train[0]
    assert isinstance(item, SlideFields)
    return item


def test_a_window_shows_the_nuclei_of_the_table(slide: LabelledSlide) -> None:
    item = _fields(slide)
    width, height = item.plane.width_px, item.plane.height_px
    whole = item.window((0, 0, width, height))
    np.testing.assert_array_equal(whole.image, slide.painting.image)
    assert whole.labels is not None
    both = ((whole.labels > 0) & (slide.painting.labels > 0)).sum()
    assert both / ((whole.labels > 0) | (slide.painting.labels > 0)).sum() > 0.93
    col, row = np.floor(whole.xy).astype(int).T
    np.testing.assert_array_equal(whole.labels[row, col], np.arange(len(whole.xy)) + 1)
    np.testing.assert_array_equal(whole.label, np.where(slide.kept, slide.kind, -1))
    window = item.window((100, 90, 260, 200))
    np.testing.assert_array_equal(window.image, whole.image[90:200, 100:260])
    assert window.labels is not None and 5 < len(window.xy) < len(whole.xy)
    np.testing.assert_array_equal(window.labels > 0, whole.labels[90:200, 100:260] > 0)


@pytest.mark.parametrize("centre", [(300.0, 200.0), (5.0, 590.0), (795.0, 4.0)])
def test_a_crop_is_that_of_the_whole_plane(slide: LabelledSlide, centre: tuple[float, float]) -> None:
    item = _fields(slide)
    whole = image_of(item, item.window((0, 0, item.plane.width_px, item.plane.height_px)))
    for seed in range(4):
        matrix = crop_matrix(np.random.default_rng(seed), AugmentConfig(), np.array(centre), 64)
        window, moved = item.under(matrix, 64)
        assert max(window.image.shape) < 200
        part = image_of(item, window)
        (image, labels), (wanted, known) = warp(part.image, part.labels, moved, 64), warp(*_map(whole, matrix), 64)
        # OpenCV rounds places to a 32nd of a pixel, after the shift to the window.
        assert np.abs(image.astype(int) - wanted).max() <= 2 and (image != wanted).mean() < 0.01
        pairs = (part, labels), (whole, known)
        types = [np.where(m > 0, i.label_class[np.maximum(m, 0)], m - 2) for i, m in pairs]
        assert (types[0] != types[1]).mean() < 0.002


def _map(image: Any, matrix: Any) -> tuple[Any, Any, Any]:
    return image.image, image.labels, matrix


def test_squares_that_validate_lie_in_the_middle_and_nothing_that_trains_reaches_them(slide: LabelledSlide) -> None:
    recipe = boxes(datasets={"s": {"val": {"area": 0.3}}})
    found = load_box_sets([slide.folder], recipe)[0]
    item = found.train[0]
    assert isinstance(item, SlideFields) and 1 <= len(found.val) <= 2
    middle = np.array([400, 300])
    half = np.abs(item.xy - middle).max(0) * np.sqrt(0.3)
    sight = SIGHT * 64
    assert (np.abs(item.xy[item.own] - middle) - half).max(1).min() > sight - 8
    assert all(max(image.image.shape) <= 2 * half.max() for image in found.val)
    for draw in range(20):
        rng = np.random.default_rng(draw)
        matrix = crop_matrix(rng, recipe.augment, item.draw_centre(rng, 64), 64)
        shown = np.array([[0, 0], [0, 63], [63, 0], [63, 63]]) @ matrix[:, :2].T + matrix[:, 2]
        low, high = shown.min(0), shown.max(0)
        assert (low > middle + half - 8).any() or (high < middle - half + 8).any()
    # Nuclei of no class are no truth of a square: what is found there counts neither way.
    image = found.val[0]
    assert (image.label >= 0).all() and (~image.known).any()


def test_untyped_nuclei_stay_boxes_and_a_batch_without_types_costs_nothing(slide: LabelledSlide) -> None:
    def step(**labels: Any) -> tuple[dict[str, Any], Any]:
        recipe = boxes(labels=labels)
        batch = collate([BoxDataset(load_box_sets([slide.folder], recipe), recipe)[k] for k in (0, 1)])
        torch.manual_seed(0)
        module = CellDETRTraining(recipe, build_recipe(recipe))  # type: ignore[arg-type]
        seen: dict[str, Any] = {}
        module.log_dict = lambda values, **_: seen.update(values)  # type: ignore[method-assign]
        module.training_step(batch, 0).backward()
        return seen, batch

    typed, batch = step()
    assert {-1, 0, 1} <= set(torch.cat(batch.label).tolist()) and float(typed["train/label"]) > 0
    none, same = step(column="class")  # of a table that nobody classified
    assert set(torch.cat(same.label).tolist()) == {-1}
    assert all(torch.equal(a, b) for a, b in zip(batch.boxes, same.boxes, strict=True))
    assert float(none["train/label"]) == 0 and all(np.isfinite(float(value)) for value in none.values())


def test_boxes_are_learned_alike_whatever_the_workers(slide: LabelledSlide, tmp_path: Path) -> None:
    recipe = boxes(datasets={"s": {"val": {"area": 0.3}}})
    for workers in (0, 2):
        fit(celldetr.TASK, recipe, FitOptions(tmp_path / str(workers), [slide.folder], "cpu", workers, log_every=1000))
    first, second = (tmp_path / name for name in "02")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    card = json.loads((first / "card.json").read_text())
    assert card["data"][0]["train"]["images"] == 1 and {"val/f1", "val/mean_f1"} <= set(card["metrics"])


def test_boxes_need_outlines(slide: LabelledSlide, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("x,y\n" + "".join(f"{x},{y}\n" for x, y in slide.xy))
    import_cells(tmp_path / "p.csv", slide.painting.path, tmp_path / "out").close()
    with pytest.raises(UsageError, match="boxes need outlines"):
        load_box_sets([tmp_path / "out"], boxes(labels={"column": "class"}))


def test_points_are_learned_from_slides(slide: LabelledSlide, tmp_path: Path) -> None:
    document = {
        "field_px": 64, "batch_size": 2, "epoch_samples": 4, "epochs": 1, "mpp": 0.25, "precision": "fp32",
        "model": MODEL, "balance": 0.5, "val_fields": 2, "datasets": {"s": {"val": {"area": 0.3}}},
    }  # fmt: skip
    recipe = build(PointsRecipe, document)
    sets = load_point_sets([slide.folder], recipe)
    data = FieldDataset(sets, recipe)
    drawn = [data[k] for k in range(6)]
    assert {-1, 0, 1} <= set(torch.cat([d.label for d in drawn]).tolist())
    assert all((d.region == 1).float().mean() > 0.2 and int(d.count) == len(d.points) for d in drawn)
    assert torch.equal(data[3].image, drawn[3].image)
    image = sets[0].val[0]
    assert image.typed and (image.label >= 0).all() and (image.region == IGNORED).any()
    fit(points.TASK, recipe, FitOptions(tmp_path / "run", [slide.folder], "cpu", 0, log_every=1000))
    metrics = json.loads((tmp_path / "run/card.json").read_text())["metrics"]
    assert "val/detection_f1" in metrics and np.isfinite(metrics["train/loss"])


def test_the_example_of_transcripts_learns_ten_types_and_a_probe_the_last_layer_alone(
    slide: LabelledSlide, tmp_path: Path
) -> None:
    example = CHECKOUT / "examples/train-celldetr-transcripts"
    small = {"crop_px": 64, "batch_size": 2, "epoch_samples": 4, "epochs": 1, "val_fields": 2}

    def read(name: str, **changes: Any) -> CellDETRRecipe:
        document = yaml.safe_load((example / f"{name}.yaml").read_text())
        return build(CellDETRRecipe, {**document, **small, "model": {**document["model"], "config": TINY}, **changes})

    (tmp_path / "cohort.csv").write_text(f"cells,patient\n{slide.folder},P\n")
    (tmp_path / "own.csv").write_text(
        "cell_id,label\n" + "".join(f"cell-{k},{'NK' if k % 2 else 'b'}\n" for k in range(90))
    )
    renamed = {"cohort": {"val": {"area": 0.3}, "classes": {"a": "T", "b": "Malignant"}}}
    for labels, seen in (({}, {"T", "Malignant"}), ({"file": str(tmp_path / "own.csv")}, {"NK", "Malignant"})):
        recipe = read("types", datasets=renamed, labels=labels)
        item = load_box_sets([tmp_path / "cohort.csv"], recipe)[0].train[0]
        assert {recipe.model.classes[k] for k in np.unique(item.label) if k >= 0} == seen  # type: ignore[union-attr]
    first = FitOptions(tmp_path / "types", [tmp_path / "cohort.csv"], "cpu", 0, log_every=1000)
    fit(celldetr.TASK, read("types", datasets=renamed), first)
    model = {"config": TINY, "classes": ["a", "b"], "probe": True}
    second = FitOptions(tmp_path / "probe", [slide.folder], "cpu", 0, init=tmp_path / "types", log_every=1000)
    fit(celldetr.TASK, read("pannuke", model=model, datasets={}, optim={"lr": 0.01, "warmup_steps": 0}), second)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("types", "probe"))
    assert before.keys() == after.keys()
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        n for n in before if n.startswith(CLASS_HEAD)
    }


def test_pannuke_trains_as_it_is_distributed(tmp_path: Path) -> None:
    for fold in (1, 2):
        write_pannuke(tmp_path / "pannuke", fold, ["Breast", "Colon"], [("neoplastic", "dead"), ("", "connective")])
    document = yaml.safe_load((CHECKOUT / "examples/train-celldetr-transcripts/pannuke.yaml").read_text())
    found = load_box_sets([tmp_path / "pannuke"], build(CellDETRRecipe, document))[0]
    classes = [sorted(item.label_class[1:][np.isin(np.arange(1, len(item.label_class)), item.labels)].tolist())
               for item in found.train]  # fmt: skip
    assert classes == [[1, 4], [3]] and [item.label.tolist() for item in found.val] == [[0, 3], [2]]
