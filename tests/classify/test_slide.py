"""Typing of a slide's folder: the table, the record and other formats, resume, other rules, some of the cells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellslide.classify import classify_cells, classify_table, regate_slide
from cellslide.classify.decision import NOT_NUCLEUS, DecisionConfig, decide
from cellslide.classify.engine import Classifier
from cellslide.classify.rule_settings import RuleSettings
from cellslide.classify.slide import choose_cells, read_places, spec_of_record
from cellslide.classify.store import FOLDER, PartialProbs
from cellslide.classify.taxonomy import Taxonomy
from cellslide.config import ClassifyConfig, OutputConfig, SegmentConfig, TissueConfig
from cellslide.errors import Interrupted, UsageError
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import segment_slide
from cellslide.progress import Silent, Watch
from cellslide.slides.inputs import SlideInput
from cellslide.slides.slide import Slide, open_slide
from cellslide.store.anndata_columns import Categorical
from cellslide.store.cell_table import CellTable, open_table
from cellslide.store.run_record import fingerprint, read_record
from cellslide.types import Calibration, PathProbs, Plane
from cellslide.weights.organs import Organ
from tests.classify.test_rows import BREAST, INFER, NAMES, OUTPUT, assert_same, classifier, config, rule
from tests.painted import DISC, PINK_DISC, paint_slide
from tests.support.fake_classifier import SPEC, FakeNuClass, fake_loaded
from tests.support.fakes import fake_model


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a slide and its cells, to be copied by each test."""
    root = tmp_path_factory.mktemp("slides")
    places = [(x, y) for y in range(40, 380, 40) for x in range(40, 560, 40)]
    colors = [(DISC, PINK_DISC)[k % 2] for k in range(len(places))]
    paint_slide(root / "s.tif", 600, 400, 0.5, places, 7.0, disc_color=colors, background="tissue")
    output = OutputConfig(formats=("zarr", "geojson", "csv"))
    settings = SegmentConfig(tissue=TissueConfig(enabled=False), infer=INFER, output=output)
    with open_segmenter(fake_model(), settings) as segmenter:
        segment_slide(SlideInput(root / "s.tif", slide_id="s"), segmenter, root)
    return root


