"""Rows of columns: any range, what is kept between reads, other codecs, damaged chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, GzipCodec

from cellslide.store.anndata_columns import (
    CHUNK_ROWS,
    Columns,
    ColumnWriter,
    OpenNodes,
    TableError,
    read_matrix,
    read_obs,
)

N = CHUNK_ROWS + 700
RANGES = [(0, N), (CHUNK_ROWS - 5, CHUNK_ROWS + 5), (N - 3, N + 9), (7, 7), (3, None), (N, None), (0, 10)]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = zarr.open_group(tmp_path_factory.mktemp("t"), mode="w", zarr_format=3)
    rng, writer = np.random.default_rng(0), ColumnWriter(root)
    obs = {
        "f8": rng.random(N), "f4": rng.random(N, np.float32), "i8": rng.integers(-9, 9, N), "i1": np.arange(N) % 3 > 1,
        "text": np.array([f"{i:06d}" for i in range(N)], "S6"), "uneven": np.arange(N).astype("S"),
    }  # fmt: skip
    writer.append(Columns(obs, {"prob": rng.random((N, 3), np.float32)}, rng.random((N, 2), np.float32)))
    writer.close()
    return root


@pytest.mark.parametrize("path", ["obs/f8", "obs/f4", "obs/i8", "obs/i1", "obs/text", "obs/uneven", "obsm/prob", "X"])
def test_rows_are_those_of_zarr(group: Any, path: str) -> None:
    node, nodes, name = group[path], OpenNodes(), path.removeprefix("obs/")
    for start, stop in RANGES:
        wanted = node[start:stop]
        for kept in (nodes, None):
            read = read_obs if path.startswith("obs/") else read_matrix
            rows = read(group, name, start, stop, kept)
            assert isinstance(rows, np.ndarray) and rows.tolist() == wanted.tolist() and rows.flags.writeable
            assert rows.dtype == (object if path in {"obs/text", "obs/uneven"} else wanted.dtype)


def test_what_is_given_out_is_not_what_is_kept(group: Any) -> None:
    nodes = OpenNodes()
    read_matrix(group, "X", 0, 10, nodes)[:] = 7
    assert (read_matrix(group, "X", 0, 10, nodes) < 1).all()


def test_arrays_of_other_codecs_are_read(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path, mode="w", zarr_format=3)
    whole = np.arange(60.0).reshape(20, 3)
    for name, options in (
        ("gzip", {"compressors": GzipCodec()}),
        ("blosc", {"compressors": BloscCodec(cname="lz4", shuffle="bitshuffle")}),
        ("cut", {"chunks": (5, 2)}),
        ("sharded", {"chunks": (5, 3), "shards": (10, 3)}),
        ("big", {"serializer": zarr.codecs.BytesCodec(endian="big")}),
    ):
        array: Any = root.create_array(name=name, shape=(20, 3), dtype="f8", **options)
        array[:] = whole
        for nodes in (None, OpenNodes()):
            np.testing.assert_array_equal(read_matrix(root, name, 3, 17, nodes), whole[3:17])


def test_a_chunk_that_is_missing_or_damaged(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path, mode="w", zarr_format=3)
    writer = ColumnWriter(root)
    writer.append(Columns({"a": np.arange(4.0), "empty": np.array(["one", "two", "", ""], object)}))
    writer.close()
    assert read_obs(root, "empty", 0, 4).tolist() == ["one", "two", "", ""]  # type: ignore[union-attr]
    chunk = tmp_path / "obs" / "a" / "c" / "0"
    whole = chunk.read_bytes()
    turned = bytes(byte ^ (0xFF if k == len(whole) // 2 else 0) for k, byte in enumerate(whole))
    for damaged in (whole[: len(whole) // 2], whole[:-1], turned, b""):
        chunk.write_bytes(damaged)
        with pytest.raises(TableError, match="damaged"):
            read_obs(root, "a", 0, 4)
    chunk.unlink()
    assert read_obs(root, "a", 0, 4).tolist() == [0.0] * 4  # type: ignore[union-attr]
