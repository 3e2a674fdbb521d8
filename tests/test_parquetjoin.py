"""A column that is copied from file to file still packed is the one that would have been written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cellslide.formats import export
from cellslide.formats.export import write_parquet
from cellslide.formats.parquet_join import join_column
from cellslide.store import cell_table as table
from cellslide.store import shapes as spatial
from tests.random_cells import as_kind, ellipses, model_spec, write_table


def made(path: Path, names: str, groups: list[int], **options: Any) -> pa.Table:
    """Write columns of numbers, texts or outlines, in row groups of those sizes."""
    n, rng = sum(groups), np.random.default_rng(0)
    columns: dict[str, Any] = {
        "a": rng.random(n),
        "b": pa.array([None if k % 7 == 0 else f"text {k}" for k in range(n)]).dictionary_encode(),
        "c": pa.array([bytes(k % 50) for k in range(n)]),
        "d": rng.random(n) < 0.5,
    }
    whole = pa.table({name: columns[name] for name in names}).replace_schema_metadata({"of": "mine"})
    with pq.ParquetWriter(path, whole.schema, **options) as writer:
        for k, size in enumerate(groups):
            writer.write_table(whole.slice(sum(groups[:k]), size), row_group_size=max(size, 1))
    return whole


@pytest.mark.parametrize("options", [{}, {"write_page_index": True}, {"use_dictionary": False, "compression": "zstd"}])
@pytest.mark.parametrize("groups", [[40, 40, 13], [5], [3] * 17])
def test_a_file_joined_is_the_file_written_whole(tmp_path: Path, groups: list[int], options: dict[str, Any]) -> None:
    path, source = tmp_path / "a.parquet", tmp_path / "b.parquet"
    wanted = made(tmp_path / "c.parquet", "abdc", groups, **options)
    made(path, "abd", groups, **options)
    made(source, "dcb", groups, **options)
    join_column(path, wanted.schema, source, "c")
    with pq.ParquetFile(path) as file, pq.ParquetFile(tmp_path / "c.parquet") as whole:
        assert file.schema_arrow.equals(wanted.schema, check_metadata=True)
        assert file.read().equals(wanted)
        for i, size in enumerate(groups):
            one, other = file.metadata.row_group(i), whole.metadata.row_group(i)
            assert (one.num_rows, one.total_byte_size) == (size, other.total_byte_size)
            assert one.column(0).statistics == other.column(0).statistics
    few = [("a", "<", 0.5)]
    assert pq.read_table(path, filters=few).equals(pq.read_table(tmp_path / "c.parquet", filters=few))


def test_other_row_groups_or_no_such_column_are_refused(tmp_path: Path) -> None:
    path, source = tmp_path / "a.parquet", tmp_path / "b.parquet"
    whole = made(path, "abd", [20, 20])
    made(source, "c", [20, 10, 10])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other row groups"):
        join_column(path, whole.schema, source, "c")
    assert path.read_bytes() == before
    made(source, "c", [20, 20])
    with pytest.raises(ValueError, match="no column geometry"):
        join_column(path, whole.schema, source, "geometry")


@pytest.mark.parametrize("kind", ["mask", "box"])
def test_outlines_are_copied_where_row_groups_agree(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, size in ((spatial, "ROW_GROUP", 20), (export, "ROW_GROUP", 20), (export, "BLOCK_ROWS", 40)):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(table, "BLOCK_ROWS", 40)
    cells = write_table(tmp_path, as_kind(ellipses(130), kind), model_spec(kind))
    copied = pq.read_table(write_parquet(cells, tmp_path))
    assert cells.shapes is not None and pq.ParquetFile(tmp_path / "cells.parquet").num_row_groups == 7
    monkeypatch.setattr(export, "_stored_outlines", lambda _: None)
    whole = pq.read_table(write_parquet(cells, tmp_path))
    assert copied.equals(whole) and copied.schema.equals(whole.schema, check_metadata=True)
    monkeypatch.undo()
    monkeypatch.setattr(export, "join_column", lambda *_: pytest.fail("row groups differ"))
    assert pq.read_table(write_parquet(cells, tmp_path)).equals(whole)
