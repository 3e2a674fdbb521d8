"""Scores of classifiers: measures with known answers, rules side by side, the diagram, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cellslide.api import Model
from cellslide.classify.decision import DecisionConfig
from cellslide.classify.taxonomy import Taxonomy
from cellslide.cli.main import cli
from cellslide.errors import UsageError
from cellslide.evaluate import classification
from cellslide.evaluate.classification import ReliabilityBins, auroc, bootstrap, entropy, hardest, reliability_bins
from cellslide.evaluate.dataset import Sample, read_dataset
from cellslide.evaluate.diagram import GAP, RIGHT, Layout, draw_reliability, write_reliability
from cellslide.evaluate.paths import TypedCells, gather, image_confusion, paths_report, projection, score_paths
from cellslide.evaluate.score import ClassSet, dataset_classes
from cellslide.types import Calibration, Cells, Float64, PathProbs
from tests.support.fake_classifier import fake_loaded
from tests.support.fakes import fake_model
from tests.support.typed_set import CENTRES, NAMES, write_typed_set

CONTRACT = (
    *("model", "dataset", "n_images", "n_nuclei", "mpp", "instance", "detection", "classes"),
    *("mean_f1", "accuracy", "ece", "brier"),
)


def test_auroc_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    prob = np.round(rng.dirichlet((1, 1, 1), 200), 1)  # Rounded, so that there are ties.
    true = rng.integers(0, 3, 200)
    expected = [roc_auc_score(true == k, prob[:, k]) for k in range(3)]
    np.testing.assert_allclose(auroc(prob, true), expected, rtol=1e-12)
    assert auroc(prob, true * 0) == [None, None, None]
    assert auroc(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])) == [1.0, 1.0]


def test_bootstrap_has_the_width_of_the_binomial() -> None:
    counts = np.array([[[400, 100, 0], [100, 400, 0]]])
    found = bootstrap(counts, seed=3)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert found.accuracy == pytest.approx((0.8 - half, 0.8 + half), abs=0.004)
    assert found.macro_f1 == pytest.approx(found.accuracy, abs=0.004)
    assert bootstrap(counts, seed=3) == found and bootstrap(counts, seed=4) != found


def test_bootstrap_of_images_knows_that_nuclei_of_one_image_are_alike() -> None:
    good, bad = np.array([[50, 0, 0], [0, 50, 0]]), np.array([[25, 25, 0], [25, 25, 0]])
    images = np.stack([good, bad] * 5)
    by_image = bootstrap(images)
    by_nucleus = bootstrap(images.sum(axis=0, keepdims=True))
    assert by_image.accuracy is not None and by_nucleus.accuracy is not None
    assert np.ptp(by_image.accuracy) > 2 * np.ptp(by_nucleus.accuracy)
    certain = bootstrap(np.stack([good] * 4))
    assert certain.accuracy == certain.macro_f1 == (1.0, 1.0)


def test_bootstrap_without_nuclei_or_with_a_class_that_is_never_right() -> None:
    assert bootstrap(np.zeros((2, 3, 4), np.int64)) == classification.Intervals(None, None)
    found = bootstrap(np.array([[[0, 0, 7], [0, 3, 0]]]))
    assert found.accuracy is not None and 0 <= found.accuracy[0] <= 0.3 <= found.accuracy[1] <= 1


def test_entropy_and_the_hardest() -> None:
    prob = np.array([[1.0, 0.0], [0.5, 0.5], [0.9, 0.1]])
    np.testing.assert_allclose(entropy(prob), [0, 1, 0.468996], atol=1e-6)
    assert entropy(np.ones((2, 1))).tolist() == [0, 0]
    assert hardest(np.array([0.1, 0.9, 0.9, 0.2, 0.3]), 0.4).tolist() == [False, True, True, False, False]
    assert hardest(np.array([0.1, 0.2])).sum() == 1 and len(hardest(np.zeros(0))) == 0


def test_bins_by_hand() -> None:
    bins = reliability_bins(np.array([0.5, 0.51, 1.0, 0.0]), np.array([True, False, True, False]), 2)
    assert bins.n.tolist() == [2, 2] and bins.n_right.tolist() == [1, 1]
    np.testing.assert_allclose(bins.confidence, [0.25, 0.755])
    assert np.isnan(reliability_bins(np.array([0.9]), np.array([True]), 2).accuracy[0])


def test_confusion_of_images() -> None:
    found = image_confusion(np.array([0, 1, 1, 0]), np.array([0, 1, -1, 1]), np.array([0, 0, 1, 1]), 2)
    assert found.tolist() == [[[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 1]]]


def typed_cells() -> TypedCells:
    """Four cells of classes 0, 1, 1, 0; local is right on three of them, global on two, g picks the right one."""
    local = np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.9, 0.1]], np.float32)
    global_ = np.array([[0.4, 0.6], [0.4, 0.6], [0.1, 0.9], [0.3, 0.7]], np.float32)
    gate = np.array([0.0, 0.5, 1.0, 0.0], np.float32)
    return TypedCells(PathProbs(local, global_, gate), np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1]))


SAME = Taxonomy("same", np.eye(2, dtype=np.float32), ("a", "b"))
RELIABLE = Calibration(reliability_local=(0.9, 0.9), reliability_global=(0.2, 0.2))


def test_rules_stand_side_by_side() -> None:
    found = score_paths(typed_cells(), SAME, DecisionConfig(), RELIABLE)
    assert list(found) == ["local", "global", "mix", "safe"]
    accuracy = {name: s.accuracy for name, s in found.items() if s is not None}
    assert accuracy == {"local": 0.75, "global": 0.5, "mix": 1.0, "safe": 1.0}
    local = found["local"]
    assert local is not None and local.n == 4 and local.micro_f1 == 0.75
    assert local.classes["a"].precision == pytest.approx(2 / 3) and local.classes["a"].support == 2
    assert local.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert local.brier == pytest.approx(2 * (0.04 + 0.09 + 0.36 + 0.01) / 4, rel=1e-5)
    assert local.auroc == 1.0
    assert local.low_confidence == local.high_entropy
    assert (local.low_confidence.n, local.low_confidence.accuracy) == (1, 0.0)
    mix = found["mix"]
    assert mix is not None and mix.low_confidence.accuracy == 1.0, "the same nucleus, which the mix gets right"
    assert mix.accuracy_ci == (1.0, 1.0) and mix.mass_lost == 0.0


def test_rules_that_cannot_be_applied_are_none() -> None:
    cells = typed_cells()
    assert score_paths(cells, SAME, DecisionConfig(), Calibration())["safe"] is None
    nothing = PathProbs(cells.probs.local, np.full((4, 2), np.nan, np.float32), np.full(4, np.nan, np.float32))
    found = score_paths(TypedCells(nothing, cells.true_class, cells.image), SAME, DecisionConfig(), RELIABLE)
    assert [name for name, s in found.items() if s is not None] == ["local"]


def test_weights_of_one_path_are_reported_by_that_path(tmp_path: Path) -> None:
    cells, data = typed_cells(), read_dataset(write_typed_set(tmp_path, 2))
    nothing = PathProbs(cells.probs.local, np.full((4, 2), np.nan, np.float32), np.full(4, np.nan, np.float32))
    scores = score_paths(TypedCells(nothing, cells.true_class, cells.image), SAME, DecisionConfig(), Calibration())
    report = paths_report("m", data, None, 0.5, scores, "mix")
    assert (report.gate, report.accuracy) == ("local", 0.75) and "--gate mix" in report.warnings[0]
    assert report.paths is not None and report.paths["mix"] is None


def test_abstaining_is_scored_by_what_is_accepted() -> None:
    local = score_paths(typed_cells(), SAME, DecisionConfig(abstain=0.65), RELIABLE)["local"]
    assert local is not None and (local.accuracy, local.coverage, local.accuracy_accepted) == (0.75, 0.75, 1.0)
    nothing = score_paths(typed_cells(), SAME, DecisionConfig(abstain=1.0), RELIABLE)["local"]
    assert nothing is not None and (nothing.coverage, nothing.accuracy_accepted) == (0.0, None)


def test_probability_on_other_classes_is_lost_and_counted() -> None:
    cells = typed_cells()
    only_a = Taxonomy("a", np.array([[1], [0]], np.float32), ("a",))
    kept = TypedCells(cells.probs, np.zeros(4, np.int64), cells.image)
    local = score_paths(kept, only_a, DecisionConfig(), Calibration())["local"]
    assert local is not None and local.accuracy == 1.0
    assert local.mass_lost == pytest.approx((0.2 + 0.7 + 0.4 + 0.1) / 4)
    assert local.brier == pytest.approx(2 * (0.04 + 0.49 + 0.16 + 0.01) / 4, rel=1e-5)


def test_projection_by_name_by_map_and_by_taxonomy() -> None:
    plain = projection(("Tumour", "mast-cell", "stroma"), ClassSet.of(("stroma", "tumour")))
    assert plain.matrix.tolist() == [[0, 1], [0, 0], [1, 0]] and plain.names == ("stroma", "tumour")
    mapped = projection(("a", "b", "c"), ClassSet.of(("x", "y"), {"a": "x", "b": "x", "c": "y"}))
    assert mapped.matrix.tolist() == [[1, 0], [1, 0], [0, 1]]
    first = Taxonomy("t", np.array([[1], [1], [0]], np.float32), ("tumour",))
    chained = projection(("a", "b", "c"), ClassSet.of(("stroma", "Tumour")), first)
    assert chained.matrix.tolist() == [[0, 1], [0, 1], [0, 0]]
    with pytest.raises(UsageError, match="--map-class"):
        projection(("a", "b"), ClassSet.of(("x", "y")))


def test_gather_keeps_the_order_and_drops_what_has_no_class(tmp_path: Path) -> None:
    data = read_dataset(write_typed_set(tmp_path, 3))
    seen: list[tuple[str, float, int]] = []

    def predict(sample: Sample, mpp: float, xy: Float64) -> PathProbs:
        seen.append((sample.stem, mpp, len(xy)))
        column = xy.astype(np.float32)
        return PathProbs(column, column, column[:, 0])

    classes = ClassSet.of(("blue",))
    cells = gather(data, classes, predict, mpp=0.25)
    assert [s[:2] for s in seen] == [("i0", 0.25), ("i1", 0.25), ("i2", 0.25)]
    assert cells.image.tolist() == sorted(cells.image.tolist()) and len(cells.image) == 3 * NAMES.count("blue")
    blue = [xy for xy, name in zip(CENTRES, NAMES, strict=True) if name == "blue"]
    np.testing.assert_allclose(cells.probs.local[: len(blue)], blue)
    with pytest.raises(UsageError, match="no nucleus has a class"):
        gather(data, ClassSet.of(("other",)), predict)


def test_diagram_shows_bars_gaps_and_shares(tmp_path: Path) -> None:
    n = np.zeros(10, np.int64)
    n[9] = 100
    bins = ReliabilityBins(n, (0.5 * n).astype(np.int64), 0.95 * n)
    layout = Layout()
    picture = np.asarray(draw_reliability({"mix": bins, "local": bins}, layout))
    assert picture.shape == (layout.panel[1], 2 * layout.panel[0], 3)

    def at(confidence: float, height: float) -> tuple[int, ...]:
        x = layout.left + confidence * layout.plot
        return tuple(picture[int(layout.top + (1 - height) * layout.plot), int(x)].tolist())

    # Off the diagonal: blue below the accuracy, open between it and the confidence, framed.
    assert at(0.93, 0.3) == RIGHT and at(0.97, 0.7) == (255, 255, 255) and at(0.93, 0.948) == GAP
    assert at(0.5, 0.2) == (255, 255, 255)
    write_reliability(tmp_path / "d.png", {"mix": bins})
    with Image.open(tmp_path / "d.png") as image:
        assert image.format == "PNG" and image.size == layout.panel
    assert not list(tmp_path.glob("*.tmp"))
    draw_reliability({"none": reliability_bins(np.zeros(0), np.zeros(0, bool))})
    with pytest.raises(ValueError, match="nothing"):
        draw_reliability({})


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments), "--no-progress", "--device", "cpu"])


def scores_of(*arguments: object, folder: Path) -> dict[str, Any]:
    file = folder / "scores.json"
    result = run(*arguments, "--json", file)
    assert result.exit_code == 0, result.output
    scores: dict[str, Any] = json.loads(file.read_text())
    return scores


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake classifier, whichever weights are named."""
    monkeypatch.setattr("cellslide.weights.classifier.load_classifier", lambda model, weights: fake_loaded())


