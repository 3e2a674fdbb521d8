"""Lists of slides in the forms that other tools and spreadsheets give them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cellslide.errors import UsageError
from cellslide.slides.inputs import expand_slides


def listed(tmp_path: Path, text: str, ending: str = "csv") -> list[float | None]:
    (tmp_path / "a.svs").write_bytes(b"x")
    (tmp_path / f"list.{ending}").write_text(text, encoding="utf-8")
    return [item.mpp for item in expand_slides([str(tmp_path / f"list.{ending}")])]


@pytest.mark.parametrize(
    "header",
    ["mpp", "MPP", "wsi_mpp", "mpp_x", "mpp-y", "MPP (µm)", "pixel_size", "Pixel Size (µm)", "um_per_px",
     "microns_per_pixel", "µm per pixel", "pixel_size_x_um", "slide_mpp"],
)  # fmt: skip
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_pixel_sizes_by_their_names(tmp_path: Path, header: str, separator: str) -> None:
    ending = "tsv" if separator == "\t" else "csv"
    assert listed(tmp_path, f"path{separator}{header}\na.svs{separator}0.25\n", ending) == [0.25]


def test_pixel_sizes_of_both_axes(tmp_path: Path) -> None:
    assert listed(tmp_path, "path,mpp_x,mpp_y\na.svs,0.25,0.2501\n") == [0.25]
    with pytest.raises(UsageError, match=r"line 2: the pixel sizes 0\.25 and 0\.5 differ"):
        listed(tmp_path, "path,mpp_x,mpp_y\na.svs,0.25,0.5\n")


@pytest.mark.parametrize(
    "name", ["resolution", "spacing", "mppx2_mpp", "level0_pixel", "um", "Resolution (µm)", "px_size"]
)
def test_what_looks_like_a_pixel_size_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="looks like a pixel size"):
        listed(tmp_path, f"path,{name}\na.svs,0.25\n")


def test_other_columns_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cellslide"):
        assert listed(tmp_path, "path,Patient,stain\na.svs,7,HE\n") == [None]
    assert "its columns patient, stain are not used" in caplog.text


def test_spreadsheets(tmp_path: Path) -> None:
    assert listed(tmp_path, "sep=;\npath;mpp\na.svs;0,25\n;\n") == [0.25]
    assert listed(tmp_path, '\ufeff"path"\t"mpp"\n"a.svs"\t"0.25"\n', "tsv") == [0.25]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,mpp\na.svs,0,25\n", "line 2: 3 columns, the header has 2"),
        ("path,mpp,mpp\na.svs,0.25,0.5\n", "mpp stands twice"),
        ("path,mpp\na.svs,250\n", "must be"),
        ("path,mpp\na.svs,0.25 µm\n", "must be"),
    ],
)
def test_doubtful_rows_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        listed(tmp_path, text)
