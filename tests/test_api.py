"""What is called from Python: each function, with arrays and with paths, and the command beside it."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import cellslide as cs
from cellslide import api
from cellslide.cli.main import cli
from cellslide.errors import MissingDependencyError, PixelSizeError, UsageError
from cellslide.store.anndata_columns import Categorical, TableError
from cellslide.types import Cells
from tests.conftest import CHECKOUT
from tests.painted import DISC, PINK_DISC, PaintedSlide, paint_slide
from tests.support.fake_classifier import fake_loaded
from tests.support.fake_muse import fake_muse
from tests.support.fakes import fake_model
from tests.support.typed_set import write_typed_set

CENTRES = [(60, 60), (180, 60), (300, 60), (60, 180), (180, 180), (300, 180)]
COLORS = [(DISC, PINK_DISC)[k % 2] for k in range(len(CENTRES))]


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake networks stand for those that ship."""
    monkeypatch.setattr("cellslide.weights.load_model", lambda *args: fake_model())
    monkeypatch.setattr("cellslide.weights.classifier.load_classifier", lambda *args: fake_loaded())
    monkeypatch.setattr("cellslide.weights.muse.load_muse", lambda *args: fake_muse())


@pytest.fixture
def painted(tmp_path: Path) -> PaintedSlide:
    return paint_slide(tmp_path / "six.tif", 400, 260, 0.5, CENTRES, 7.0, disc_color=COLORS)


@pytest.fixture
def finder() -> cs.Model:
    with cs.load_model(device="cpu", workers=0) as model:
        yield model


@pytest.fixture
def table(painted: PaintedSlide, finder: cs.Model, tmp_path: Path) -> cs.CellTable:
    return cs.segment(painted.path, tmp_path / "out", model=finder, tissue=False)


def discs_at(xy: np.ndarray) -> list[int]:
    """Return which disc lies at each place; none is farther than a pixel."""
    apart = np.linalg.norm(xy[:, None] - np.array(CENTRES), axis=2)
    assert (apart.min(axis=1) < 1).all()
    return apart.argmin(axis=1).tolist()


def test_import_is_light() -> None:
    code = (
        "import sys, time\nbegan = time.process_time()\nimport cellslide\ntook = time.process_time() - began\n"
        "import cellslide.api\nheavy = [m for m in ('torch', 'numpy', 'zarr', 'click') if m in sys.modules]\n"
        "assert set(cellslide.__all__) <= set(dir(cellslide))\nprint(took, heavy)"
    )
    answers = [
        subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert all(answer.split(maxsplit=1)[1].strip() == "[]" for answer in answers)
    assert min(float(answer.split()[0]) for answer in answers) < 0.1
    assert (CHECKOUT / "cellslide" / "py.typed").is_file()


def test_names_are_those_of_the_functions() -> None:
    for name in cs.__all__:
        assert callable(getattr(cs, name)), name
    # Names of rooms too, whoever imported the room before.
    for name in ("classify", "embed", "evaluate"):
        assert inspect.signature(getattr(cs, name)) == inspect.signature(getattr(api, name))
    with pytest.raises(AttributeError, match="nothing"):
        cs.nothing  # noqa: B018


def test_open_slide(painted: PaintedSlide) -> None:
    with cs.open_slide(painted.path) as slide:
        assert (slide.info.width_px, slide.info.height_px, slide.info.mpp_x) == (400, 260, pytest.approx(0.5))
    with cs.open_slide(painted.path, mpp=0.25) as slide:
        assert slide.info.mpp_x == 0.25


def test_an_image_gives_cells_in_memory(painted: PaintedSlide, finder: cs.Model) -> None:
    cells = cs.segment(painted.image, model=finder, mpp=0.5)
    assert isinstance(cells, Cells) and len(cells) == len(CENTRES)
    order = discs_at(cells.centroid_xy)
    typed = cs.classify(cells, painted.image, mpp=0.5, organ="breast")
    assert typed.class_prob is not None and typed.class_prob.shape == (6, 2)
    names = cs.load_model(task="classify").classes
    assert [names[k] for k in typed.class_prob.argmax(axis=1)] == [("blue", "pink")[k % 2] for k in order]
    vectors = cs.embed(cells, painted.image, mpp=0.5)
    np.testing.assert_allclose(vectors, np.array(COLORS)[order] / 255, atol=0.02)


def test_an_image_needs_a_pixel_size_and_no_folder(painted: PaintedSlide, finder: cs.Model, tmp_path: Path) -> None:
    with pytest.raises(PixelSizeError, match="mpp"):
        cs.segment(painted.image, model=finder)
    with pytest.raises(UsageError, match="out"):
        cs.segment(painted.image, tmp_path, model=finder, mpp=0.5)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="uint8"):
        cs.segment(painted.image.astype(float), model=finder, mpp=0.5)
    with pytest.raises(UsageError, match="out"):
        cs.segment(painted.path, model=finder)
    with pytest.raises(UsageError, match="2 slides"):
        shutil.copy(painted.path, painted.path.with_name("again.tif"))
        cs.segment(painted.path.parent, tmp_path / "out", model=finder)


def test_a_path_gives_a_table_that_equals_the_commands(
    table: cs.CellTable, painted: PaintedSlide, tmp_path: Path
) -> None:
    flags = ("--no-tissue", "--device", "cpu", "--workers", "0", "--no-progress")
    other = tmp_path / "command"
    result = CliRunner().invoke(cli, ["segment", str(painted.path), "-o", str(other), *flags])
    assert result.exit_code == 0, result.output
    assert same_files(table.path.parent, other / "six")
    assert_same_rows(table, cs.read_cells(other / "six"))
    typed = cs.classify(table, model=cs.load_model(task="classify", device="cpu"), organ="breast")
    result = CliRunner().invoke(cli, ["classify", str(other / "six"), "--organ", "breast", *flags[1:3], flags[-1]])
    assert result.exit_code == 0, result.output
    assert same_files(typed.path.parent, other / "six")
    assert_same_rows(typed, cs.read_cells(other / "six"))
    ran = cs.run(painted.path, tmp_path / "ran", model=cs.load_model(workers=0), organ="breast", tissue=False)
    assert_same_rows(ran, typed)