@pytest.fixture
def folder(segmented: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(segmented, tmp_path / "out")
    return tmp_path / "out" / "s"


@pytest.fixture
def slide(segmented: Path) -> Iterator[Slide]:
    with open_slide(segmented / "s.tif") as opened:
        yield opened


def obs(folder: Path, name: str) -> np.ndarray:
    with open_table(folder / "cells.zarr") as table:
        column = table.column(name)
    return column.codes if isinstance(column, Categorical) else np.asarray(column)


def obsm(folder: Path, name: str) -> np.ndarray:
    with open_table(folder / "cells.zarr") as table:
        return table.matrix(name)


def stored(folder: Path) -> PathProbs:
    return PathProbs(obsm(folder, "prob_local"), obsm(folder, "prob_global"), obs(folder, "gate").astype(np.float32))


def test_the_table_says_what_was_decided_and_from_what(folder: Path, slide: Slide) -> None:
    record, skipped = classify_table(folder, slide, classifier(), rule(abstain=0.9), BREAST)
    assert not skipped
    table = open_table(folder / "cells.zarr")
    assert table.class_names == NAMES
    probs = stored(folder)
    np.testing.assert_array_equal(probs.local, typed_slide(table, slide).local)
    decision = decide(probs, DecisionConfig(abstain=0.9), SPEC.calibration)
    np.testing.assert_array_equal(obs(folder, "class_top"), decision.class_index)
    np.testing.assert_array_equal(obs(folder, "class"), np.where(decision.abstained, 2, decision.class_index))
    np.testing.assert_array_equal(obs(folder, "class_prob"), decision.class_prob)
    np.testing.assert_array_equal(obs(folder, "abstained"), decision.abstained)
    np.testing.assert_array_equal(obsm(folder, "prob"), decision.prob)
    organ, path = table.column("organ"), table.column("path")
    assert isinstance(organ, Categorical) and organ.names == ("breast",) and not organ.codes.any()
    assert isinstance(path, Categorical) and path.names[0] == "mix" and not path.codes.any()
    # The middle of a disc tells its colour.
    middle = [
        slide.read_plane(Plane.of(slide.info, 0.5), (int(x), int(y), int(x) + 1, int(y) + 1))[0, 0]
        for x, y in places_of(table)
    ]
    np.testing.assert_array_equal(probs.local.argmax(axis=1), [int(p[2] > p[0]) for p in middle])
    counts = record.config["classify"]["counts"]
    assert counts["typed"] == len(table) and sum(counts["classes"].values()) + counts["abstained"] == len(table)


def places_of(table: CellTable) -> np.ndarray:
    return np.stack([table.vector("x"), table.vector("y")], axis=1)


def typed_slide(table: CellTable, slide: Slide) -> PathProbs:
    xy = places_of(table)
    found = PathProbs(
        np.zeros((len(xy), 2), np.float32), np.zeros((len(xy), 2), np.float32), np.zeros(len(xy), np.float32)
    )
    for rows, part in classify_cells(slide, xy, 0, classifier()):
        found.local[rows], found.global_[rows], found.gate[rows] = part.local, part.global_, part.gate
    return found


def test_a_run_killed_when_the_table_was_replaced_needs_no_network_to_end(folder: Path, slide: Slide) -> None:
    names = ("run.json", "cells.geojson.gz", "cells.csv.gz")
    before = {name: (folder / name).read_bytes() for name in names}
    ended, _ = classify_table(folder, slide, classifier(), rule(), BREAST)
    typed = (folder / "cells.geojson.gz").read_bytes()
    for name, content in before.items():
        (folder / name).write_bytes(content)
    module = FakeNuClass()
    record, skipped = classify_table(folder, slide, classifier(module), rule(), BREAST)
    assert not skipped and set(module.seen.values()) == {0}
    assert record.config["classify"] == ended.config["classify"] and record.weights == ended.weights
    assert (folder / "cells.geojson.gz").read_bytes() == typed != before["cells.geojson.gz"]
    assert classify_table(folder, slide, classifier(), rule(), BREAST)[1]


def test_the_record_names_the_classifier_and_segment_still_knows_its_work(folder: Path, slide: Slide) -> None:
    before = read_record(folder)
    assert before is not None
    classify_table(folder, slide, classifier(), rule(), BREAST)
    after = read_record(folder)
    assert after is not None and after.status == "done"
    assert [w.id for w in after.weights] == ["fake", "fake-classifier"]
    assert after.seconds.classify > 0 and after.counts == before.counts
    assert fingerprint(after) == fingerprint(before)
    assert spec_of_record(folder, after) == SPEC
    with open_table(folder / "cells.zarr") as table:
        assert table.run.config["classify"] == after.config["classify"]
    text = (folder / "run.json").read_text()
    assert json.loads(text)["config"]["classify"]["organ"] == "breast"


def test_other_formats_are_written_anew(folder: Path, slide: Slide) -> None:
    import gzip

    classify_table(folder, slide, classifier(), rule(), BREAST)
    regate_slide(folder, rule(abstain=float(np.median(obs(folder, "class_prob")))), OUTPUT)
    features = json.loads(gzip.decompress((folder / "cells.geojson.gz").read_bytes()))["features"]
    abstained, names = obs(folder, "abstained"), obs(folder, "class")
    assert 0 < abstained.sum() < len(abstained)
    for feature, unsure, index in zip(features, abstained, names, strict=True):
        properties = feature["properties"]
        assert properties["classification"]["name"] == ("abstained" if unsure else NAMES[index])
        assert {"probability", "gate"} <= set(properties["measurements"])
        assert "abstained" not in properties["measurements"]
    with gzip.open(folder / "cells.csv.gz", "rt") as stream:
        header = stream.readline()
    assert all(f'"{name}"' in header for name in ("class", "class_prob", "gate", "path", "abstained", "organ"))


def test_the_same_again_is_skipped_and_other_settings_are_refused(folder: Path, slide: Slide) -> None:
    classify_table(folder, slide, classifier(), rule(), BREAST)
    c = classifier()
    assert classify_table(folder, slide, c, rule(), BREAST)[1]
    assert c.module.seen["local"] == 0
    with pytest.raises(UsageError, match="organ.*--overwrite"):
        classify_table(folder, slide, c, rule(), Organ("lung", 1))
    anew = classifier(output=replace(OUTPUT, overwrite=True))
    assert not classify_table(folder, slide, anew, rule(), Organ("lung", 1))[1]
    record = read_record(folder)
    assert record is not None and [w.id for w in record.weights] == ["fake", "fake-classifier"]


def test_another_rule_needs_no_network(folder: Path, slide: Slide) -> None:
    classify_table(folder, slide, classifier(), rule(), BREAST)
    before = stored(folder)
    c = classifier()
    _, skipped = classify_table(folder, slide, c, rule("safe"), BREAST)
    assert not skipped and c.module.seen["local"] == 0
    assert_same(before, stored(folder))
    decision = decide(before, DecisionConfig("safe"), SPEC.calibration)
    np.testing.assert_array_equal(obsm(folder, "prob"), decision.prob)
    regate_slide(folder, rule("global", replace(SPEC.calibration, temperature_global=3.0)), OUTPUT)
    calibration = replace(SPEC.calibration, temperature_global=3.0)
    np.testing.assert_array_equal(obsm(folder, "prob"), decide(before, DecisionConfig("global"), calibration).prob)
    assert (obs(folder, "path") == 2).all()


def test_weights_may_leave_the_global_path_out(folder: Path, slide: Slide) -> None:
    calibration = replace(SPEC.calibration, paths="local")
    loaded = fake_loaded(calibration=calibration)
    settings = RuleSettings()
    alone = Classifier(loaded, settings.network(ClassifyConfig(infer=INFER)))
    record, _ = classify_table(folder, slide, alone, settings.rule(alone.spec), BREAST)
    assert alone.module.seen["context"] == 0 and record.config["classify"]["paths"] == "local"
    assert record.config["classify"]["rule"]["decision"]["gate"] == "local"
    assert np.isnan(stored(folder).gate).all() and (obs(folder, "path") == 1).all()
    with pytest.raises(UsageError, match="--paths both"):
        regate_slide(folder, rule("global", calibration), OUTPUT)
    # A rule of both paths runs both, unless that is forbidden.
    assert RuleSettings("safe").network(ClassifyConfig()).paths == "both"
    with pytest.raises(UsageError, match="--paths"):
        RuleSettings("global").network(ClassifyConfig(paths="local"))


def test_cells_that_are_not_typed_cannot_be_decided(folder: Path) -> None:
    with pytest.raises(UsageError, match="--regate"):
        regate_slide(folder, rule(), OUTPUT)


def test_a_rule_that_cannot_be_is_refused_before_the_network(folder: Path, slide: Slide) -> None:
    c = classifier()
    with pytest.raises(UsageError, match="--gate safe"):
        classify_table(folder, slide, c, rule("safe", Calibration()), BREAST)
    assert c.module.seen["local"] == 0


class StopAfter(Silent):
    """Asks to stop after so many pieces."""

    def __init__(self, pieces: int) -> None:
        self.left = pieces

    def advance(self, nuclei: int) -> None:
        self.left -= 1

    def __call__(self) -> int | None:
        return 130 if self.left <= 0 else None


def test_a_stopped_slide_goes_on_to_the_same_bits(
    folder: Path, slide: Slide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr("cellslide.classify.engine.BATCHES_AT_ONCE", 2)
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    classify_table(whole, slide, classifier(), rule(), BREAST)
    run_json = (folder / "run.json").read_bytes()
    stop = StopAfter(3)
    with pytest.raises(Interrupted):
        classify_table(folder, slide, classifier(), rule(), BREAST, Watch(stop, stop))
    assert (folder / FOLDER).is_dir() and (folder / "run.json").read_bytes() == run_json
    with pytest.raises(UsageError, match="organ"):
        classify_table(folder, slide, classifier(), rule(), Organ("lung", 1))
    c = classifier()
    classify_table(folder, slide, c, rule(), BREAST)
    assert 0 < c.module.seen["local"] < len(obs(folder, "gate"))
    assert not (folder / FOLDER).exists()
    assert_same(stored(whole), stored(folder))
    np.testing.assert_array_equal(obsm(whole, "prob"), obsm(folder, "prob"))


def test_only_some_cells(folder: Path, slide: Slide, tmp_path: Path) -> None:
    ring = [[0, 0], [600, 0], [600, 100], [0, 100], [0, 0]]
    roi = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (tmp_path / "roi.geojson").write_text(json.dumps(roi))
    with open_table(folder / "cells.zarr") as table:
        xy = read_places(table)
        y, n = xy[:, 1], len(xy)
        inside = choose_cells(xy, slide, config(roi=tmp_path / "roi.geojson"))
        np.testing.assert_array_equal(inside, np.flatnonzero(y < 100))
        half = choose_cells(xy, slide, config(sample=0.5))
        few = choose_cells(xy, slide, config(sample=0.5, max_cells=5))
        assert len(half) == -(-n // 2) and len(few) == 5 and set(few) <= set(half)
        np.testing.assert_array_equal(few, choose_cells(xy, slide, config(sample=0.5, max_cells=5)))
        other = config(max_cells=5, infer=replace(INFER, seed=1))
        assert not np.array_equal(few, choose_cells(xy, slide, other))
    classify_table(folder, slide, classifier(max_cells=5), rule(), BREAST)
    chosen = obs(folder, "class") >= 0
    assert chosen.sum() == 5
    for name in ("class_prob", "gate"):
        np.testing.assert_array_equal(np.isnan(obs(folder, name)), ~chosen)
    assert np.isnan(obsm(folder, "prob")[~chosen]).all() and not obs(folder, "abstained")[~chosen].any()
    assert (obs(folder, "path")[~chosen] == -1).all() and (obs(folder, "organ")[~chosen] == -1).all()
    regate_slide(folder, rule("local"), OUTPUT)
    np.testing.assert_array_equal(obs(folder, "class") >= 0, chosen)


def test_classes_are_projected(folder: Path, slide: Slide) -> None:
    taxonomy = Taxonomy("t", np.array([[1], [0]], np.float32), ("Tumour",))
    record, _ = classify_table(folder, slide, classifier(), rule(taxonomy=taxonomy), BREAST)
    prob = obsm(folder, "prob")
    np.testing.assert_allclose(obs(folder, "mass_lost"), prob[:, 1], atol=1e-6)
    np.testing.assert_allclose(obsm(folder, "prob_projected")[:, 0], prob[:, 0], atol=1e-6)
    assert record.config["classify"]["counts"]["mass_lost"] == pytest.approx(prob[:, 1].mean(), abs=1e-5)


def test_the_mass_that_is_lost_is_a_mean_over_nuclei(folder: Path, slide: Slide) -> None:
    taxonomy = Taxonomy("t", np.array([[1], [0]], np.float32), ("Tumour",))
    rejecting = replace(rule("local", taxonomy=taxonomy), classes=("pink", NOT_NUCLEUS))
    record, _ = classify_table(folder, slide, classifier(), rejecting, BREAST)
    kept = obs(folder, "is_nucleus").astype(bool)
    assert 0 < kept.sum() < len(kept)
    mean = obs(folder, "mass_lost")[kept].mean()
    assert record.config["classify"]["counts"]["mass_lost"] == pytest.approx(mean, abs=1e-5)


def test_a_table_without_cells_is_typed(tmp_path: Path) -> None:
    paint_slide(tmp_path / "e.tif", 200, 200, 0.5)
    settings = SegmentConfig(tissue=TissueConfig(enabled=False), infer=INFER, output=OUTPUT)
    with open_segmenter(fake_model(), settings) as segmenter:
        segment_slide(SlideInput(tmp_path / "e.tif", slide_id="e"), segmenter, tmp_path)
    with open_slide(tmp_path / "e.tif") as slide:
        record, _ = classify_table(tmp_path / "e", slide, classifier(), rule(), BREAST)
    assert record.config["classify"]["counts"]["typed"] == 0
    assert obsm(tmp_path / "e", "prob_local").shape == (0, 2)


def test_the_store_keeps_rows_and_refuses_other_settings(tmp_path: Path) -> None:
    store = PartialProbs.open(tmp_path, {"a": "1"}, 5, 2)
    one = PathProbs(
        np.array([[0.25, 0.75]], np.float32), np.full((1, 2), np.nan, np.float32), np.array([np.nan], np.float32)
    )
    store.add(np.array([3]), one)
    again = PartialProbs.open(tmp_path, {"a": "1"}, 5, 2)
    np.testing.assert_array_equal(again.missing(np.arange(5)), [0, 1, 2, 4])
    block, known = again.block(2, 5)
    np.testing.assert_array_equal(known, [False, True, False])
    np.testing.assert_array_equal(block.local[1], [0.25, 0.75])
    assert np.isnan(block.local[[0, 2]]).all() and np.isnan(block.gate).all()
    with pytest.raises(UsageError, match="a: 1 then, 2 now"):
        PartialProbs.open(tmp_path, {"a": "2"}, 5, 2)
    assert len(PartialProbs.open(tmp_path, {"a": "2"}, 5, 2, overwrite=True).missing(np.arange(5))) == 5


def test_an_organ_that_was_not_trained_abstains_more_and_says_so(folder: Path, slide: Slide) -> None:
    strict = rule(calibration=Calibration(abstain_unseen=1.0, accuracy_unseen=0.7))
    kidney = Organ("kidney", -1, trained=False)
    record, _ = classify_table(folder, slide, classifier(), strict, kidney)
    typing = record.config["classify"]
    assert (typing["organ"], typing["organ_trained"]) == ("kidney", False)
    assert typing["rule"]["calibration"]["abstain"] == 1.0
    with open_table(folder / "cells.zarr") as table:
        assert table.vector("abstained").all() and (table.codes("class") == len(table.class_names)).all()
        organ = table.column("organ")
    assert isinstance(organ, Categorical) and organ.names == ("kidney",)
    # The same again changes nothing, and another rule keeps the strictness.
    assert classify_table(folder, slide, classifier(), strict, kidney)[1]
    again = regate_slide(folder, replace(strict, decision=DecisionConfig("local")), OUTPUT)
    assert again.config["classify"]["counts"]["abstained"] == again.config["classify"]["counts"]["typed"]
    # What the user asks for counts more.
    asked = regate_slide(folder, replace(strict, decision=DecisionConfig("local", abstain=0.0)), OUTPUT)
    assert asked.config["classify"]["counts"]["abstained"] == 0


def test_a_trained_organ_abstains_as_ever(folder: Path, slide: Slide) -> None:
    strict = rule(calibration=Calibration(abstain_unseen=1.0))
    record, _ = classify_table(folder, slide, classifier(), strict, BREAST)
    assert record.config["classify"]["organ_trained"] is True
    assert record.config["classify"]["counts"]["abstained"] == 0


def test_what_is_no_nucleus_stays_in_the_table_and_in_no_count(folder: Path, slide: Slide) -> None:
    rejecting = replace(rule("local"), classes=("pink", NOT_NUCLEUS))
    record, _ = classify_table(folder, slide, classifier(), rejecting, BREAST)
    is_nucleus, n = obs(folder, "is_nucleus").astype(bool), len(obs(folder, "cell_id"))
    np.testing.assert_array_equal(is_nucleus, obs(folder, "class") == 0)
    wrong = int((~is_nucleus).sum())
    assert 0 < wrong < n
    assert (record.counts.nuclei, record.counts.rejected) == (n - wrong, wrong)
    counts = record.config["classify"]["counts"]
    assert (counts["typed"], counts["rejected"], counts["classes"]) == (n - wrong, wrong, {"pink": n - wrong})
    # Too unsure to be rejected, an object counts as a nucleus without a class; another rule counts anew.
    again = regate_slide(folder, replace(rejecting, decision=DecisionConfig(abstain=1.0)), OUTPUT)
    assert (again.counts.nuclei, again.counts.rejected, again.counts.abstained) == (n, 0, n)
