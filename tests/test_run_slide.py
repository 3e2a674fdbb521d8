"""`pipeline.run_slide`: what `segment` and `classify` give, in one pass, whenever it is stopped."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellslide import pipeline
from cellslide.classify import SlideClassifier, classify_table
from cellslide.classify.targets import Target
from cellslide.config import OutputConfig, SegmentConfig, TissueConfig
from cellslide.errors import Interrupted, SlideError
from cellslide.formats import files
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import classify_slide, run_slide, segment_slide
from cellslide.progress import IDLE, Silent, Watch
from cellslide.slides.inputs import SlideInput
from cellslide.slides.slide import open_slide
from cellslide.store.anndata_columns import Categorical
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import read_record
from cellslide.types import RunRecord
from tests.classify.test_rows import BREAST, INFER, classifier, rule
from tests.painted import DISC, PINK_DISC, paint_slide
from tests.support.fakes import fake_model

CONFIG = SegmentConfig(
    tissue=TissueConfig(enabled=False), infer=INFER, output=OutputConfig(formats=("zarr", "geojson", "csv"))
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide, and in `out` what segment and classify make of it."""
    folder = tmp_path_factory.mktemp("run")
    places = [(x, y) for y in range(40, 260, 40) for x in range(40, 360, 40)]
    colors = [(DISC, PINK_DISC)[k % 2] for k in range(len(places))]
    paint_slide(folder / "s.tif", 400, 300, 0.5, places, 7.0, disc_color=colors, background="tissue")
    with open_segmenter(fake_model(), CONFIG) as segmenter:
        segment_slide(source(folder), segmenter, folder / "out")
    classify_slide(Target(source(folder), folder / "out" / "s"), by())
    return folder


def source(root: Path) -> SlideInput:
    return SlideInput(root / "s.tif", slide_id="s")


def by(**settings: Any) -> SlideClassifier:
    return SlideClassifier(classifier(output=CONFIG.output, **settings), rule(), lambda _: BREAST)


def run(root: Path, out: Path, watch: Watch = IDLE, typist: SlideClassifier | None = None) -> tuple[RunRecord, bool]:
    with open_segmenter(fake_model(), CONFIG) as segmenter:
        return run_slide(source(root), segmenter, typist or by(), out, watch)


def assert_same_cells(one: Path, other: Path) -> None:
    with open_table(one / "cells.zarr") as first, open_table(other / "cells.zarr") as second:
        assert first.columns == second.columns and first.matrices == second.matrices and len(first) > 0
        assert first.class_names == second.class_names
        for name in first.columns:
            pair = [c.codes if isinstance(c, Categorical) else c for c in (first.column(name), second.column(name))]
            np.testing.assert_array_equal(*pair, err_msg=name)
        for name in first.matrices:
            np.testing.assert_array_equal(first.matrix(name), second.matrix(name), err_msg=name)


class Hears(Silent):
    """Asks for a stop at the n-th advance after the `stage`-th beginning, 1 for tiles and 2 for cells."""

    def __init__(self, stage: int, n: int) -> None:
        self.nth, self.n, self.begun = stage, n, 0

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        self.begun += 1

    def advance(self, nuclei: int, tiles: int = 1) -> None:
        self.n -= self.begun == self.nth

    def stop(self) -> int | None:
        return 143 if self.n <= 0 else None


def test_each_file_is_written_once_and_no_table_is_copied(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, opened = Counter[str](), []
    export = files.export_table
    monkeypatch.setattr(
        files, "export_table", lambda t, f, names, *a: (written.update(names), export(t, f, names, *a))[1]
    )
    reader = pipeline.open_slide
    monkeypatch.setattr(pipeline, "open_slide", lambda *a: (opened.append(a), reader(*a))[1])
    monkeypatch.setattr(shutil, "copytree", None)
    record, before = run(root, tmp_path)
    assert (record.status, before) == ("done", False) and len(opened) == 1
    assert written == {"zarr": 1, "geojson": 1, "csv": 1}
    assert_same_cells(root / "out" / "s", tmp_path / "s")
    assert {p.name for p in (tmp_path / "s").iterdir()} == {p.name for p in (root / "out" / "s").iterdir()}
    assert (tmp_path / "s" / "cells.csv.gz").read_bytes() == (root / "out" / "s" / "cells.csv.gz").read_bytes()
    kept = read_record(tmp_path / "s")
    assert kept is not None and (kept.batch_size.tiles, kept.batch_size.local) == (4, 4) and kept.batch_size.context
    assert kept.counts == read_record(root / "out" / "s").counts  # type: ignore[union-attr]
    assert run(root, tmp_path)[1]


@pytest.mark.parametrize(("stage", "n"), [(1, 1), (2, 1), (2, 2)])
def test_a_run_that_was_stopped_goes_on(
    root: Path, tmp_path: Path, stage: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellslide.classify.engine.BATCHES_AT_ONCE", 1)
    hears = Hears(stage, n)
    with pytest.raises(Interrupted):
        run(root, tmp_path, Watch(hears, hears.stop))
    record = read_record(tmp_path / "s")
    assert record is not None and record.status == "interrupted"
    typist = by()
    assert run(root, tmp_path, typist=typist)[0].status == "done"
    with open_table(tmp_path / "s" / "cells.zarr") as table:
        assert (typist.classifier.module.seen["local"] < len(table)) == (stage == 2)
    assert not list((tmp_path / "s").glob(".*"))
    assert_same_cells(root / "out" / "s", tmp_path / "s")


def test_segment_and_classify_go_on_from_a_stopped_run(root: Path, tmp_path: Path) -> None:
    hears = Hears(2, 1)
    with pytest.raises(Interrupted):
        run(root, tmp_path, Watch(hears, hears.stop))
    with open_segmenter(fake_model(), CONFIG) as segmenter:
        segment_slide(source(root), segmenter, tmp_path)
    typist = by()
    with open_slide(root / "s.tif") as slide:
        classify_table(tmp_path / "s", slide, typist.classifier, typist.rule, BREAST)
    assert_same_cells(root / "out" / "s", tmp_path / "s")


def test_nuclei_that_cannot_be_typed_are_written_all_the_same(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise SlideError("no number")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "type_cells", broken)
        with pytest.raises(SlideError, match="no number"):
            run(root, tmp_path)
    record = read_record(tmp_path / "s")
    assert record is not None and record.status == "done" and "classify" not in record.config
    assert (tmp_path / "s" / "cells.csv.gz").is_file()
    assert not run(root, tmp_path)[1]
    assert_same_cells(root / "out" / "s", tmp_path / "s")


def test_a_run_types_what_segment_has_found(root: Path, tmp_path: Path) -> None:
    with open_segmenter(fake_model(), replace(CONFIG, output=OutputConfig(formats=("zarr",)))) as segmenter:
        segment_slide(source(root), segmenter, tmp_path)
    assert not run(root, tmp_path)[1]
    assert_same_cells(root / "out" / "s", tmp_path / "s")
    assert (tmp_path / "s" / "cells.csv.gz").is_file()
