from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellslide.errors import UsageError
from cellslide.store.tile_checkpoint import Parts, TilePart
from cellslide.types import Cells, concat

PRINT = {"weights": "a", "tile": "256"}


def cells(tile: int, n: int) -> Cells:
    """Return n cells with triangles for outlines, told apart by tile."""
    rng = np.random.default_rng(tile)
    return Cells(
        centroid_xy=rng.uniform(0, 1e5, (n, 2)),
        tile_index=np.full(n, tile, np.int32),
        row=np.full(n, tile // 4, np.int32),
        score=rng.random(n, np.float32),
        area_um2=rng.random(n, np.float32),
        contour_xy=rng.uniform(0, 1e5, (3 * n, 2)),
        contour_start=np.arange(0, 3 * n + 1, 3, dtype=np.int64),
    )


def assert_same(a: Cells, b: Cells) -> None:
    for name in ("centroid_xy", "tile_index", "row", "score", "area_um2", "contour_xy", "contour_start"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


def part(tile: int, n: int) -> TilePart:
    return TilePart(tile, cells(tile, n) if n else None, n)


def test_cells_come_back_exactly_in_the_order_asked(tmp_path: Path) -> None:
    parts = Parts.open(tmp_path, PRINT)
    parts.add([part(1, 3), part(2, 0), part(3, 2)])
    parts.add([part(7, 4)])
    again = Parts.open(tmp_path, PRINT)
    assert again.done() == {1, 2, 3, 7} and again.n_raw == 9 and again.n_empty == 1
    found = list(again.stream([1, 2, 3, 5, 7]))
    assert_same(concat(found), concat([cells(1, 3), cells(3, 2), cells(7, 4)]))


def test_new_parts_do_not_overwrite_old_ones(tmp_path: Path) -> None:
    Parts.open(tmp_path, PRINT).add([part(1, 3)])
    Parts.open(tmp_path, PRINT).add([part(2, 3)])
    assert Parts.open(tmp_path, PRINT).done() == {1, 2}


def test_a_failed_tile_is_not_done_and_a_later_try_replaces_it(tmp_path: Path) -> None:
    parts = Parts.open(tmp_path, PRINT)
    parts.add([part(1, 3), TilePart(2, None, 0, "read: boom")])
    assert parts.done() == {1} and parts.failed() == {2: "read: boom"} and parts.n_empty == 0
    parts.add([part(2, 2)])
    again = Parts.open(tmp_path, PRINT)
    assert again.done() == {1, 2} and again.failed() == {}
    assert_same(concat(list(again.stream([1, 2]))), concat([cells(1, 3), cells(2, 2)]))


def test_other_settings_are_refused_by_name_and_overwrite_starts_anew(tmp_path: Path) -> None:
    Parts.open(tmp_path, PRINT).add([part(1, 3)])
    with pytest.raises(UsageError, match="tile.*256.*512.*--overwrite"):
        Parts.open(tmp_path, {**PRINT, "tile": "512"})
    assert Parts.open(tmp_path, PRINT).done() == {1}
    assert Parts.open(tmp_path, {**PRINT, "tile": "512"}, overwrite=True).done() == set()


def test_a_damaged_part_is_done_again_and_scratch_files_go(tmp_path: Path) -> None:
    parts = Parts.open(tmp_path, PRINT)
    parts.add([part(1, 3)])
    parts.add([part(2, 3)])
    path = parts.folder / "part-00000000.npz"
    path.write_bytes(path.read_bytes()[:100])
    (parts.folder / ".part-00000002.npz.1.tmp").write_bytes(b"half")
    again = Parts.open(tmp_path, PRINT)
    assert again.done() == {2}
    assert sorted(p.name for p in parts.folder.iterdir()) == ["fingerprint.json", "part-00000001.npz"]


def test_remove_leaves_nothing(tmp_path: Path) -> None:
    parts = Parts.open(tmp_path, PRINT)
    parts.add([part(1, 1)])
    parts.remove()
    assert list(tmp_path.iterdir()) == []
