"""`cellslide classify` and `cellslide run` as users call them: inputs, files, exit codes, JSON lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cellslide.classify.targets import expand_targets
from cellslide.cli.main import cli
from cellslide.errors import UsageError
from cellslide.store.anndata_columns import Categorical
from cellslide.store.cell_table import open_table
from cellslide.store.recovery import tables_below
from cellslide.store.run_record import read_record
from tests.painted import DISC, PINK_DISC, paint_slide
from tests.support.fake_classifier import SPEC, FakeNuClass, fake_loaded
from tests.support.fakes import fake_model

QUICK = ("--device", "cpu", "--no-progress")
SEGMENT = (*QUICK, "--no-tissue", "--workers", "0")
CENTRES = [(60, 60), (180, 60), (300, 60), (60, 180), (180, 180), (300, 180)]


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> FakeNuClass:
    """Fake networks stand for those that ship."""
    network = FakeNuClass()
    loaded = fake_loaded(network)
    monkeypatch.setattr("cellslide.weights.load_model", lambda *args: fake_model())
    monkeypatch.setattr("cellslide.weights.classifier.load_classifier", lambda *args: loaded)
    return network


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a slide and `out/two`, segmented."""
    root = tmp_path_factory.mktemp("classify")
    colors = [(DISC, PINK_DISC)[k % 2] for k in range(len(CENTRES))]
    paint_slide(root / "two.tif", 400, 260, 0.5, CENTRES, 7.0, disc_color=colors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellslide.weights.load_model", lambda *args: fake_model())
        result = invoke("segment", root / "two.tif", "-o", root / "out", *SEGMENT)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared / "out", tmp_path / "out")
    # The table names its slide by the place where it was found.
    shutil.copy(prepared / "two.tif", tmp_path / "two.tif")
    return tmp_path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)])


def classify(*arguments: object) -> Result:
    return invoke("classify", *arguments, *QUICK)


def classes(folder: Path) -> list[str]:
    """Return what the cells are called, row by row of the painting."""
    with open_table(folder / "cells.zarr") as table:
        column = table.column("class")
        order = np.lexsort((table.vector("x"), np.rint(table.vector("y") / 60)))
    assert isinstance(column, Categorical)
    return [column.names[code] if code >= 0 else "" for code in column.codes[order]]


def test_slides_and_outputs_lead_to_the_same_cells(root: Path) -> None:
    result = classify(root / "two.tif", "-o", root / "out", "--organ", "Breast", "--gate", "local")
    assert result.exit_code == 0, result.output
    assert classes(root / "out" / "two") == ["blue", "pink", "blue", "pink", "blue", "pink"]
    assert "done" in result.stdout
    again = classify(root / "out", "--organ", "breast", "--gate", "local", "--log-json")
    assert [json.loads(line)["status"] for line in again.stdout.splitlines()] == ["skipped"]
    for place in (root / "out" / "two", root / "out" / "two" / "cells.zarr"):
        assert tables_below(place) == [root / "out" / "two" / "cells.zarr"]


def test_a_slide_and_its_output_are_one_target(root: Path) -> None:
    targets = expand_targets([str(root / "two.tif"), str(root / "out")], root / "out")
    assert [t.folder for t in targets] == [root / "out" / "two"]
    with pytest.raises(UsageError, match=r"nothing\.svs"):
        expand_targets([str(root / "nothing.svs")], root / "out")


def test_wrong_input_ends_with_two(root: Path, tmp_path: Path) -> None:
    out = ("-o", root / "out")
    typo = classify(root / "two.tif", *out, "--organ", "brest")
    assert typo.exit_code == 2 and "breast" in typo.stderr
    bare = classify(root / "two.tif", "-o", tmp_path / "empty")
    assert bare.exit_code == 2 and "cellslide segment" in bare.stderr and "--cells" in bare.stderr
    for flags, word in (
        (("--abstain", "1.5"), "--abstain"),
        (("--sample", "0"), "--sample"),
        (("--context-grid", "24"), "--context-grid"),
        (("--context-size", "35"), "--context-size"),
        (("--alignment", root / "two.tif"), "--alignment"),
    ):
        result = classify(root / "two.tif", *out, *flags)
        assert result.exit_code == 2 and word in result.stderr, (flags, result.output)
    untyped = classify(root / "out", "--regate")
    assert untyped.exit_code == 2 and "--regate" in untyped.stderr


