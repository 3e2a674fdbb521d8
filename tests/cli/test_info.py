"""`cellslide info`: what is printed, what is null, how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cellslide.cli.main import cli
from tests.painted import paint_slide

KEYS = [
    "path", "vendor", "width", "height", "levels", "mpp_x", "mpp_y", "mpp_source", "objective_power", "bounds",
]  # fmt: skip


def info(*args: object) -> Result:
    return CliRunner().invoke(cli, ["info", *map(str, args)])


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return paint_slide(tmp_path / "slide.tif", 401, 300, 0.25, level_downsamples=(1, 4), mpp_y=0.26).path


def test_json_has_the_keys_of_the_contract(slide: Path) -> None:
    result = info(slide, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert list(facts) == KEYS
    assert (facts["width"], facts["height"], facts["vendor"]) == (401, 300, "generic-tiff")
    assert [facts["mpp_x"], facts["mpp_y"]] == pytest.approx([0.25, 0.26], rel=1e-4)
    assert (facts["mpp_source"], facts["objective_power"], facts["bounds"]) == ("tiff", None, None)
    assert facts["levels"][0] == {"width": 401, "height": 300, "downsample": 1.0}
    assert facts["levels"][1] == {"width": 100, "height": 75, "downsample": pytest.approx(4.005)}
    assert facts["path"] == str(slide)


def test_unknown_pixel_size_is_null_and_said(tmp_path: Path) -> None:
    path = tmp_path / "field.png"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path)
    facts = json.loads(info(path, "--json").stdout)
    assert [facts[k] for k in ("mpp_x", "mpp_y", "mpp_source", "vendor")] == [None, None, None, "png"]
    human = info(path)
    assert human.exit_code == 0
    assert "unknown" in human.stdout and "--mpp" in human.stdout
    given = json.loads(info(path, "--json", "--mpp", "0.5").stdout)
    assert [given[k] for k in ("mpp_x", "mpp_y", "mpp_source")] == [0.5, 0.5, "flag"]
    assert info(path, "--mpp", "3").exit_code == 2


def test_pixel_size_of_a_list(tmp_path: Path, slide: Path) -> None:
    (tmp_path / "list.csv").write_text(f"path,mpp\n{slide.name},0.252\n")
    facts = json.loads(info(tmp_path / "list.csv", "--json").stdout)
    assert (facts["mpp_x"], facts["mpp_source"]) == (0.252, "list")


def test_human_view_says_what_matters(slide: Path) -> None:
    text = info(slide).stdout
    assert "401 x 300 px, 0.10 x 0.08 mm" in text
    assert "0.25 x 0.26 µm (tiff)" in text and "100 x 75 (1/4.005)" in text


def test_several_slides_are_a_line_each_and_a_bad_one_ends_with_1(tmp_path: Path, slide: Path) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_text("no slide")
    result = info(slide, bad, "--json")
    assert result.exit_code == 1
    assert [json.loads(line)["width"] for line in result.stdout.splitlines()] == [401]
    assert "bad.svs" in result.stderr and "1 of 2 slides" in result.stderr
    assert info(bad).exit_code == 1
    assert info(tmp_path / "gone.svs").exit_code == 2


def test_real_slides(shared: Path) -> None:
    result = info(shared / "data" / "wsi", "--json")
    assert result.exit_code == 1 and "hamamatsu-fluorescence.ndpi: fluorescence" in result.stderr
    found = {Path(f["path"]).name: f for f in map(json.loads, result.stdout.splitlines())}
    assert len(found) == 6
    assert found["TCGA-CR-7395-01A-01-TS1.svs"]["mpp_x"] is None
    assert found["CMU-1-Small-Region.svs"]["objective_power"] == 20
    assert len(found["CMU-1-Small-Region-dicom"]["levels"]) == 12
