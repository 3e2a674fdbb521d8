"""What strangers and damaged disks hand in: numbers that are none, counts that lie, texts that swell, odd files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numcodecs.zstd import Zstd

from cellslide.errors import CellslideError, SlideError, UsageError, WeightsError, in_words, one_line, short
from cellslide.inference.finite import checked, is_finite
from cellslide.slides.identity import slide_sha256
from cellslide.slides.lists import read_table
from cellslide.slides.regions import load_roi
from cellslide.store import file_list, lock
from cellslide.store.foreign_files import parse_json, parse_yaml, read_text
from cellslide.store.run_record import RUN_FILE, from_dict, read_record
from cellslide.store.table_gate import check_rows, check_size, check_store
from cellslide.store.tile_checkpoint import Parts, TilePart
from cellslide.types import Cells, HoverMaps, Instances, NoOutput
from cellslide.weights.cache import file_sha256
from cellslide.weights.manifest import parse_entry
from tests.support.random_cells import slide_info

GOOD = {
    "cellslide_version": "1", "status": "done", "slide": {"path": "/a.svs", "sha256_head": "0", "mpp": 0.5},
    "config": {}, "weights": [], "device": "cpu", "engine": "torch", "precision": "fp32", "seed": 0,
    "started": "now", "counts": {}, "failed_tiles": [], "seconds": {},
}  # fmt: skip
ENTRY = {"id": "mine", "task": "segment", "arch": "cellvit_256", "file": "w.pth"}


def maps(**changed: Any) -> HoverMaps:
    columns = {
        "foreground": np.zeros((4, 4), np.uint8),
        "foreground_prob": np.zeros((4, 4), np.float16),
        "hv": np.zeros((2, 4, 4), np.float32),
        "type_prob": np.zeros((3, 4, 4), np.float16),
    }
    for name, value in changed.items():
        columns[name].flat[5] = value
    return HoverMaps(**columns)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_no_numbers_are_seen(dtype: Any, value: float) -> None:
    values = np.linspace(-3, 3, 100).astype(dtype)
    assert is_finite(values) and is_finite(np.empty(0, dtype)) and is_finite(-abs(values))
    values[7] = value
    assert not is_finite(values)


@pytest.mark.parametrize("name", ["foreground_prob", "hv", "type_prob"])
def test_a_tile_of_which_one_value_is_none_has_no_output(name: str) -> None:
    assert isinstance(checked(maps()), HoverMaps)
    broken = checked(maps(**{name: np.nan}))
    assert isinstance(broken, NoOutput) and "not finite" in broken.error


def test_points_that_are_none_have_no_output() -> None:
    from cellslide.inference.torch_engine import unpack
    from cellslide.types import DetectDecode

    none = np.zeros(3, np.float32)
    points = Instances(np.full((3, 2), np.nan), none, none, none > 0)
    assert isinstance(checked(points), NoOutput)
    arrays = {"point_xy": np.ones((1, 3, 2), np.float32), "score": np.array([[0.9, np.nan, 0.1]], np.float32)}
    spec: Any = SimpleNamespace(kind="point", detect=DetectDecode(), mpp=0.5)
    assert isinstance(unpack(arrays, spec, 0, 64), NoOutput)
    arrays["score"][0, 1] = 0.2
    found = unpack(arrays, spec, 0, 64)
    assert isinstance(found, Instances) and len(found) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"mpp": float("nan")}, {"mpp": 0}, {"mpp": 1e9}, {"tile_px": 0}, {"tile_px": -5}, {"tile_px": 10**9},
        {"tile_px": float("inf")}, {"tile_px": 256, "overlap_px": 200}, {"overlap_px": -1}, {"size_bytes": -1},
        {"mean": [float("nan"), 0, 0]}, {"mean": [1e9, 0, 0]}, {"std": [0, 1, 1]}, {"std": [float("inf"), 1, 1]},
        {"std": [1, 1]}, {"decode": {"kernel_px": 0}}, {"decode": {"kernel_px": 10**6}},
        {"decode": {"energy_threshold": float("nan")}}, {"decode": {"mode": "other"}},
        {"decode": {"hv_gradient_range": [float("nan"), 1]}}, {"decode": {"min_object_px": -1}},
        {"detect": {"score_threshold": 2}}, {"detect": {"nms_um": -1}}, {"detect": {"nms_um": float("nan")}},
        {"calibration": {"temperature_mix": 0}}, {"calibration": {"temperature_local": float("nan")}},
        {"calibration": {"abstain": 7}}, {"calibration": {"thresholds": {"a": -1}}}, {"safe_gate": {"tau": 3}},
        {"safe_gate": {"gamma": float("nan")}}, {"config": {"depth": float("nan")}},
        {"config": {"deep": [{"width": 1e300}]}}, {"metrics": {"pq": float("inf")}},
        {"classes": [{"name": "a", "color": [0, 0, 999]}]}, {"id": ["x"] * 10_000}, {"task": {"a": "b" * 10_000}},
        {"x" * 10_000: 1},
    ],
)  # fmt: skip
def test_every_number_of_an_entry_has_its_range(wrong: dict[str, Any], tmp_path: Path) -> None:
    parse_entry(ENTRY, tmp_path, "model.yaml")
    with pytest.raises(WeightsError) as error:
        parse_entry({**ENTRY, **wrong}, tmp_path, "model.yaml")
    assert error.value.exit_code == 3 and len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_yaml_that_swells_or_turns_in_circles_is_refused() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\n", "f", UsageError) == {"a": [1, 2], "b": [1, 2]}
    value = "&a [x,x,x,x,x,x,x,x,x,x]"
    for above, name in zip("abcdefgh", "bcdefghi", strict=True):
        value = f"&{name} [{value}," + ",".join([f"*{above}"] * 9) + "]"
    for text in (f"a: {value}", "a: &a [*a]", "a: " + "[" * 5000, "a: !!python/object:os.system x", "a: \x00"):
        with pytest.raises(UsageError, match="not valid YAML") as error:
            parse_yaml(text, "f", UsageError)
        assert len(str(error.value)) < 400


def test_json_and_texts_of_strangers(tmp_path: Path) -> None:
    for text in ("[" * 200_000, "{", "9" * 10_000, b"\xff\xfe"):
        with pytest.raises(SlideError):
            parse_json(text, "f")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 2000)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name in ("pipe", "large", "bytes", "."):
        with pytest.raises(SlideError):
            read_text(tmp_path / name, SlideError, 1000)
    with pytest.raises(SlideError, match="not a plain file"):
        slide_sha256(tmp_path / "pipe")
    assert len(short({"a": ["b" * 9999] * 9999})) <= 200


@pytest.mark.parametrize(
    "change",
    [
        {"slide": [1]}, {"slide": {}}, {"slide": {"path": 7}}, {"slide": {"path": "a\0b"}}, {"config": 3},
        {"config": {"classify": [1]}}, {"status": "fine"}, {"status": ["done"]}, {"counts": {"nuclei": -1}},
        {"counts": {"nuclei": "many"}}, {"counts": {"nuclei": 1e400}}, {"seconds": {"total": float("nan")}},
        {"weights": [{"id": 1, "sha256": "", "licence": ""}]}, {"weights": {"id": 1}}, {"weights": None},
        {"failed_tiles": [{"x": "a", "y": 0, "error": ""}]}, {"failed_tiles": 5}, {"error": {"a": 1}},
        {"slide": {"path": "/a", "mpp": float("nan")}}, {"slide": {"path": "/a", "width": -4}},
    ],
)  # fmt: skip
def test_records_of_strangers_raise_our_errors_only(change: dict[str, Any], tmp_path: Path) -> None:
    assert from_dict(GOOD).status == "done"
    (tmp_path / RUN_FILE).write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(SlideError, match=r"run\.json: not a run record"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ['{"a":' * 100_000 + "1" + "}" * 100_000, "[]", "null", "3", "", "\x00"])
def test_what_is_no_record_at_all(text: str, tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(SlideError, match=r"run\.json: not a run record"):
        read_record(tmp_path)


def test_a_lock_with_a_date_ahead_grows_old_by_our_own_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = tmp_path / f"{lock.PREFIX}{'0' * 16}"
    claim.write_text(json.dumps({"host": "h", "pid": 1, "began": 1.0, "space": "another boot"}))
    os.utime(claim, (time.time() + 86_400,) * 2)
    monkeypatch.setattr(lock, "STALE_S", 0.5)
    monkeypatch.setattr(lock, "POLL_S", 0.1)
    began = time.monotonic()
    with lock.hold(tmp_path):
        assert not claim.exists() and time.monotonic() - began > 0.4


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"{" * 100_000, b'{"host": 1, "pid": 1e999, "began": 1, "space": ""}',
             b'{"host": "h", "pid": -5, "began": 1, "space": ""}', b"[]", b""]
)  # fmt: skip
def test_a_lock_survives_garbage(tmp_path: Path, text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{lock.PREFIX}a").write_bytes(text)
    (tmp_path / f"{lock.PREFIX}folder").mkdir()
    os.mkfifo(tmp_path / f"{lock.PREFIX}pipe")
    monkeypatch.setattr(lock, "STALE_S", 0.2)
    monkeypatch.setattr(lock, "POLL_S", 0.1)
    with lock.hold(tmp_path):
        pass


def test_a_lock_leaves_no_claim_behind_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("_others", "Lock"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(lock, name, fail)
            with lock.hold(tmp_path / "new"):
                pass
        assert not (tmp_path / "new").exists()


def zstd_array(count: int = 10) -> Any:
    class ZstdCodec:
        pass

    return SimpleNamespace(
        dtype=np.dtype(np.float32), chunks=(count,), shape=(count,), metadata=SimpleNamespace(codecs=(ZstdCodec(),))
    )


def test_chunks_that_swell_are_refused_by_what_they_state(tmp_path: Path) -> None:
    path = tmp_path / "0"
    for size, fits in ((40, True), (60_000, True), (70_000, False), (300, True), (1 << 26, False)):
        path.write_bytes(bytes(Zstd(level=1).encode(np.zeros(size, np.uint8))))
        if fits:
            check_size(path, zstd_array())
        else:
            with pytest.raises(CellslideError, match=f"{size:,} bytes unpacked"):
                check_size(path, zstd_array())
    check_size(tmp_path / "gone", zstd_array())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CellslideError, match="not a plain file"):
        check_size(tmp_path / "pipe", zstd_array())


def test_tables_that_lead_out_or_state_too_much_are_refused(tmp_path: Path) -> None:
    store = tmp_path / "cells.zarr"
    node = store / "tables" / "cells" / "obs" / "cell_id"
    (node / "c").mkdir(parents=True)
    (node / "zarr.json").write_text(json.dumps({"shape": [10], "chunk_grid": {"configuration": {"chunk_shape": [5]}}}))
    check_store(store)
    (node / "c" / "0").write_bytes(b"")
    assert check_rows(zstd_array(10), store) == 10
    many: Any = SimpleNamespace(shape=(10**15,), chunks=(50_000,))
    with pytest.raises(CellslideError, match="states 1,000,000,000,000,000 rows, but holds 1 chunks"):
        check_rows(many, store)
    (node / "zarr.json").write_text(json.dumps({"shape": [10**18]}))
    with pytest.raises(CellslideError, match="shape is not believable"):
        check_store(store)
    (node / "zarr.json").unlink()
    (node / "out").symlink_to(tmp_path)
    with pytest.raises(CellslideError, match="leads out of the table"):
        check_store(store)
    (node / "out").unlink()
    os.mkfifo(node / "pipe")
    with pytest.raises(CellslideError, match="not a plain file"):
        check_store(store)


def part(tile: int, n: int = 50) -> TilePart:
    xy = np.random.default_rng(tile).uniform(0, 100, (n, 2))
    whole, real = np.full(n, tile, np.int32), np.ones(n, np.float32)
    return TilePart(tile, Cells(xy, whole, whole, real, real), n)


def damage_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [damage_bytes, lambda p: p.write_bytes(p.read_bytes()[:100]), lambda p: p.write_bytes(b""),
     lambda p: shutil.move(p, p.with_name("part-x.npz"))],
)  # fmt: skip
def test_a_damaged_part_is_done_again(
    tmp_path: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    parts = Parts.open(tmp_path, {"a": "1"})
    for tile in range(3):
        parts.add([part(tile)])
    damage(sorted(parts.folder.glob("part-*"))[1])
    again = Parts.open(tmp_path, {"a": "1"})
    assert again.done() == {0, 2} and caplog.text.count("are done again") == 1
    again.add([part(1)])
    assert Parts.open(tmp_path, {"a": "1"}).done() == {0, 1, 2}


def test_a_damaged_fingerprint_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts.open(tmp_path, {"a": "1"})
    parts.add([part(0)])
    path = parts.folder / "fingerprint.json"
    whole = path.read_bytes()
    for damaged in (b"\x00\xff{", whole.replace(b'"1"', b'"0"'), whole[: len(whole) // 2], b"", b"[]"):
        path.write_bytes(damaged)
        assert Parts.open(tmp_path, {"a": "1"}).done() == set() and "done again" in caplog.text
        caplog.clear()


def test_kept_rows_of_another_size_begin_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from cellslide.embed.store import PartialVectors

    store = PartialVectors.open(tmp_path, {"a": "1"}, 10, 4)
    store.put(np.arange(3), np.ones((3, 4), np.float32))
    store.flush()
    assert len(PartialVectors.open(tmp_path, {"a": "1"}, 10, 4).missing(np.arange(10))) == 7
    (tmp_path / ".embed" / "checks.npy").write_bytes(b"\x93NUMPY cut")
    assert len(PartialVectors.open(tmp_path, {"a": "1"}, 10, 4).missing(np.arange(10))) == 10
    assert "done again" in caplog.text


def test_the_list_of_files_tells_what_differs(tmp_path: Path) -> None:
    (tmp_path / "cells.zarr" / "c").mkdir(parents=True)
    (tmp_path / "cells.zarr" / "c" / "0").write_bytes(b"abc")
    (tmp_path / "cells.csv.gz").write_bytes(b"12345")
    (tmp_path / "cells.zarr.tmp-1").mkdir()
    (tmp_path / "report.html").write_text("no result of the run")
    found = file_list.listed(tmp_path)
    assert [entry["name"] for entry in found] == ["cells.csv.gz", "cells.zarr"] and found[0]["bytes"] == 5
    more = [{"name": "../x"}, {"name": "cells.h5ad", "bytes": 1}]
    (tmp_path / RUN_FILE).write_text(json.dumps({"files": [*found, *more]}))
    assert file_list.changed_sizes(tmp_path) == ["cells.h5ad"]
    (tmp_path / "cells.csv.gz").write_bytes(b"12346")
    (tmp_path / "cells.zarr" / "c" / "0").write_bytes(b"abcd")
    assert sorted(file_list.changed_sizes(tmp_path)) == ["cells.h5ad", "cells.zarr"]
    assert len(file_list.changed_bytes(tmp_path)) == 3
    # A pipe would be waited for, and what lies beyond a link is no result.
    (tmp_path / "cells.zarr" / "c" / "0").unlink()
    os.mkfifo(tmp_path / "cells.zarr" / "c" / "0")
    assert any("c/0" in words for words in file_list.changed_bytes(tmp_path))
    (tmp_path / "cells.zarr" / "c" / "0").unlink()
    (tmp_path / "cells.zarr" / "c" / "0").symlink_to(tmp_path / "report.html")
    assert any("c/0" in words for words in file_list.changed_bytes(tmp_path))
    (tmp_path / RUN_FILE).write_text('{"files": [1]}')
    assert file_list.changed_bytes(tmp_path) == []


def test_weights_of_the_same_size_and_time_are_not_taken_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"a" * 100)
    stat = path.stat()
    assert file_sha256(path) == hashlib.sha256(b"a" * 100).hexdigest()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_sha256(path) == hashlib.sha256(b"b" * 100).hexdigest()


def test_a_full_disk_while_a_folder_is_copied_and_too_many_files_are_one_line() -> None:
    copied = shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])
    assert "the disk is full" in in_words(copied)
    assert "ulimit -n" in in_words(OSError(errno.EMFILE, "Too many open files", "x"))


def test_python_without_assertions_is_refused() -> None:
    done = subprocess.run([sys.executable, "-O", "-m", "cellslide", "--version"], capture_output=True, text=True)
    assert done.returncode == 3 and "python -O" in done.stderr and done.stderr.count("\n") == 1


def test_lists_regions_and_notes_go_through_the_same_gate(tmp_path: Path) -> None:
    for name in ("pipe.csv", "pipe.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\0")
    for name in ("pipe.csv", "bytes.csv"):
        with pytest.raises(UsageError, match=name):
            read_table(tmp_path / name)
    for name in ("pipe.json", "deep.json"):
        with pytest.raises(UsageError, match=f"--roi .*{name}"):
            load_roi(tmp_path / name, slide_info(None))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "zarr.json").write_text("[]")
    with pytest.raises(CellslideError, match="zarr.json"):
        check_store(tmp_path / "store")


def test_a_message_has_an_end() -> None:
    assert len(one_line("x" * 10**6)) < 10_000
