"""The benchmark measures what it says: forms of one run beside each other, and a merge that keeps every nucleus."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.scaling import exponent, merge_seconds
from cellslide import bench
from cellslide.bench import BenchOptions, synthetic_maps, write
from cellslide.bench.merge import plain_merge, reports
from cellslide.bench.merge import rows as merge_rows
from cellslide.bench.rows import Form, Row, Target, cpu_rows, row
from cellslide.bench.whole import TILE_PX, segmented, whole_rows
from cellslide.cli import bench as command
from cellslide.cli.main import cli
from cellslide.nuclei.merge import merge_stream
from cellslide.store.cell_table import open_table
from cellslide.types import concat


def test_decode_prints_ratios_of_one_run() -> None:
    result = CliRunner().invoke(cli, ["bench", "decode", "--nuclei", "60", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.output)
    rows = printed["stages"]["decode"]
    assert {row["count"] for row in rows} == {60}
    assert rows[0]["ratio"] == 1 and all(row["value"] > 0 and row["unit"] == "CPU ms" for row in rows)
    assert printed["machine"]["cores"] >= 1 and "numpy" in printed["machine"]["versions"]


def test_table_shows_every_row_whole() -> None:
    result = CliRunner().invoke(cli, ["bench", "merge", "--nuclei", "300", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    assert "polygon by polygon" in result.output and "CPU s per million" in result.output and "numpy" in result.output


def test_merge_keeps_nearly_every_nucleus() -> None:
    last = list(merge_rows(BenchOptions(nuclei=3000, rounds=1)))[-1]
    assert 0.985 * 3025 <= last.count <= 3025


def test_a_wrong_stage_is_a_usage_error() -> None:
    assert CliRunner().invoke(cli, ["bench", "typing"]).exit_code == 2


def test_command_names_the_stages_there_are() -> None:
    assert command.STAGES == bench.STAGES and command.CPU_STAGES == bench.CPU_STAGES


def test_target_says_what_it_asks_and_whether_it_is_met() -> None:
    both = Target(30, 15)
    assert both.text("CPU ms") == "≤ 30 CPU ms and ≥ 15 ×"
    assert both.met(29, 15.5) is True and both.met(31, 20) is False and both.met(29, 14) is False
    assert both.met(None, None) is None and Target().met(1, 1) is None and Target().text("x") == ""
    assert Target(1000, more=True).met(1200, None) is True and Target(1000, more=True).met(900, None) is False


def test_a_row_without_values_was_not_measured() -> None:
    nothing = row("infer", "cuda, bf16", [], "s/mm2", 0, None, Target(0.7))
    assert nothing.value is None and nothing.met is None and nothing.note == "not measured"
    assert nothing.target == "≤ 0.7 s/mm2"


@pytest.mark.parametrize(("more", "ratio", "best"), [(False, 2.0, 4.0), (True, 0.5, 6.0)])
def test_more_is_better_turns_the_ratio(more: bool, ratio: float, best: float) -> None:
    made = row("s", "f", [5.0, 4.0, 6.0], "u", 1, 10.0, Target(more=more))
    assert (made.value, made.ratio, made.least) == (5.0, ratio, best)


def test_time_is_for_the_number_asked() -> None:
    calls: list[int] = []

    def work() -> int:
        calls.append(sum(range(200_000)))
        return 50

    of_call, of_million = (next(iter(cpu_rows("s", [Form("f", work)], 3, per))) for per in (0, 50_000))
    assert len(calls) == 8
    assert of_million.value is not None and of_call.value is not None
    assert of_million.value > 100 * of_call.value > 0


def test_writers_of_one_run_beside_features_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(part: str, folder: Path, n: int) -> write.Writing:
        return write.Writing(*write.write_part(part, folder, n)[:1], mb=1, peak_mb=350, base_mb=200)

    monkeypatch.setattr(write, "in_process", here)
    rows = list(write.rows(BenchOptions(nuclei=1500, rounds=1)))
    by_form = {row.form: row for row in rows}
    assert rows[0].ratio == 1 and by_form["table + geoparquet"].target == "≤ 5 CPU s per million"
    both, parts = by_form["table + geoparquet"].value, (by_form["table"].value, by_form["geoparquet"].value)
    assert both == pytest.approx(sum(value or 0 for value in parts))
    assert by_form["table, memory"].met is True and by_form["qupath, memory"].met is False


def test_a_writer_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    measured = write.in_process("table", tmp_path, 500)
    with open_table(tmp_path / "cells.zarr") as table:
        assert len(table) == 500
    assert measured.peak_mb >= measured.base_mb > 50 and measured.mb > 0.05 and measured.cpu_s > 0


def test_made_nuclei_are_in_the_order_of_a_slide() -> None:
    cells = concat(list(write.made_blocks(45_000)))
    assert len(cells) == 45_000 and (np.diff(cells.centroid_xy[:, 1]) >= 0).all()
    assert cells.contour_xy is not None and (cells.contour_xy * 2 == np.rint(cells.contour_xy * 2)).all()
    fine = next(write.made_blocks(10, fine=True))
    assert fine.contour_xy is not None and (fine.contour_xy * 2 != np.rint(fine.contour_xy * 2)).any()


def test_the_plain_merge_keeps_about_as_many() -> None:
    grid, parts = reports(1500)
    plain = plain_merge(parts)
    assert abs(plain - sum(map(len, merge_stream(parts, grid)))) < 0.02 * plain


def test_exponent_of_what_grows_in_step() -> None:
    sizes = [1000, 10_000, 100_000, 1_000_000]
    assert exponent(sizes, [0.5, 0.5, 1.0, 10.0]) == pytest.approx(1)
    assert exponent(sizes[:2], [1.0, 100.0]) == pytest.approx(2)
    assert merge_seconds(500) > 0


def test_whole_slide_is_the_sum_of_its_stages() -> None:
    def one(stage: str, form: str, value: float, unit: str = "CPU ms") -> Row:
        return row(stage, form, [value], unit, 1)

    measured = {
        "read": [one("read", "a, JPEG: OpenSlide", 20), one("read", "a, JPEG: cellslide", 4)],
        "decode": [one("decode", "fixed, cellslide", 30)],
        "merge": [one("merge", "cellslide", 0.5)],
        "write": [one("write", "table + geoparquet", 5), one("write", "qupath", 6)],
        "crops": [one("crops", f"{px} px: shared regions", value) for px, value in ((224, 5), (1024, 30))],
    }
    assert whole_rows(measured) == []  # nothing says what overlap costs
    measured["read"].append(one("read", "a, JPEG: cellslide, overlap", 1.1, "×"))
    measured["crops"].insert(0, one("crops", "224 px: shared regions", 1.01, "×"))
    (whole,) = whole_rows(measured)
    tiles = 60e6 / 0.25**2
    wanted = tiles / 1024**2 * 4.4e-3 + tiles / 896**2 * 30e-3 + 0.15 + 1.5 + 1.8 + 15 + 90
    assert whole.value == pytest.approx(wanted) and whole.met is True and "crops of 1024 90" in whole.note


def test_a_slide_is_segmented_from_end_to_end_without_a_network(tmp_path: Path) -> None:
    maps = synthetic_maps(40, TILE_PX).hover_maps()
    tiles, seconds = segmented(maps, 1500, tmp_path / "slide", workers=0)
    folder = tmp_path / "slide" / "out" / "slide"
    with open_table(folder / "cells.zarr") as table:
        assert len(table) > 40  # some of 40 in each of four tiles are cut or seen twice
    assert tiles == 4 and seconds > 0 and (folder / "cells.geojson.gz").is_file()
