from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cellslide.config import SegmentConfig
from cellslide.errors import SlideError
from cellslide.slides.identity import content_sha256, describe_slide, is_slide, other_slide, slide_sha256
from cellslide.store.atomic import Staging, beside, write_text
from cellslide.store.run_record import (
    differences,
    fingerprint,
    peak_rss_bytes,
    plain,
    read_record,
    to_dict,
    write_record,
)
from cellslide.types import Counts, FailedTile, Level, RunRecord, SlideInfo, WeightsRef

CONTRACT_KEYS = {
    "cellslide_version", "status", "slide", "config", "weights", "device", "engine", "precision", "seed", "started",
    "finished", "counts", "failed_tiles", "seconds", "peak_rss_bytes", "peak_device_bytes",
    "batch_size", "searched_mm2", "verdict",
}  # fmt: skip


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    path = tmp_path / "a.tif"
    path.write_bytes(b"slide")
    info = SlideInfo("a", path, "generic-tiff", 100, 80, 0.5, 0.5, "vendor", (Level(100, 80, 1.0),))
    return RunRecord(
        cellslide_version="0.1.0",
        status="done",
        slide=describe_slide(info),
        config=plain(SegmentConfig(weights=Path("w.pth"))),
        weights=[WeightsRef("m", "ab", "MIT")],
        device="cpu",
        engine="torch",
        precision="fp32",
        seed=0,
        started="2025-01-01T00:00:00Z",
        counts=Counts(tiles=3, nuclei=7),
        failed_tiles=[FailedTile(0, 256, "read: boom")],
    )


