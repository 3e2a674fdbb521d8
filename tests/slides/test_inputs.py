"""From arguments to slides: lists, folders, globs, DICOM series, ids."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cellslide.errors import UsageError
from cellslide.slides.inputs import SlideInput, expand_slides
from cellslide.slides.slide_formats import dicom_series


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def dicom(folder: Path, series: str, *names: str) -> None:
    """Write files with the one element that tells series apart."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = series.encode() + b"\0" * (len(series) % 2)
    head = bytes(128) + b"DICM" + b"\x20\x00\x0d\x00UI\x04\x001.9\0" + b"\x20\x00\x0e\x00UI"
    for name in names:
        (folder / name).write_bytes(head + len(uid).to_bytes(2, "little") + uid + b"rest")


def names(found: list[SlideInput]) -> list[str]:
    return [item.path.name for item in found]


def test_files_keep_their_order_and_stems_are_ids(tmp_path: Path) -> None:
    touch(tmp_path, "b.svs", "a.ome.tif", "odd.name")
    found = expand_slides([str(tmp_path / n) for n in ("b.svs", "a.ome.tif", "odd.name", "b.svs")])
    assert names(found) == ["b.svs", "a.ome.tif", "odd.name"]
    assert [item.slide_id for item in found] == ["b", "a.ome", "odd"]


def test_shared_stems_get_a_hash_that_depends_on_the_path_only(tmp_path: Path) -> None:
    touch(tmp_path, "x/s.svs", "y/S.tif", "y/other.svs")
    args = [str(tmp_path / n) for n in ("x/s.svs", "y/S.tif", "y/other.svs")]
    first, second, other = (item.slide_id for item in expand_slides(args))
    assert other == "other"
    assert first.startswith("s-") and second.startswith("S-") and len(first) == 10
    assert first.lower() != second.lower()
    assert [item.slide_id for item in expand_slides(args[::-1])] == [other, second, first]


def test_same_file_by_two_spellings_is_one_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.svs")
    monkeypatch.chdir(tmp_path)
    assert len(expand_slides(["a.svs", "./a.svs", str(tmp_path / "a.svs"), "*.svs"])) == 1


def test_folder_lists_slides_sorted_and_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path, "b.SVS", "a.tif", ".hidden.svs", "notes.txt", "table.csv", "sub/c.svs", "x.mrxs", "x/Data0000.dat")
    assert names(expand_slides([str(tmp_path)])) == ["a.tif", "b.SVS", "x.mrxs"]
    with pytest.raises(UsageError, match="no slide in this folder"):
        expand_slides([str(tmp_path / "x")])


def test_jpegs_of_a_vms_slide_are_not_slides(tmp_path: Path) -> None:
    touch(tmp_path, "s.vms", "s.jpg", "s_macro.jpg")
    assert names(expand_slides([str(tmp_path)])) == ["s.vms"]


def test_globs(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.svs", "a/1.svs", "a/1.txt", "with[brackets].svs")
    assert names(expand_slides([str(tmp_path / "**" / "[0-9].*")])) == ["1.svs", "2.svs"]
    assert names(expand_slides([str(tmp_path / "with[brackets].svs")])) == ["with[brackets].svs"]
    with pytest.raises(UsageError, match=r"\*\.ndpi: no slide matches"):
        expand_slides([str(tmp_path / "*.ndpi")])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.svs: no such file or folder"):
        expand_slides([str(tmp_path / "gone.svs")])


@pytest.mark.parametrize(
    "text",
    [
        "path,mpp,organ\na.svs,0.25,breast\nsub/b.svs,,\n",
        "Slide;wsi_mpp;organ;note\na.svs;0.25;breast;x\n\nsub/b.svs;;;\n",
        "\ufefforgan\twsi\tmpp\nbreast\t a.svs \t0.25\n\tsub/b.svs\t\n",
    ],
)
def test_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    touch(tmp_path, "a.svs", "sub/b.svs")
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    monkeypatch.chdir(os.sep)
    found = expand_slides([str(tmp_path / "list.csv")])
    assert found == [
        SlideInput(tmp_path / "a.svs", 0.25, "breast", "a"),
        SlideInput(tmp_path / "sub" / "b.svs", None, None, "b"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,mpp\na.svs,0.25\n", "no column path"),
        ("", "no column path"),
        ("path\n", "names no slide"),
        ("path,mpp\na.svs,fast\n", "line 2: mpp 'fast'"),
        ("path,mpp\na.svs,0.25\na.svs,40\n", "line 3: mpp '40'"),
        ("path,mpp\na.svs,nan\n", "line 2: mpp 'nan'"),
        ("path\ngone.svs\n", r"list\.csv: it lists gone\.svs"),
        ("path,mpp\na.svs,0.25\na.svs,0.5\n", "listed twice"),
    ],
)
def test_csv_that_is_wrong_says_where(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "a.svs")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        expand_slides([str(tmp_path / "list.csv")])


def test_txt_list(tmp_path: Path) -> None:
    touch(tmp_path, "a b.svs", "c.svs")
    (tmp_path / "list.txt").write_text("# mine\na b.svs\n\n  c.svs  \n")
    assert names(expand_slides([str(tmp_path / "list.txt")])) == ["a b.svs", "c.svs"]


def test_list_gives_the_pixel_size_of_a_slide_that_is_also_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    (tmp_path / "list.csv").write_text("path,mpp\na.svs,0.3\n")
    assert [i.mpp for i in expand_slides([str(tmp_path / "a.svs"), str(tmp_path / "list.csv")])] == [0.3]


def test_dicom_folder_is_one_slide_however_it_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "study" / "scan.v2"
    dicom(folder, "1.2.3", "l0.dcm", "l1.dcm", "l2.dcm")
    touch(tmp_path / "study", "a.svs")
    assert len(dicom_series(folder)) == 1
    one = SlideInput(folder, slide_id="scan.v2")
    assert expand_slides([str(folder)]) == [one]
    assert expand_slides([str(folder / "*.dcm")]) == [one]
    assert expand_slides([str(folder), str(folder / "l1.dcm")]) == [one]
    assert expand_slides([str(folder / "l1.dcm")]) == [SlideInput(folder / "l1.dcm", slide_id="l1")]
    assert names(expand_slides([str(tmp_path / "study")])) == ["a.svs", "scan.v2"]
    assert names(expand_slides([str(tmp_path / "study" / "*")])) == ["a.svs", "scan.v2"]


def test_two_series_in_a_folder_are_two_slides(tmp_path: Path) -> None:
    dicom(tmp_path / "d", "1.2.3", "a0.dcm", "a1.dcm")
    dicom(tmp_path / "d", "1.2.44", "b0.dcm", "b1.dcm")
    assert names(expand_slides([str(tmp_path / "d")])) == ["a0.dcm", "b0.dcm"]
    assert names(expand_slides([str(tmp_path / "d" / "*.dcm")])) == ["a0.dcm", "b0.dcm"]


def test_real_dicom_folder(shared: Path) -> None:
    folder = shared / "data" / "wsi"
    found = expand_slides([str(folder)])
    assert [item.slide_id for item in found] == [
        "BRACS_1640_N_3_cropped", "CMU-1-Small-Region-dicom", "CMU-1-Small-Region", "HE_example", "OS-1-detail.ome",
        "TCGA-CR-7395-01A-01-TS1", "hamamatsu-fluorescence",
    ]  # fmt: skip
