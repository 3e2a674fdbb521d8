"""The benchmark measures what it says: both decode forms on the same tile, and a merge that keeps every nucleus."""

from __future__ import annotations

import json

from click.testing import CliRunner

from cellslide.bench import bench_merge
from cellslide.cli.main import cli


def test_decode_prints_ratios_of_one_run() -> None:
    result = CliRunner().invoke(cli, ["bench", "decode", "--nuclei", "60", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["stages"]["decode"]
    assert [row["nuclei"] for row in rows] == [60, 60, 60]
    assert rows[0]["ratio"] == 1 and all(row["cpu_ms"] > 0 for row in rows)


def test_merge_keeps_nearly_every_nucleus() -> None:
    (timing,) = bench_merge(3000, rounds=1)
    assert 0.985 * 3025 <= timing.count <= 3025


def test_a_wrong_stage_is_a_usage_error() -> None:
    assert CliRunner().invoke(cli, ["bench", "typing"]).exit_code == 2