def same_files(one: Path, other: Path) -> bool:
    """Compare the names, and what `run.json` says of settings and counts."""
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    first, second = (json.loads((folder / "run.json").read_text()) for folder in (one, other))
    for record in (first, second):
        # When the nuclei were found.
        record["config"].get("classify", {}).get("network", {}).pop("cells.found", None)
    return all(first[key] == second[key] for key in ("config", "counts", "weights", "slide", "precision"))


def assert_same_rows(one: cs.CellTable, other: cs.CellTable) -> None:
    assert one.columns == other.columns and one.matrices == other.matrices and len(one) == len(other) == len(CENTRES)
    for name in one.columns:
        first, second = one.column(name), other.column(name)
        if isinstance(first, Categorical):
            assert isinstance(second, Categorical) and first.names == second.names
            first, second = first.codes, second.codes
        np.testing.assert_array_equal(first, second)
    for name in one.matrices:
        np.testing.assert_array_equal(one.matrix(name), other.matrix(name))


def test_a_table_is_handed_on(table: cs.CellTable) -> None:
    assert sum(len(chunk.cells) for chunk in table.iter_chunks(rows=4)) == len(table) == 6
    frame = table.to_geopandas()
    assert {"x", "y", "score"} <= set(frame.columns) and frame.geometry.is_valid.all()
    np.testing.assert_allclose(frame.geometry.area * 0.25, frame["area_um2"], rtol=0.02)
    assert table.to_anndata().n_obs == 6
    assert table.to_spatialdata().tables["cells"].n_obs == 6


def test_a_missing_package_is_named_with_its_extra(table: cs.CellTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    with pytest.raises(MissingDependencyError, match=r"cellslide\[spatial\]"):
        table.to_spatialdata()


def test_embed_keeps_the_vectors_in_the_table(table: cs.CellTable) -> None:
    folder = table.path.parent
    order = discs_at(np.stack([table.vector("x"), table.vector("y")], axis=1))
    vectors = cs.embed(table)
    np.testing.assert_allclose(vectors, np.array(COLORS)[order] / 255, atol=0.02)
    np.testing.assert_array_equal(cs.read_cells(folder).matrix("embedding"), vectors)


def test_read_cells_says_what_is_not_there(table: cs.CellTable, tmp_path: Path) -> None:
    assert len(cs.read_cells(table.path)) == len(cs.read_cells(str(table.path.parent))) == 6
    with pytest.raises(TableError, match="none"):
        cs.read_cells(tmp_path / "none")


def test_import_cells(painted: PaintedSlide, tmp_path: Path) -> None:
    file = tmp_path / "nuclei.csv"
    file.write_text("x,y\n" + "".join(f"{x / 2},{y / 2}\n" for x, y in CENTRES))
    with cs.open_slide(painted.path) as slide:
        table = cs.import_cells(file, slide, tmp_path / "out", unit="um")
    assert sorted(discs_at(np.stack([table.vector("x"), table.vector("y")], axis=1))) == list(range(6))
    assert len(cs.classify(table, painted.path, organ="lung", abstain=0.99)) == 6
    with pytest.raises(UsageError, match="abstain"):
        cs.classify(cs.segment(painted.image, mpp=0.5), painted.image, mpp=0.5, abstain=0.5)  # type: ignore[call-overload]


def test_evaluate(tmp_path: Path) -> None:
    data = write_typed_set(tmp_path / "set")
    classical = cs.evaluate("classical", data)
    assert classical.split == "val" and classical.n_images == 1
    assert cs.evaluate("classical", data, split=None).n_images == 2
    assert cs.evaluate(cs.load_model(workers=0), data).model == "fake"
    typed = cs.evaluate(cs.load_model(task="classify"), data)
    assert typed.nuclei == "given"
    shipped = next(entry.id for entry in cs.list_models("classify") if entry.in_package)
    for report, name in ((classical, "classical"), (typed, shipped)):
        file = tmp_path / f"{name}.json"
        result = CliRunner().invoke(
            cli, ["evaluate", str(data), "--model", name, "--split", "val", "--json", str(file)]
        )
        assert result.exit_code == 0, result.output
        assert json.loads(file.read_text()) == json.loads(report.to_json())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        cs.evaluate(tmp_path / "empty", data)
    with pytest.raises(UsageError, match="nobody"):
        cs.evaluate("nobody", data)


def test_models_are_listed_and_fetched_with_consent() -> None:
    assert {entry.task for entry in cs.list_models()} >= {"segment", "detect", "classify", "backbone"}
    shipped = next(entry for entry in cs.list_models("segment") if entry.in_package)
    assert cs.fetch_model(shipped.id).is_file()
    with pytest.raises(UsageError, match="nobody"):
        cs.fetch_model("nobody")


def test_a_model_does_what_it_was_loaded_for(painted: PaintedSlide) -> None:
    with cs.load_model(task="classify") as model, pytest.raises(UsageError, match="classify"):
        cs.segment(painted.image, model=model, mpp=0.5)
    with pytest.raises(UsageError, match="task"):
        cs.load_model(task="paint")  # type: ignore[arg-type]
    with cs.load_model(workers=0) as model:
        first, second = (cs.segment(painted.image, model=model, mpp=0.5) for _ in range(2))
    np.testing.assert_array_equal(first.centroid_xy, second.centroid_xy)
