"""`cellslide evaluate` as users call it: JSON of the contract, every kind of prediction, exit codes."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from cellslide.api import Model
from cellslide.cli.main import cli
from cellslide.evaluate.dataset import write_manifest
from cellslide.evaluate.detection import centroids
from cellslide.evaluate.matching import overlaps, panoptic_quality
from cellslide.evaluate.predictors import nuclei_of
from cellslide.types import Cells, ClassSpec, ModelSpec
from tests.support.labelled import add_image, discs

SHAPE = (60, 100)
CENTRES = [(15.0, 20.0), (45, 40), (80, 20)]
LABELS = discs(SHAPE, CENTRES, 9)
# Pairs with the first two at IoU over one half; the third is missed and one is invented.
SHIFTED = discs(SHAPE, [(16, 20), (45, 42), (20, 48)], 9)
CONTRACT = (
    *("model", "dataset", "n_images", "n_nuclei", "mpp", "instance", "detection", "classes"),
    *("mean_f1", "accuracy", "ece", "brier"),
)
INSTANCE = ("bpq", "bdq", "bsq", "mpq", "aji", "dice", "f1_iou50", "bpq_tissue")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments), "--no-progress"])


def scores_of(*arguments: object, folder: Path) -> dict[str, Any]:
    file = folder / "new" / "scores.json"
    result = run(*arguments, "--json", file)
    assert result.exit_code == 0, result.output
    scores: dict[str, Any] = json.loads(file.read_text())
    return scores


def cells_at(centres: Sequence[tuple[float, float]], half_px: float, prob: NDArray[np.float32] | None = None) -> Cells:
    """Square cells around centres, in image pixels."""
    n = len(centres)
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half_px
    rings = (np.array(centres).reshape(n, 1, 2) + corners).reshape(-1, 2)
    zero, column = np.zeros(n, np.int32), np.ones(n, np.float32)
    start = np.arange(n + 1, dtype=np.int64) * 4
    return Cells(np.array(centres).reshape(n, 2), zero, zero, column, column, prob, None, rings, start)


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    root = tmp_path / "masks-set"
    rows = [add_image(root, "a", LABELS, organ="breast"), add_image(root, "b", LABELS, organ="lung", split="val")]
    return write_manifest(root, rows)


@pytest.fixture
def typed_points(tmp_path: Path) -> Path:
    root = tmp_path / "points-set"
    points = [(15.0, 20.0, "tumour"), (45.0, 40.0, "tumour"), (80.0, 20.0, "stroma")]
    return write_manifest(root, [add_image(root, "a", LABELS, mask=False, points=points)])


def test_label_images_against_masks(masks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    Image.fromarray(SHIFTED.astype(np.uint16)).save(folder / "a.png")
    np.save(folder / "b.npy", LABELS)
    scores = scores_of("--predictions", folder, masks, folder=tmp_path)
    assert tuple(k for k in scores if k in CONTRACT) == CONTRACT
    assert set(INSTANCE) <= set(scores["instance"])
    worse = panoptic_quality(overlaps(LABELS, SHIFTED))
    assert (worse.tp, worse.fp, worse.fn) == (2, 1, 1)
    same = panoptic_quality(overlaps(LABELS, LABELS))
    assert (scores["n_images"], scores["n_nuclei"], scores["mpp"]) == (2, 6, 0.25)
    assert scores["instance"]["bpq"] == pytest.approx((worse.pq + same.pq) / 2, rel=1e-12)
    assert scores["instance"]["bpq_tissue"] == pytest.approx(scores["instance"]["bpq"])
    assert scores["instance"]["f1_iou50"] == pytest.approx(2 * 5 / (2 * 5 + 1 + 1))
    assert scores["detection"] == {"radius_um": 3.0, "precision": 5 / 6, "recall": 5 / 6, "f1": pytest.approx(5 / 6)}
    assert [scores[k] for k in ("classes", "mean_f1", "accuracy", "ece", "brier")] == [None] * 5
    assert scores["instance"]["mpq"] is None


def test_split_limit_and_per_image(masks: Path, tmp_path: Path) -> None:
    table = tmp_path / "images.csv"
    scores = scores_of("--model", "classical", masks, "--split", "val", "--per-image", table, folder=tmp_path)
    assert (scores["split"], scores["n_images"], scores["model"]) == ("val", 1, "classical")
    (row,) = csv.DictReader(table.open())
    assert row["image"] == "b" and row["organ"] == "lung" and row["mpq"] == ""
    assert float(row["bpq"]) == pytest.approx(scores["instance"]["bpq"]) and int(row["n_true"]) == 3
    scores = scores_of("--model", "classical", masks, "--limit", "1", folder=tmp_path)
    assert scores["n_images"] == 1 and scores["instance"]["dice"] > 0.9


def test_points_give_detection_and_classes_only(typed_points: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.csv").write_text("x,y,class\n15,21,Tumour\n45,40,stroma\n80,21,stroma\n5,55,tumour\n")
    scores = scores_of("--predictions", folder, typed_points, folder=tmp_path)
    assert set(scores["instance"].values()) == {None}
    assert scores["detection"]["precision"] == 3 / 4 and scores["detection"]["recall"] == 1
    assert scores["classes"] == {
        "stroma": {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1},
        "tumour": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
    }
    assert scores["mean_f1"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["ece"] is None and scores["brier"] is None


def test_foreign_classes_are_said_and_can_be_mapped(typed_points: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.csv").write_text("x,y,class\n15,21,Neoplastic\n45,40,Neoplastic\n80,21,Connective\n")
    scores = scores_of("--predictions", folder, typed_points, folder=tmp_path)
    assert scores["classes"] is None and scores["accuracy"] is None
    assert "Connective, Neoplastic" in scores["warnings"][0] and "--map-class" in scores["warnings"][0]
    mapped = ("--map-class", "neoplastic=tumour", "--map-class", "Connective=Stroma")
    scores = scores_of("--predictions", folder, typed_points, *mapped, folder=tmp_path)
    assert scores["mean_f1"] == 1.0 and scores["accuracy"] == 1.0 and scores["warnings"] == []
    result = run("--predictions", folder, typed_points, "--map-class", "Neoplastic=tumor")
    assert result.exit_code == 2 and "stroma, tumour" in result.output


@pytest.fixture
def fake_network(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A model "fake" that finds the first two of the three nuclei; returns the pixel sizes it was called with.

    Its end is -1.
    """
    seen: list[float] = []
    classes = (ClassSpec("tumour", (255, 0, 0)), ClassSpec("stroma", (0, 255, 0)))
    spec = ModelSpec("fake", "mask", 0.25, 256, 64, (0, 0, 0), (1, 1, 1), classes)
    prob = np.array([[0.8, 0.2], [0.4, 0.6]], np.float32)

    segmenter = SimpleNamespace(config=None)

    def segment_array(model: object, image: NDArray[np.uint8], mpp: float, config: object) -> Cells:
        assert model is segmenter and image.shape == (*SHAPE, 3)
        seen.append(mpp)
        return cells_at(CENTRES[:2], 8, prob)

    monkeypatch.setattr("cellslide.weights.load_model", lambda *asked: SimpleNamespace(spec=spec))
    monkeypatch.setattr("cellslide.pipeline.segment_array", segment_array)
    monkeypatch.setattr(Model, "image_segmenter", lambda self, tiles, tta: segmenter)
    monkeypatch.setattr(Model, "close", lambda self: seen.append(-1.0))
    return seen


