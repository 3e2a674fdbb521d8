"""One verdict: each check grades what it is for, and the same word stands in every record and page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cellslide.batch.run import SlideOutcome, exit_code
from cellslide.cli.main import cli
from cellslide.errors import SlideError
from cellslide.plausibility.cells import CellSums
from cellslide.plausibility.checks import SCALE
from cellslide.plausibility.scale import stated_over_true
from cellslide.plausibility.verdict import broken_outlines, judge
from cellslide.store.cell_table import CellTable
from cellslide.store.run_record import from_dict, read_record, to_dict
from cellslide.types import Check, FailedTile, RunRecord, SlideInfo, Verdict
from tests.painted import paint_slide
from tests.support.fakes import fake_model
from tests.support.random_cells import as_kind, ellipses, model_spec, run_record, slide_info, write_table

QUICK = ("--no-tissue", "--workers", 0, "--device", "cpu", "--no-progress")


def square(info: SlideInfo, **more: object) -> SlideInfo:
    return replace(info, mpp_y=0.25, **more)  # type: ignore[arg-type]


def found(table: CellTable, record: RunRecord | None = None) -> dict[str, Check]:
    """Return the checks of a table by name."""
    return {check.name: check for check in judge(table, record or searched()).checks}


def searched(mm2: float = 0.75) -> RunRecord:
    return replace(run_record(), searched_mm2=mm2)


def test_a_plain_run_is_good(tmp_path: Path) -> None:
    with write_table(tmp_path, ellipses(1200), None, square(slide_info())) as table:
        verdict = judge(table, searched())
        assert verdict.word == "good" and not verdict.reasons, verdict.reasons
        names = {check.name for check in verdict.checks}
        assert {"pixel_size_um", "nuclei_per_mm2", "nucleus_diameter_um", "specks", "giants"} <= names
        diameter = 2 * np.median(np.sqrt(table.vector("area_um2") / np.pi))
        measured = next(c.value for c in verdict.checks if c.name == "nucleus_diameter_um")
        assert measured == pytest.approx(diameter, abs=0.1)


@pytest.mark.parametrize(
    ("factor", "word", "mpp"), [(0.5, "do not use", "--mpp 0.5"), (4.0, "do not use", "--mpp 0.1")]
)
def test_nuclei_of_a_wrong_size_name_the_pixel_size(tmp_path: Path, factor: float, word: str, mpp: str) -> None:
    cells = ellipses(1200)
    cells = replace(cells, area_um2=cells.area_um2 * np.float32(factor**2))
    with write_table(tmp_path, cells, None, square(slide_info(), objective_power=None)) as table:
        check = found(table)["nucleus_diameter_um"]
        assert check.word == word and mpp in check.advice and str(tmp_path.parent) in check.advice
        assert judge(table, searched()).word == word


@pytest.mark.parametrize(
    ("factor", "word"), [(1.0, "good"), (0.67, "look"), (1.4, "look"), (0.5, "do not use"), (2.0, "do not use")]
)
def test_pixel_size_is_estimated_from_width_and_distance(factor: float, word: str) -> None:
    """Nuclei of a plausible field, their widths and distances in µm as a wrong pixel size makes them."""
    rng = np.random.default_rng(0)
    sums = CellSums(("Nucleus",), size_um=(2500.0, 2500.0))
    width, none = np.exp(rng.normal(np.log(6.2), 0.25, 9000)) * factor, np.zeros(9000, np.int64)
    um = rng.uniform(0, 1200, (9000, 2)) * factor
    sums.add(um, np.zeros((9000, 2), np.int64), (np.pi / 4 * width**2).astype(np.float32), none, none == 0)
    assert SCALE.grade(1 / stated_over_true(sums)) == word
    assert sums.crowding == pytest.approx(9000 / (1.2 * factor) ** 2, rel=0.2)


def test_specks_giants_and_densities_are_seen(tmp_path: Path) -> None:
    cells = ellipses(1000)
    area = cells.area_um2.copy()
    area[:300], area[300:400] = 1.0, 900.0
    with write_table(tmp_path, replace(cells, area_um2=area), None, square(slide_info())) as table:
        checks = found(table)
        assert 0.3 <= float(checks["specks"].value) < 0.35 and checks["specks"].word == "look"
        assert checks["giants"].value == pytest.approx(0.1) and checks["giants"].word == "look"
        assert found(table, searched(1000.0))["nuclei_per_mm2"].word == "look"
        assert found(table, searched(0.001))["nuclei_per_mm2"].word == "do not use"


def test_a_slide_without_nuclei_is_not_to_be_used(tmp_path: Path) -> None:
    with write_table(tmp_path, ellipses(0), None, square(slide_info())) as table:
        assert judge(table, searched()).word == "do not use"


def test_a_few_nuclei_are_too_little_to_judge(tmp_path: Path) -> None:
    for n, word in ((19, "look"), (20, None)):
        with write_table(tmp_path / str(n), ellipses(n)) as table:
            check = found(table).get("enough_to_judge")
        assert (check and check.word) == word


def test_points_have_no_size(tmp_path: Path) -> None:
    cells = as_kind(replace(ellipses(500), area_um2=np.zeros(500, np.float32)), "point")
    with write_table(tmp_path, cells, model_spec("point"), square(slide_info())) as table:
        assert "nucleus_diameter_um" not in found(table) and judge(table, searched()).word == "good"


def test_lost_tiles_and_magnifications_that_do_not_fit(tmp_path: Path) -> None:
    record = searched()
    record.counts.tiles = 20
    with write_table(tmp_path, ellipses(1200), None, square(slide_info(), objective_power=20.0)) as table:
        assert found(table, record)["tiles_lost"].word == "good"
        check = found(table, record)["pixel_size_um"]
        assert check.word == "look" and "--mpp 0.5" in check.advice
        record.counts.tiles_failed, record.failed_tiles = 1, [FailedTile(5, 6, "torn")]
        assert found(table, record)["tiles_lost"].word == "look"
        assert "torn" in found(table, record)["tiles_lost"].advice
        record.counts.tiles_failed = 10
        assert found(table, record)["tiles_lost"].word == "do not use"


def test_outlines_that_cross_themselves_are_counted(tmp_path: Path) -> None:
    cells = ellipses(300)
    xy, start = np.array(cells.contour_xy), np.array(cells.contour_start)
    for i in range(0, 300, 30):
        xy[start[i] + 1], xy[start[i] + 3] = xy[start[i] + 3].copy(), xy[start[i] + 1].copy()
    with write_table(tmp_path, replace(cells, contour_xy=xy)) as table:
        assert broken_outlines(table) == (300, 10)
        assert found(table)["outlines_crossing"].word == "look"


def test_drift_along_the_slide_is_seen(tmp_path: Path) -> None:
    cells = ellipses(8000)
    area = cells.area_um2 * np.where(cells.centroid_xy[:, 0] > 2000, 4.0, 1.0).astype(np.float32)
    with write_table(tmp_path, replace(cells, area_um2=area), None, square(slide_info())) as table:
        assert found(table)["size_drift"].value == pytest.approx(2.0, rel=0.1)
        assert found(table)["size_drift"].word == "look"


def test_typing_is_judged(tmp_path: Path) -> None:
    typing = {"organ": "moon", "organ_trained": False, "spec": {"organs": ["lung"], "calibration": {}}}
    record = replace(searched(), config={"classify": typing})
    with write_table(tmp_path, ellipses(1200), None, square(slide_info())) as table:
        checks = found(table, record)
        assert checks["organ"].word == "look" and checks["organ"].value == "moon"
        assert checks["abstained"].word == "good" and checks["not_typed"].word == "good"


def test_the_order_of_checks_and_the_record() -> None:
    verdict = Verdict.of(
        [Check("a", 1.0, "x", "good"), Check("b", "y", "z", "do not use", "do it"), Check("c", 2.0, "", "look")]
    )
    assert verdict.word == "do not use" and [c.name for c in verdict.checks] == ["b", "c", "a"]
    content = json.loads(json.dumps(to_dict(replace(run_record(), verdict=verdict))))
    assert content["verdict"]["word"] == "do not use"
    assert {*content["verdict"]["checks"][0]} == {"name", "value", "expected", "word", "advice"}
    assert from_dict(content).verdict == verdict
    content["verdict"]["word"] = "fine"
    with pytest.raises(SlideError):
        from_dict(content)
    del content["verdict"]
    assert from_dict(content).verdict is None


def test_strict_counts_what_is_not_to_be_used() -> None:
    bad = Verdict("do not use")
    fine, odd = SlideOutcome("a", "done", 1, 1.0), SlideOutcome("b", "done", 1, 1.0, verdict=bad)
    assert exit_code([fine, odd]) == 0 and exit_code([fine, odd], strict=True) == 1
    assert exit_code([odd], strict=True) == 1 and exit_code([fine], strict=True) == 0
    assert odd.to_json()["verdict"] == "do not use" and fine.to_json()["verdict"] is None


@pytest.fixture
def bad_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A slide whose nuclei are too small to be found, as they may be at half the pixel size."""
    monkeypatch.setattr("cellslide.weights.load_model", lambda *_: fake_model())
    places = [(x, y) for y in range(30, 370, 20) for x in range(30, 570, 20)]
    paint_slide(tmp_path / "s.tif", 600, 400, 0.5, places, 2.0)
    return tmp_path