def test_a_slide_that_is_gone_is_said_so(root: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = prepared / "hidden.tif"
    (prepared / "two.tif").rename(hidden)
    try:
        result = classify(root / "out")
    finally:
        hidden.rename(prepared / "two.tif")
    assert result.exit_code == 1 and "not there any more" in result.stderr


def test_another_slide_under_the_same_name_is_refused(root: Path) -> None:
    (root / "other").mkdir()
    paint_slide(root / "other" / "two.tif", 300, 300, 0.5)
    result = classify(root / "other" / "two.tif", "-o", root / "out")
    assert result.exit_code == 1 and "another -o" in result.stderr


def test_regate_applies_a_rule_without_the_network(root: Path, module: FakeNuClass, tmp_path: Path) -> None:
    classify(root / "two.tif", "-o", root / "out", "--organ", "breast")
    seen = dict(module.seen)
    (tmp_path / "t.csv").write_text("class,threshold\npink,1.0\n")
    result = classify(root / "out", "--gate", "local", "--thresholds", tmp_path / "t.csv", "--regate")
    assert result.exit_code == 0, result.output
    assert module.seen == seen
    with open_table(root / "out" / "two" / "cells.zarr") as table:
        abstained, path = table.vector("abstained"), table.column("path")
        decision, top = table.codes("class"), table.codes("class_top")
    assert isinstance(path, Categorical)
    np.testing.assert_array_equal(abstained, top == 0)
    np.testing.assert_array_equal(decision, np.where(abstained, 2, top))
    assert {path.names[c] for c in path.codes} == {"local"}
    record = read_record(root / "out" / "two")
    assert record is not None and record.config["classify"]["rule"]["decision"]["gate"] == "local"


def test_organ_comes_from_the_list(root: Path) -> None:
    (root / "slides.csv").write_text("path,organ\ntwo.tif,lung\n")
    assert classify(root / "slides.csv", "-o", root / "out").exit_code == 0
    with open_table(root / "out" / "two" / "cells.zarr") as table:
        organ = table.column("organ")
    assert isinstance(organ, Categorical) and set(np.array(organ.names)[organ.codes]) == {"lung"}


def test_no_organ_is_unknown_and_warned_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="cellslide"):
        assert classify(root / "two.tif", "-o", root / "out").exit_code == 0
    assert any("unknown" in message for message in caplog.messages)
    record = read_record(root / "out" / "two")
    assert record is not None and record.config["classify"]["organ"] == "unknown"


def test_dry_run_says_how_long_and_types_nothing(root: Path) -> None:
    before = (root / "out" / "two" / "run.json").read_bytes()
    result = classify(root / "two.tif", "-o", root / "out", "--organ", "breast", "--max-cells", "4", "--dry-run")
    assert result.exit_code == 0 and "4 cells, 4 contexts, about" in result.stdout
    assert (root / "out" / "two" / "run.json").read_bytes() == before


def feature(k: int, x: float, y: float) -> dict[str, object]:
    ring = [[x - 5, y - 5], [x + 5, y - 5], [x + 5, y + 5], [x - 5, y + 5], [x - 5, y - 5]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    uuid = f"00000000-0000-4000-8000-00000000000{k}"
    return {"type": "Feature", "id": uuid, "geometry": geometry, "properties": {"objectType": "detection"}}


def test_nuclei_of_another_tool_are_typed(root: Path, tmp_path: Path) -> None:
    features = [feature(k, x, y) for k, (x, y) in enumerate([*CENTRES[::-1], (9000.0, 10.0)])]
    path = tmp_path / "theirs.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    out = tmp_path / "foreign"
    flags = ("-o", out, "--cells", path, "--organ", "breast", "--gate", "local")
    result = classify(root / "two.tif", *flags)
    assert result.exit_code == 0, result.output
    with open_table(out / "two" / "cells.zarr") as table:
        uuid, word = table.vector("uuid"), table.column("class")
    assert isinstance(word, Categorical)
    told = {str(u)[-1]: word.names[c] for u, c in zip(uuid, word.codes, strict=True)}
    assert told == {str(5 - k): ("blue", "pink")[k % 2] for k in range(6)}
    assert json.loads(classify(root / "two.tif", *flags, "--log-json").stdout)["status"] == "skipped"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features[:3]}))
    other = classify(root / "two.tif", *flags)
    assert other.exit_code == 2 and "--overwrite" in other.stderr
    assert classify(root / "two.tif", *flags, "--overwrite").exit_code == 0
    assert len(classes(out / "two")) == 3
    both = classify(root / "two.tif", "-o", root / "out", "--cells", path)
    assert both.exit_code == 2 and "did not come from --cells" in both.stderr


def test_run_segments_and_types(root: Path, tmp_path: Path) -> None:
    flags = ("-o", tmp_path / "run", "--organ", "breast", "--gate", "local", *SEGMENT, "--log-json")
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"no slide")
    result = invoke("run", bad, root / "two.tif", *flags)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(o["slide"], o["status"], o["cells"]) for o in lines] == [("bad", "failed", None), ("two", "done", 6)]
    assert result.exit_code == 1
    folder = tmp_path / "run" / "two"
    assert classes(folder) == ["blue", "pink", "blue", "pink", "blue", "pink"]
    record = read_record(folder)
    assert record is not None and [w.id for w in record.weights] == ["fake", SPEC.weights_id]
    again = invoke("run", root / "two.tif", *flags)
    assert again.exit_code == 0 and json.loads(again.stdout)["status"] == "skipped"
    # What is typed is still what `segment` found: it is not done anew.
    segment = invoke("segment", root / "two.tif", "-o", tmp_path / "run", *SEGMENT)
    assert segment.exit_code == 0 and "skipped" in segment.stdout
    assert invoke("run", root / "two.tif", *flags, "--overwrite").exit_code == 0
