from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cellslide.config import SegmentConfig
from cellslide.errors import SlideError
from cellslide.store.atomic import beside, write_text
from cellslide.store.run_record import (
    describe_slide,
    differences,
    fingerprint,
    head_sha256,
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


def test_keys_are_those_of_the_contract(record: RunRecord) -> None:
    content = to_dict(record)
    assert set(content) == CONTRACT_KEYS
    assert set(content["slide"]) == {"path", "sha256_head", "mpp", "mpp_source", "width", "height", "vendor"}
    assert set(content["counts"]) == {"tiles", "tiles_empty", "tiles_failed", "tiles_missing", "nuclei_raw", "nuclei"}
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


def test_head_hash_sees_size_and_head_of_files_and_folders(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x" * (1 << 20) + b"1")
    b.write_bytes(b"x" * (1 << 20) + b"2")
    assert head_sha256(a) == head_sha256(b)
    b.write_bytes(b"x" * (1 << 20) + b"22")
    assert head_sha256(a) != head_sha256(b)
    before = head_sha256(tmp_path)
    (tmp_path / "c").write_bytes(b"")
    assert head_sha256(tmp_path) != before


def test_peak_memory_is_in_bytes() -> None:
    assert 10 << 20 < peak_rss_bytes() < 1 << 40
