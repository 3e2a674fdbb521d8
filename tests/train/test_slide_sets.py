"""Training on whole slides: labels of tables, crops as classify cuts them, parts that see nothing of each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide import open_slide
from cellslide.errors import UsageError
from cellslide.inference.crops import crop_corners, cut_naive
from cellslide.train.fit import fit
from cellslide.train.nuclass.cells import CellImage, ExactCells, cut_exact, draw_crop, level_factor, load_cell_sets
from cellslide.train.nuclass.recipe import NuClassRecipe
from cellslide.train.pixels import InMemory, OnSlide
from cellslide.train.recipe import AugmentConfig, LabelConfig, build
from cellslide.train.slide_sets import SlideSample, read_nuclei, read_samples
from cellslide.train.task import FitOptions
from cellslide.train.tasks import nuclass
from cellslide.types import CropSpec, Plane
from tests.support.labelled_slides import CLASSES, LabelledSlide, labelled_slide
from tests.train.test_nuclass import PLAIN, RECIPE, _NoChance


def recipe(**changes: Any) -> NuClassRecipe:
    return build(NuClassRecipe, {**RECIPE, "datasets": {}, **changes})


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledSlide]:
    folder = tmp_path_factory.mktemp("slides")
    return [labelled_slide(folder, name, seed=seed) for seed, name in enumerate("st")]


@pytest.fixture(scope="module")
def listed(slides: list[LabelledSlide]) -> Path:
    path = slides[0].folder.parent / "cohort.csv"
    path.write_text("slide,cells,patient,organ,split,licence\n../s.tif,s,A,breast (x),train,CC0 1.0\n,t,B,Lung,,\n")
    return path


def test_labels_that_are_kept_sure_and_matched(slides: list[LabelledSlide], tmp_path: Path) -> None:
    sample = read_samples(slides[0].folder)[0]
    assert isinstance(sample, SlideSample) and (sample.stem, sample.patient, sample.split) == ("s", "s", "train")

    def labels(**config: Any) -> Any:
        return read_nuclei(sample, LabelConfig(**config), CLASSES, {}).label

    kind, kept = slides[0].kind, slides[0].kept
    matched = np.arange(len(kind)) % 7 != 0
    np.testing.assert_array_equal(labels(), np.where(kept, kind, -1))
    np.testing.assert_array_equal(labels(matched=False, kept=False), np.where(np.arange(len(kind)) % 5 != 0, kind, -1))
    np.testing.assert_array_equal(labels(kept=False, min_confidence=0.0), np.where(matched, kind, -1))
    renamed = read_nuclei(sample, LabelConfig(), ("x", "b"), {"a": "x", "b": "other"})
    assert set(renamed.label) == {-1, 0}
    np.testing.assert_array_equal(renamed.xy, slides[0].xy)
    (tmp_path / "own.csv").write_text("cell_id,label\ncell-1,b\ncell-2,a\ncell-3,c\n")
    own = labels(file=str(tmp_path / "own.csv"))
    assert own[[1, 2, 3]].tolist() == [1, 0, -1] and (own[4:] == -1).all()
    (tmp_path / "own.csv").write_text("cell_id,label\nelsewhere,b\n")
    for wrong, words in (({"file": str(tmp_path / "own.csv")}, r"own\.csv"), ({"column": "kind"}, "no column kind")):
        with pytest.raises(UsageError, match=words):
            labels(**wrong)


def test_a_list_says_patient_organ_and_split(listed: Path, slides: list[LabelledSlide]) -> None:
    sets = load_cell_sets([listed], recipe(datasets={"cohort": {"val": {"patients": ["B"]}}}))
    assert [(image.name, image.organ) for image in (*sets[0].train, *sets[0].val)] == [("s", 0), ("t", 1)]
    assert len(sets[0].train[0]) == slides[0].kept.sum()
    few = load_cell_sets([listed], recipe(val_cells=9, datasets={"cohort": {"val": {"patients": ["B"]}}}))[0].val[0]
    assert len(few) == 9 and set(map(tuple, few.xy)) < set(map(tuple, sets[0].val[0].xy))
    with pytest.raises(UsageError, match="no such patient Q"):
        load_cell_sets([listed], recipe(datasets={"cohort": {"val": {"patients": ["Q"]}}}))
    labels = listed.parent / "labels.csv"
    labels.write_text("cell_id,label\ncell-1,b\n")
    with pytest.raises(UsageError, match="column slide"):
        load_cell_sets([listed], recipe(labels={"file": str(labels)}))
    wrong = listed.parent / "wrong.csv"
    for rows, words in (("cells\nnowhere\n", "line 2.*nowhere"), ("cells,slide\ns,gone.tif\n", r"gone\.tif is not"),
                        ("cells,slide\ns,../t.tif\n", r"t\.tif is not the slide")):  # fmt: skip
        wrong.write_text(rows)
        with pytest.raises(UsageError, match=words):
            read_samples(wrong)


@pytest.mark.parametrize("spec", [CropSpec(64, 32), CropSpec(48, 48, "zero"), CropSpec(112, 28)])
def test_training_crops_are_those_that_classify_cuts(slides: list[LabelledSlide], spec: CropSpec) -> None:
    image = load_cell_sets([slides[0].folder], recipe(mpp=0.4))[0].train[0]
    assert isinstance(image.pixels, OnSlide) and image.xy.min() < 10
    with open_slide(slides[0].painting.path) as slide:
        plane = Plane.of(slide.info, 0.4)
        assert plane == image.plane
        wanted = cut_naive(slide, plane, image.xy, spec)
        whole = slide.read_plane(plane, (0, 0, plane.width_px, plane.height_px))
    exact = cut_exact(image, image.xy, spec)
    assert torch.equal(exact, wanted)
    rng: Any = _NoChance()
    edge = spec.field_px / 2 + 4
    away = (image.xy > edge).all(1) & (image.xy < np.array([plane.width_px, plane.height_px]) - edge).all(1)
    # Where the plane is halved first, a crop that begins at an odd pixel lies half a pixel off.
    away &= (crop_corners(image.xy, spec.field_px) % level_factor(spec) == 0).all(1)
    assert away.any()
    drawn = np.stack([draw_crop(rng, AugmentConfig(**PLAIN), image, xy, spec) for xy in image.xy[away]])
    assert np.abs(drawn - wanted[torch.from_numpy(away)].permute(0, 2, 3, 1).numpy()).max() <= 1.01
    held = CellImage("held", InMemory(whole), plane, image.xy, image.label, 0)
    for k, xy in enumerate(image.xy[:40]):
        crops = [draw_crop(np.random.default_rng(k), AugmentConfig(), i, xy, spec) for i in (image, held)]
        np.testing.assert_array_equal(*crops)


def test_cells_are_read_in_batches_that_lie_together(slides: list[LabelledSlide]) -> None:
    image = load_cell_sets([slides[0].folder], recipe())[0].train[0]
    cells = ExactCells([image], recipe(), context=True, batch_size=16)
    rows = np.concatenate([rows for _, rows in cells.parts])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(image)))
    assert torch.equal(cells[1].context, cut_exact(image, image.xy[rows[16:32]], recipe().context))


def test_the_middle_of_a_slide_validates_and_sees_nothing_that_trains(slides: list[LabelledSlide]) -> None:
    folder, plane_size = slides[0].folder, np.array([800, 600])
    sets = load_cell_sets([folder], recipe(datasets={"s": {"val": {"area": 0.2}}}))[0]
    train, val = sets.train[0], sets.val[0]
    field = recipe().context.field_px
    gap = np.abs(train.xy[:, None] - val.xy).max(-1)
    assert len(train) > 20 and len(val) > 5 and gap.min() >= field  # no pixel is seen from both sides
    assert (np.abs(val.xy - plane_size / 2) < plane_size / 4).all()
    close = load_cell_sets([folder], recipe(datasets={"s": {"val": {"area": 0.2, "guard_um": 8.0}}}))[0]
    assert len(close.val[0]) == len(val) and len(close.train[0]) > len(train)
    with pytest.raises(UsageError, match=r"guard_um: 7 must be 8 or more"):
        load_cell_sets([folder], recipe(datasets={"s": {"val": {"area": 0.2, "guard_um": 7.0}}}))


def test_numbers_do_not_depend_on_workers(listed: Path, tmp_path: Path) -> None:
    chosen = recipe(epochs=1, datasets={"cohort": {"val": {"patients": ["B"]}}}, val_cells=20)
    for workers in (0, 2):
        fit(nuclass.LOCAL, chosen, FitOptions(tmp_path / str(workers), [listed], "cpu", workers, log_every=1000))
    first, second = (tmp_path / name for name in "02")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "card.json").read_text() == (second / "card.json").read_text()
    card = json.loads((first / "card.json").read_text())
    assert card["data"][0]["licences"] == ["CC0 1.0"] and card["data"][0]["val_images"] == ["t"]