def test_network_with_typed_instances(tmp_path: Path, fake_network: list[float]) -> None:
    points = [(15.0, 20.0, "tumour"), (45.0, 40.0, "tumour"), (80.0, 20.0, "stroma")]
    root = tmp_path / "typed"
    write_manifest(root, [add_image(root, "a", LABELS, points=points)])
    scores = scores_of("--model", "fake", root, folder=tmp_path)
    assert scores["model"] == "fake" and fake_network == [0.25, -1.0]
    assert scores["accuracy"] == 0.5
    assert scores["brier"] == pytest.approx((0.04 + 0.04 + 0.36 + 0.36) / 2, rel=1e-6)
    assert scores["ece"] == pytest.approx((0.2 + 0.6) / 2, rel=1e-6)
    # The square of the first is right, that of the second has the wrong class, the third is missed.
    squares = discs(SHAPE, CENTRES[:1], 0)
    squares[12:28, 7:23] = 1
    one_of_two = overlaps(np.where(LABELS < 3, LABELS, 0), squares)
    assert scores["instance"]["mpq"] == pytest.approx(panoptic_quality(one_of_two).pq / 2, rel=1e-9)
    parts = {name: [c[name] for c in scores["class_quality"].values()] for name in ("pq", "dq", "sq")}
    assert parts["pq"] == pytest.approx([dq * sq for dq, sq in zip(parts["dq"], parts["sq"], strict=True)])
    assert scores["instance"]["mdq"] == pytest.approx(np.mean(parts["dq"]))
    assert scores["instance"]["msq"] == pytest.approx(np.mean(parts["sq"]))
    assert scores["classes"]["stroma"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_pixel_size_is_never_guessed(tmp_path: Path, fake_network: list[float]) -> None:
    root = tmp_path / "unknown"
    write_manifest(root, [add_image(root, "a", LABELS), add_image(root, "b", LABELS, mpp="")])
    result = run("--model", "fake", root)
    assert result.exit_code == 2 and "b.png" in result.output and "--mpp" in result.output
    assert fake_network == [], "nothing may run before the pixel sizes are known"
    scores = scores_of("--model", "fake", root, "--mpp", "0.5", folder=tmp_path)
    assert scores["mpp"] == 0.5 and fake_network[:2] == [0.5, 0.5]


def test_derived_instances_give_dice_alone(tmp_path: Path) -> None:
    root = tmp_path / "derived"
    note = "foreground is manual; instances DERIVED by watershed"
    write_manifest(root, [add_image(root, "a", LABELS, note=note)])
    scores = scores_of("--model", "classical", root, folder=tmp_path)
    assert scores["instance"]["dice"] > 0.9
    assert {v for k, v in scores["instance"].items() if k != "dice"} == {None}
    assert scores["detection"]["f1"] is None and "Dice alone" in scores["warnings"][0]


def test_image_without_nuclei_counts_false_positives_only(tmp_path: Path) -> None:
    root, folder = tmp_path / "set", tmp_path / "out"
    folder.mkdir()
    write_manifest(root, [add_image(root, "a", LABELS), add_image(root, "b", LABELS * 0)])
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", LABELS)
    scores = scores_of("--predictions", folder, root, folder=tmp_path)
    assert scores["instance"]["bpq"] == pytest.approx(1, abs=1e-6) and scores["instance"]["f1_iou50"] == 6 / 9
    assert scores["detection"]["precision"] == 0.5 and "1 image(s) have no true nucleus" in scores["warnings"][0]


def test_cell_tables_as_predictions(tmp_path: Path, masks: Path) -> None:
    from cellslide.store.anndata_columns import Columns
    from cellslide.store.cell_table import TableExtender, open_table
    from cellslide.store.table_writer import CellTableWriter
    from cellslide.types import Level, RunRecord, SlideInfo

    prob = np.array([[0.9, 0.1]] * 3, np.float32)
    spec = ModelSpec("m", "mask", 0.25, 256, 64, (0, 0, 0), (1, 1, 1), (ClassSpec("t", (1, 2, 3)),) * 1)
    for stem, width in (("a", 100), ("b", 100), ("wrong", 99)):
        level = Level(width, 60, 1.0)
        info = SlideInfo(stem, Path(f"{stem}.png"), "pillow", width, 60, 0.25, 0.25, "flag", (level,))
        (tmp_path / "out" / stem).mkdir(parents=True)
        writer = CellTableWriter(tmp_path / "out" / stem / "cells.zarr", info, spec)
        writer.append(cells_at(CENTRES, 8, prob[:, :1]))
        writer.close(RunRecord("0", "done", {}, {}, [], "cpu", "torch", "fp32", 0, "2024-01-01T00:00:00Z"))
    scores = scores_of("--predictions", tmp_path / "out", masks, folder=tmp_path)
    assert scores["detection"]["f1"] == 1.0 and scores["instance"]["bdq"] == pytest.approx(1, abs=1e-6)
    # What a classifier rejected is no nucleus.
    with open_table(tmp_path / "out" / "a" / "cells.zarr") as table:
        extender, n = TableExtender(table), len(table)
        extender.append(Columns({"is_nucleus": np.arange(n) > 0}, {}))
        extender.close(table.run)
    fewer = scores_of("--predictions", tmp_path / "out", masks, folder=tmp_path)
    assert fewer["detection"]["precision"] == 1.0
    assert fewer["detection"]["recall"] == pytest.approx(1 - 1 / scores["n_nuclei"])
    (tmp_path / "out" / "a" / "cells.zarr").rename(tmp_path / "a.zarr")
    (tmp_path / "out" / "wrong" / "cells.zarr").rename(tmp_path / "out" / "a" / "cells.zarr")
    result = run("--predictions", tmp_path / "out", masks)
    assert result.exit_code == 2 and "99 x 60 px, not 100 x 60" in result.output


def test_wrong_use_ends_with_2_and_one_line(masks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    np.save(folder / "a.npy", LABELS)
    missing = run("--predictions", folder, masks)
    assert missing.exit_code == 2 and "no prediction for image b" in missing.output
    Image.fromarray(LABELS.astype(np.uint16)).save(folder / "a.png")
    assert "several predictions for image a" in run("--predictions", folder, masks).output
    np.save(folder / "b.npy", LABELS[:, :50])
    (folder / "a.png").unlink()
    size = run("--predictions", folder, masks)
    assert size.exit_code == 2 and "50 x 60 px" in size.output
    for arguments in (
        ("--predictions", folder, "--model", "classical", masks),
        ("--predictions", folder, "--tta", masks),
        ("--model", "classical", "--tta", masks),
        ("--model", "classical", tmp_path),
        ("--model", "classical", masks, "--split", "test"),
        ("--model", "classical", masks, "--weights", folder / "a.npy"),
        ("--model", "classical", masks, "--map-class", "tumour"),
        ("--model", "classical", masks, "--mpp", "25"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.output


def test_cells_become_labels_in_image_pixels() -> None:
    nuclei = nuclei_of(cells_at([(80.0, 20.0), (10.0, 50.0)], 5), SHAPE, ())
    assert nuclei.labels is not None and nuclei.labels.shape == SHAPE and nuclei.class_name is None
    ids, xy = centroids(nuclei.labels)
    assert ids.tolist() == [1, 2]
    np.testing.assert_allclose(xy, [(80, 20), (10, 50)])


def test_table_is_shown(masks: Path) -> None:
    result = run("--model", "classical", masks)
    assert "bpq" in result.output and "detection f1 within 3 µm" in result.output


def test_organs_and_cohorts_have_scores_of_their_own_and_each_counts_alike(tmp_path: Path) -> None:
    rows = [
        add_image(tmp_path, "a", LABELS, organ="lung", cohort="one"),
        add_image(tmp_path, "b", LABELS, organ="lung", cohort="one"),
        add_image(tmp_path, "c", LABELS, organ="skin", cohort="two"),
    ]
    write_manifest(tmp_path, rows)
    found = tmp_path / "found"
    found.mkdir()
    for stem, labels in (("a", LABELS), ("b", LABELS), ("c", SHIFTED)):
        Image.fromarray(labels.astype(np.uint16)).save(found / f"{stem}.png")
    scores = scores_of("--predictions", found, tmp_path, folder=tmp_path)
    shifted = panoptic_quality(overlaps(LABELS, SHIFTED)).pq
    assert scores["organs"]["lung"]["bpq"] == pytest.approx(1, abs=1e-5)
    assert scores["organs"]["lung"]["n_images"] == 2 and scores["organs"]["lung"]["n_nuclei"] == 6
    assert scores["organs"]["skin"]["bpq"] == pytest.approx(shifted)
    assert scores["macro"]["bpq"] == pytest.approx((1 + shifted) / 2, abs=1e-5)
    assert scores["instance"]["bpq"] == pytest.approx((2 + shifted) / 3, abs=1e-5)
    assert set(scores["cohorts"]) == {"one", "two"}
    low, high = scores["intervals"]["bpq"]
    assert low == pytest.approx(shifted) and high == pytest.approx(1, abs=1e-5)  # one image in 27 draws is all three
    assert low <= scores["instance"]["bpq"] <= high
    assert "skin" in run("--predictions", found, tmp_path).output


def test_one_organ_has_no_table_and_one_image_no_interval(tmp_path: Path) -> None:
    write_manifest(tmp_path, [add_image(tmp_path, "a", LABELS)])
    found = tmp_path / "found"
    found.mkdir()
    Image.fromarray(LABELS.astype(np.uint16)).save(found / "a.png")
    scores = scores_of("--predictions", found, tmp_path, folder=tmp_path)
    assert scores["organs"] is scores["cohorts"] is scores["macro"] is scores["intervals"] is None


def test_consep_joins_seven_classes_to_four_and_weighs_a_wrong_class_twice(tmp_path: Path) -> None:
    names = [
        "inflammatory",
        "healthy epithelial",
        "malignant epithelial",
        "fibroblast",
        "muscle",
        "endothelial",
        "other",
    ]
    places = [(10.0 + 20 * i, 20.0) for i in range(7)]
    labels = discs((40, 150), places, 8)
    points = [(x, y, name) for (x, y), name in zip(places, names, strict=True)]
    write_manifest(tmp_path, [add_image(tmp_path, "a", labels, points=points)])
    found = tmp_path / "found"
    found.mkdir()
    # All are found; one that is inflammatory is called by our name, one spindle is called epithelial.
    called = ["lymphocyte", "tumor_epithelial", "epithelial", "stromal", "spindle-shaped", "epithelial", "other"]
    lines = [f"{x},{y},{name}" for (x, y), name in zip(places, called, strict=True)]
    (found / "a.csv").write_text("\n".join(["x,y,class", *lines]) + "\n")
    scores = scores_of("--predictions", found, tmp_path, "--protocol", "consep", folder=tmp_path)
    assert list(scores["classes"]) == ["epithelial", "inflammatory", "other", "spindle-shaped"]
    assert {name: c["support"] for name, c in scores["classes"].items()} == {
        "epithelial": 2, "inflammatory": 1, "other": 1, "spindle-shaped": 3,
    }  # fmt: skip
    # F_c = 2 TP / (2 TP + 2 FP_c + 2 FN_c), of the wrong one alone.
    assert scores["classes"]["epithelial"]["f1"] == pytest.approx(2 * 2 / (2 * 2 + 2))
    assert scores["classes"]["spindle-shaped"]["f1"] == pytest.approx(2 * 2 / (2 * 2 + 2))
    assert scores["classes"]["inflammatory"]["f1"] == scores["classes"]["other"]["f1"] == 1