def test_the_same_word_everywhere(bad_slide: Path) -> None:
    out = bad_slide / "out"
    flags = ["segment", bad_slide / "s.tif", "-o", out, *QUICK]
    result = CliRunner().invoke(cli, [*map(str, flags)], catch_exceptions=False)
    assert result.exit_code == 0 and "do not use" in result.output and "nuclei_per_mm2" in result.output
    record = read_record(out / "s")
    assert record is not None and record.verdict is not None and record.verdict.word == "do not use"
    assert "verdict" in (out / "summary.csv").read_text() and "do not use" in (out / "summary.csv").read_text()
    assert "do not use" in (out / "cohort.html").read_text()
    page = (out / "s" / "report.html").read_text()
    assert "Do not use" in page and page.index('class="verdict bad"') < page.index('id="slide"')
    # Finished slides are judged as they were, and --strict makes the command end with 1.
    again = CliRunner().invoke(cli, [*map(str, flags), "--log-json", "--strict"], catch_exceptions=False)
    line = json.loads(again.stdout.splitlines()[0])
    assert again.exit_code == 1 and line["status"] == "skipped" and line["verdict"] == "do not use"


def test_a_page_of_an_older_run_is_judged_now(bad_slide: Path) -> None:
    out = bad_slide / "out"
    flags = ["segment", bad_slide / "s.tif", "-o", out, *QUICK]
    assert CliRunner().invoke(cli, [*map(str, flags)], catch_exceptions=False).exit_code == 0
    content = json.loads((out / "s" / "run.json").read_text())
    del content["verdict"]
    (out / "s" / "run.json").write_text(json.dumps(content))
    assert CliRunner().invoke(cli, ["report", str(out)], catch_exceptions=False).exit_code == 0
    assert "Do not use" in (out / "s" / "report.html").read_text()
    shutil.rmtree(out)