@pytest.mark.usefixtures("fake")
def test_command_on_given_points(tmp_path: Path) -> None:
    root = write_typed_set(tmp_path / "set", 4, wrong=1)
    picture = tmp_path / "new" / "r.png"
    call = ("--nuclei", "given", root, "--gate", "local", "--reliability", picture)
    scores = scores_of(*call, folder=tmp_path)
    assert set(CONTRACT) <= set(scores)
    assert (scores["model"], scores["nuclei"], scores["gate"], scores["n_images"]) == (
        "fake-classifier", "given", "local", 4,
    )  # fmt: skip
    assert scores["n_nuclei"] == 36 and scores["mpp"] == 0.5
    assert scores["accuracy"] == pytest.approx(8 / 9), "one false label in nine"
    assert set(scores["paths"]) == {"local", "global", "mix", "safe"}
    assert scores["paths"]["local"]["accuracy"] == scores["accuracy"]
    assert scores["paths"]["local"]["ece"] == scores["ece"] and scores["paths"]["local"]["brier"] == scores["brier"]
    assert scores["mean_f1"] == scores["paths"]["local"]["macro_f1"]
    low, high = scores["paths"]["local"]["accuracy_ci"]
    assert low < scores["accuracy"] <= high
    assert len(scores["paths"]["mix"]["bins"]) == 15 and sum(b["n"] for b in scores["paths"]["mix"]["bins"]) == 36
    # The paper around is pink: the context alone says the same of every cell.
    assert scores["paths"]["global"]["accuracy"] < 0.7
    assert set(scores["instance"].values()) == {None}
    with Image.open(picture) as image:
        assert image.width == 4 * Layout().panel[0]
    assert scores_of(*call, folder=tmp_path) == scores, "seeded"