def test_round_trip_through_the_file(record: RunRecord, tmp_path: Path) -> None:
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_a_file_that_fails_halfway_leaves_the_one_before(tmp_path: Path) -> None:
    """Whatever stops the writing, Ctrl-C too; the folder is made, names that are no text are spelled out."""
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one\n\udcff")
    for error in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), beside(path) as scratch:
            assert scratch.parent == path.parent and scratch.name.startswith(".")
            scratch.write_text("half")
            raise error
    assert path.read_bytes() == b"one\n\\udcff" and [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging(tmp_path / "cells.zarr")
    (staging.folder / "obs" / "c").mkdir(parents=True)
    (staging.folder / "obs" / "c" / "0").write_bytes(b"chunk")
    brought: list[str] = []

    def to_disk(path: Path) -> None:
        assert path.exists() and not staging.path.exists()
        brought.append(path.name)

    monkeypatch.setattr("cellslide.store.atomic.to_disk", to_disk)
    staging.publish()
    assert sorted(brought) == sorted([staging.folder.name, "obs", "c", "0"])
    assert (staging.path / "obs" / "c" / "0").read_bytes() == b"chunk"


def test_keys_are_those_of_the_contract(record: RunRecord) -> None:
    content = to_dict(record)
    assert set(content) == CONTRACT_KEYS
    assert set(content["slide"]) == {"path", "sha256_head", "mpp", "mpp_source", "width", "height", "vendor"}
    tiles, nuclei = {"tiles", "tiles_empty", "tiles_failed", "tiles_missing"}, {"nuclei_raw", "nuclei"}
    assert set(content["counts"]) == tiles | nuclei | {"abstained", "rejected"}
    assert set(content["seconds"]) == {"read", "infer", "decode", "merge", "classify", "write", "total"}
    assert content["weights"] == [{"id": "m", "sha256": "ab", "licence": "MIT"}]
    assert to_dict(replace(record, error="bad"))["error"] == "bad"
    json.dumps(content, allow_nan=False)


def test_no_record_and_a_damaged_one(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    for text in ("{", "[]", '{"weights": [], "counts": {}}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(SlideError, match="--overwrite"):
            read_record(tmp_path)


def test_fingerprint_sees_what_decides_the_result_and_nothing_else(record: RunRecord) -> None:
    same = replace(record, device="cuda:0", seed=3, counts=Counts(), config=plain(SegmentConfig(model="m", mpp=0.5)))
    assert differences(fingerprint(record), fingerprint(same)) == ""
    tiles = {**record.config, "tiles": {"size_px": 512, "overlap_px": None}}
    words = differences(fingerprint(record), fingerprint(replace(record, config=tiles)))
    assert words == "config.tiles.size_px: None then, 512 now"
    other = replace(record, weights=[WeightsRef("m", "cd", "MIT")], precision="bf16")
    words = differences(fingerprint(record), fingerprint(other))
    assert "precision: fp32 then, bf16 now" in words and "weights.0.sha256: ab then, cd now" in words


def test_differences_are_cut_short() -> None:
    words = differences({str(i): "a" for i in range(9)}, {})
    assert words.count("then") == 4 and words.endswith("and 5 more")


def test_a_slide_is_known_by_its_ends_and_by_blocks_between(tmp_path: Path) -> None:
    size = 64 << 20
    for at in (0, size // 2, size - 1):
        for name, byte in (("a", b"1"), ("b", b"2")):
            with (tmp_path / name).open("wb") as stream:
                stream.truncate(size)
                # Half a step of the blocks, so that one of them holds it.
                stream.seek(max(at - (1 << 21), 0))
                stream.write(byte * (1 << 22))
                stream.truncate(size)
        assert slide_sha256(tmp_path / "a") != slide_sha256(tmp_path / "b")
    shutil.copy(tmp_path / "a", tmp_path / "copy")
    assert slide_sha256(tmp_path / "copy") == slide_sha256(tmp_path / "a")
    with (tmp_path / "copy").open("ab") as stream:
        stream.write(b"0")
    assert slide_sha256(tmp_path / "copy") != slide_sha256(tmp_path / "a")


def test_every_byte_of_a_small_slide_and_of_a_given_file_counts(tmp_path: Path) -> None:
    a = tmp_path / "a"
    a.write_bytes(b"x" * (3 << 20))
    small = slide_sha256(a)
    a.write_bytes(b"x" * (2 << 20) + b"y" + b"x" * ((1 << 20) - 1))
    assert slide_sha256(a) != small
    a.write_bytes(b"x" * (9 << 20))
    given = content_sha256(a)
    assert given == hashlib.sha256(b"x" * (9 << 20)).hexdigest()
    a.write_bytes(b"x" * (3 << 19) + b"y" + b"x" * ((9 << 20) - (3 << 19) - 1))
    assert content_sha256(a) != given
    folder = content_sha256(tmp_path)
    a.rename(tmp_path / "b")
    assert content_sha256(tmp_path) != folder


@pytest.mark.parametrize("name", ["s.mrxs", "s.vms", "s/", "a.dcm"])
def test_all_files_of_a_slide_count(name: str, tmp_path: Path) -> None:
    """Of a slide in several files the one that a user names may be the same for all slides."""
    slide = tmp_path / name
    (tmp_path / "s").mkdir()
    series = b"\x20\x00\x0e\x00UI\x04\x001.2\0"
    for file in ("a.dcm", "b.dcm"):
        (tmp_path / file).write_bytes(series + b"pixels")
    for file in ("s.mrxs", "s/Data0000.dat", "s/Slidedat.ini", "s.opt"):
        (tmp_path / file).write_bytes(b"same")
    (tmp_path / "s.vms").write_text("[Virtual Microscope Specimen]\nImageFile=s.opt\n")
    before = slide_sha256(slide)
    for file in ("s/Data0000.dat", "s.opt", "b.dcm"):
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content[:-1] + b"X")
    assert slide_sha256(slide) != before


def test_other_slides_are_told_by_both_paths(record: RunRecord, tmp_path: Path) -> None:
    then, now = tmp_path / "a/s.tif", tmp_path / "b/s.tif"
    for path, content in ((then, b"one"), (now, b"two")):
        path.parent.mkdir()
        path.write_bytes(content)
    slide = {**record.slide, "path": str(then), "sha256_head": slide_sha256(then)}
    earlier = replace(record, slide=slide)
    assert other_slide(None, now) == other_slide(earlier, then) == other_slide(earlier, tmp_path / "gone") == ""
    assert other_slide(earlier, now) == f"another slide of this name was done here: {then} then, {now} now"
    then.write_bytes(b"two")
    assert "changed" in other_slide(earlier, then)


def test_a_record_of_an_earlier_version_still_knows_its_slide(tmp_path: Path) -> None:
    (tmp_path / "s.tif").write_bytes(b"one")
    known = hashlib.sha256(b":3\none").hexdigest()
    assert is_slide(tmp_path / "s.tif", known) and not is_slide(tmp_path / "s.tif", "0" * 64)


def test_peak_memory_is_in_bytes() -> None:
    assert 10 << 20 < peak_rss_bytes() < 1 << 40
