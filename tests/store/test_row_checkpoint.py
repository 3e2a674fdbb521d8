"""Rows kept on disk: what counts as done, what a stopped run finds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellslide.embed.store import PartialVectors
from cellslide.errors import UsageError
from cellslide.store.row_checkpoint import FINGERPRINT_FILE

SETTINGS = {"mpp": "0.5"}


def _store(folder: Path, n: int = 4, overwrite: bool = False) -> PartialVectors:
    return PartialVectors.open(folder, SETTINGS, n, 3, overwrite)


def test_a_row_is_done_once_it_is_written(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.put(np.array([2, 0]), np.arange(6, dtype=np.float32).reshape(2, 3))
    # Without the flush its values may not be on the disk, so nobody may rely on them.
    assert PartialVectors.count_done(tmp_path) == 0 and np.isnan(_store(tmp_path).block(0, 4)).all()
    store.flush()
    again = _store(tmp_path)
    assert PartialVectors.count_done(tmp_path) == 2 and again.missing(np.array([3, 2, 1, 0])).tolist() == [3, 1]
    np.testing.assert_array_equal(again.block(0, 3), np.array([[3, 4, 5], [np.nan] * 3, [0, 1, 2]], np.float32))
    assert again.block(0, 3).dtype == np.float32


def test_no_cells_need_no_rows(tmp_path: Path) -> None:
    store = _store(tmp_path, n=0)
    assert store.block(0, 0).shape == (0, 3) and PartialVectors.count_done(tmp_path) == 0


def test_what_is_there_is_found_refused_and_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not PartialVectors.is_there(tmp_path) and PartialVectors.count_done(tmp_path) == 0
    _store(tmp_path)
    assert PartialVectors.is_there(tmp_path)
    with pytest.raises(UsageError, match=r"mpp.*0\.5.*0\.25"):
        PartialVectors.open(tmp_path, {"mpp": "0.25"}, 4, 3)
    (tmp_path / PartialVectors.folder_name / FINGERPRINT_FILE).write_text("{")
    assert _store(tmp_path).missing(np.arange(4)).tolist() == [0, 1, 2, 3]
    assert "what was kept is damaged" in caplog.text and "done again" in caplog.text
    _store(tmp_path, overwrite=True).remove()
    assert not (tmp_path / PartialVectors.folder_name).exists()
    PartialVectors.discard(tmp_path)


@pytest.mark.parametrize("name", ["vectors.npy", "checks.npy"])
@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_a_kept_row_with_a_flipped_bit_is_done_again(
    name: str, bit: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, rng = _store(tmp_path), np.random.default_rng(0)
    values = rng.random((4, 3), np.float32)
    store.put(np.arange(4), values)
    store.flush()
    del store
    path = tmp_path / PartialVectors.folder_name / name
    data = bytearray(path.read_bytes())
    data[-1] ^= bit
    path.write_bytes(bytes(data))
    again = _store(tmp_path)
    assert again.missing(np.arange(4)).tolist() == [3] and PartialVectors.count_done(tmp_path) == 3
    np.testing.assert_array_equal(again.block(0, 3), values[:3])
    assert len(caplog.records) == 1 and "done again" in caplog.text
    again.put(np.array([3]), values[3:])
    again.flush()
    assert len(_store(tmp_path).missing(np.arange(4))) == 0 and len(caplog.records) == 1


def test_a_fingerprint_with_a_flipped_bit_is_no_other_setting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _store(tmp_path)
    path = tmp_path / PartialVectors.folder_name / FINGERPRINT_FILE
    path.write_text(path.read_text().replace("0.5", "0.4"))
    assert len(_store(tmp_path).missing(np.arange(4))) == 4 and "done again" in caplog.text