@pytest.mark.usefixtures("fake")
def test_command_knows_organs_and_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_typed_set(tmp_path / "set", 2, organ="Lung, NOS")
    scores = scores_of("--nuclei", "given", root, "--split", "val", folder=tmp_path)
    assert scores["n_nuclei"] == 9 and scores["split"] == "val" and scores["gate"] == "mix"
    # Organ 1 (lung) makes no difference to what the fake says, but the name is looked up.
    assert not caplog.records
    other = write_typed_set(tmp_path / "other", 1, organ="tonsil")
    scores_of("--nuclei", "given", other, folder=tmp_path)
    assert "tonsil" in caplog.text
    result = run("--nuclei", "given", root, "--organ", "brest")
    assert result.exit_code == 2 and "breast" in result.output


@pytest.mark.usefixtures("fake")
def test_command_maps_classes_and_says_what_is_wrong(tmp_path: Path) -> None:
    root = write_typed_set(tmp_path / "set", 1)
    renamed = tmp_path / "renamed"
    root.rename(renamed)
    points = renamed / "points" / "i0.csv"
    points.write_text(points.read_text().replace("blue", "lymphocyte"))
    result = run("--nuclei", "given", renamed, "--map-class", "blue=tumour")
    assert result.exit_code == 2 and "lymphocyte" in result.output
    scores = scores_of(
        "--nuclei", "given", renamed, "--map-class", "blue=lymphocyte", "--gate", "local", folder=tmp_path
    )
    assert scores["accuracy"] == 1.0
    for arguments, word in (
        (("--nuclei", "given", renamed, "--per-image", tmp_path / "x.csv"), "--per-image"),
        (("--nuclei", "detected", renamed, "--reliability", tmp_path / "x.png"), "--reliability"),
        (("--model", "classical", renamed, "--organ", "breast"), "--organ"),
        (("--model", "classical", renamed, "--gate", "safe"), "--gate"),
        (("--nuclei", "given", renamed, "--abstain", "2"), "--abstain"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and word in result.output, arguments


@pytest.mark.usefixtures("fake")
def test_command_on_detected_nuclei(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector finds all but the last nucleus, a pixel off, and one that is not there."""

    finder, asked = SimpleNamespace(config=None), []

    def load(name: str, *more: object) -> SimpleNamespace:
        asked.append(name)
        return SimpleNamespace(spec=fake_model().spec)

    def segment_array(model: object, image: object, mpp: float, config: Any) -> Cells:
        assert model is finder and mpp == 0.5 and asked == ["finder"]
        xy = np.array([*CENTRES[:-1], (5.0, 155.0)]) + (1.0, 0.0)
        zero, one = np.zeros(len(xy), np.int32), np.ones(len(xy), np.float32)
        return Cells(xy, zero, zero, one, one)

    monkeypatch.setattr("cellslide.weights.load_model", load)
    monkeypatch.setattr(Model, "image_segmenter", lambda self, tiles: finder)
    monkeypatch.setattr("cellslide.pipeline.segment_array", segment_array)
    root = write_typed_set(tmp_path / "set", 1)
    table = tmp_path / "images.csv"
    call = ("--nuclei", "detected", "--detector", "finder", root, "--gate", "local", "--per-image", table)
    scores = scores_of(*call, folder=tmp_path)
    assert scores["detection"]["precision"] == scores["detection"]["recall"] == pytest.approx(8 / 9)
    assert scores["nuclei"] == "detected" and scores["accuracy"] == 1.0
    # The missing nucleus is blue, the invented one lies on paper, which is pink.
    n_blue, n_pink = NAMES.count("blue"), NAMES.count("pink")
    assert scores["classes"]["blue"]["f1"] == pytest.approx(2 * (n_blue - 1) / (2 * n_blue - 1))
    assert scores["classes"]["pink"]["f1"] == pytest.approx(2 * n_pink / (2 * n_pink + 1))
    assert set(scores["paths"]) == {"local", "global", "mix", "safe"}
    assert scores["paths"]["local"]["mean_f1"] == scores["mean_f1"] > scores["paths"]["global"]["mean_f1"]
    assert table.read_text().count("\n") == 2


def test_classes_of_a_data_set_are_needed(tmp_path: Path) -> None:
    root = write_typed_set(tmp_path / "set", 1)
    points = root / "points" / "i0.csv"
    points.write_text("x,y\n10,10\n")
    assert dataset_classes(read_dataset(root)) == ()
    result = run("--nuclei", "given", root)
    assert result.exit_code == 2 and "no classes" in result.output


def test_names_of_one_kind_count_as_each_other() -> None:
    breast = ClassSet.of(("lymphocyte", "stromal", "tumor_epithelial"))
    assert breast.index(["Inflammatory", "epithelial", "Neoplastic", "spindle-shaped", "dead"]).tolist() == [
        0,
        2,
        2,
        1,
        -1,
    ]
    # What the data set tells apart stays apart, and what is said counts more.
    apart = ClassSet.of(("epithelial", "neoplastic", "connective"), {"tumor_epithelial": "neoplastic"})
    assert apart.index(["epithelial", "neoplastic", "stromal", "tumor_epithelial"]).tolist() == [0, 1, 2, 1]
    assert ClassSet.of(("epithelial", "neoplastic")).index(["tumor_epithelial"]).tolist() == [-1]
