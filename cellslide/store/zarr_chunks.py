"""Rows of a zarr array straight from and to the files of its chunks, in the codecs that cellslide writes.

Through zarr each read or write of a chunk takes one to three milliseconds, whatever its size. What is stored is the
same; arrays of another store or with other codecs are left to zarr.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, VLenUTF8Codec, ZstdCodec
from zarr.storage import LocalStore

from cellslide.errors import CellslideError
from cellslide.store.table_gate import check_size

ZSTD_LEVEL, LZ4_LEVEL = 1, 5


@dataclass(frozen=True, slots=True)
class Nodes:
    """What is kept of a table that does not change: arrays and groups that are open, words of categories, and of each
    array the chunk that was read last."""

    opened: dict[str, Any] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    last: dict[str, tuple[int, NDArray[Any]]] = field(default_factory=dict)


def codec_of(dtype: np.dtype[Any]) -> BloscCodec | ZstdCodec:
    """Return what packs an array: LZ4 after a bit shuffle for numbers, Zstandard for texts and single bytes."""
    if dtype.kind in "OUST" or dtype.itemsize == 1:
        return ZstdCodec(level=ZSTD_LEVEL)
    return BloscCodec(cname="lz4", clevel=LZ4_LEVEL, shuffle="bitshuffle")


def write_rows(array: Any, values: NDArray[Any], first: int) -> bool:
    """Write rows from `first` on, where a chunk begins, as whole chunks; returns whether it could.

    Texts are ASCII, dtype S.
    """
    rows = int(array.chunks[0])
    if not isinstance(array.store, LocalStore) or first % rows:
        return False
    for begin in range(0, len(values), rows):
        part = values[begin : begin + rows]
        if len(part) < rows:
            part = np.concatenate([part, np.zeros((rows - len(part), *part.shape[1:]), part.dtype)])
        path = _chunk_path(array, (first + begin) // rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encoded(part))
    return True


def _chunk_path(array: Any, k: int) -> Path:
    return Path(array.store.root / array.path / "c" / "/".join([str(k), *("0" for _ in array.shape[1:])]))


def _encoded(chunk: NDArray[Any]) -> bytes:
    if chunk.dtype.kind == "S":
        return bytes(Zstd(level=ZSTD_LEVEL).encode(vlen_utf8(chunk)))
    plain = np.ascontiguousarray(chunk.astype(chunk.dtype.newbyteorder("<"), copy=False))
    if chunk.dtype.itemsize == 1:
        return bytes(Zstd(level=ZSTD_LEVEL).encode(plain.view(np.uint8)))
    return bytes(Blosc("lz4", clevel=LZ4_LEVEL, shuffle=Blosc.BITSHUFFLE).encode(plain))


def vlen_utf8(values: NDArray[np.bytes_]) -> bytes:
    """Return ASCII texts (N,) as zarr's vlen-utf8 has them: how many, then each with its length before it."""
    width = values.dtype.itemsize
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), width)
    lengths = np.strings.str_len(values).astype("<u4")
    rows = np.concatenate([lengths[:, None].view(np.uint8), raw], axis=1)
    keep = np.arange(4 + width) < 4 + lengths[:, None]
    body = rows if keep.all() else rows[keep]
    return len(values).to_bytes(4, "little") + body.tobytes()


def read_rows(array: Any, start: int, stop: int | None, nodes: Nodes | None = None) -> NDArray[Any] | None:
    """Return rows [start, stop) of an array, None where zarr has to read them.

    Of texts it reads those that are ASCII and of one length in a chunk, as UUIDs are, as bytes, dtype S.
    Raises CellslideError for a chunk that is damaged.
    """
    if not _is_plain(array):
        return None
    start, stop, _ = slice(start, stop).indices(array.shape[0])
    rows = int(array.chunks[0])
    parts: list[NDArray[Any]] = []
    for k in range(start // rows, -(-stop // rows) if start < stop else 0):
        chunk = _chunk(array, k, nodes)
        if chunk is None or (parts and parts[0].dtype != chunk.dtype):
            for other in range(k, -(-stop // rows)):  # what zarr will read unasked
                check_size(_chunk_path(array, other), array)
            return None
        parts.append(chunk[max(start - k * rows, 0) : stop - k * rows])
    # A chunk whose last texts are empty looks like one that ends before them.
    return np.concatenate(parts) if parts and sum(map(len, parts)) == stop - start else None


def _is_plain(array: Any) -> bool:
    """Tell whether an array is laid out as cellslide writes it: files of its own, rows cut into chunks, two codecs."""
    if not (isinstance(array, zarr.Array) and isinstance(array.store, LocalStore) and array.ndim):
        return False
    codecs: Any = getattr(array.metadata, "codecs", ())
    if len(codecs) != 2 or array.chunks[1:] != array.shape[1:] or not isinstance(codecs[1], BloscCodec | ZstdCodec):
        return False
    if isinstance(codecs[0], VLenUTF8Codec):
        return array.ndim == 1
    endian = getattr(codecs[0], "endian", None)
    return isinstance(codecs[0], BytesCodec) and (endian is None or str(getattr(endian, "value", endian)) == "little")


def _chunk(array: Any, k: int, nodes: Nodes | None) -> NDArray[Any] | None:
    """Return chunk k, from `nodes` where it is the last one read of its array; None where zarr has to read it."""
    kept = nodes.last.get(array.path) if nodes else None
    if kept and kept[0] == k:
        return kept[1]
    path = _chunk_path(array, k)
    check_size(path, array)
    try:
        packed = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        raw = np.frombuffer(_unpacked(packed, array.metadata.codecs[1]), np.uint8)
    except (RuntimeError, ValueError) as error:
        raise CellslideError(f"{path} is damaged: {error}; write the table again with --overwrite") from error
    chunk = _even_texts(raw) if array.dtype.kind in "OUT" else _numbers(raw, array)
    if nodes is not None and chunk is not None:
        nodes.last[array.path] = k, chunk
    return chunk


def _unpacked(packed: bytes, codec: Any) -> bytes:
    if not isinstance(codec, BloscCodec):
        return bytes(Zstd().decode(packed))
    # Blosc believes its header, which says the size from byte 12 on, and would read on behind the end.
    if int.from_bytes(packed[12:16], "little") != len(packed):
        raise ValueError(f"{len(packed)} bytes are not all of it")
    return bytes(Blosc().decode(packed))


def _numbers(raw: NDArray[np.uint8], array: Any) -> NDArray[Any] | None:
    shape = array.chunks
    if len(raw) != int(np.prod(shape)) * array.dtype.itemsize:
        return None
    numbers: NDArray[Any] = raw.view(array.dtype.newbyteorder("<")).astype(array.dtype, copy=False)
    return numbers.reshape(shape)


def _even_texts(raw: NDArray[np.uint8]) -> NDArray[np.bytes_] | None:
    """Return the texts of a chunk as `vlen_utf8` lays them out, where all are of one length; those behind the end of
    the array are left out."""
    count, width = (int.from_bytes(raw[k : k + 4].tobytes(), "little") for k in (0, 4))
    n = (len(raw) - 4 - 4 * count) // max(width, 1)
    if not width or n > count or len(raw) != 4 + 4 * count + n * width:
        return None
    rows = raw[4 : 4 + n * (4 + width)].reshape(n, 4 + width)
    if (rows[:, :4] != raw[4:8]).any() or raw[4 + n * (4 + width) :].any():
        return None
    return np.ascontiguousarray(rows[:, 4:]).view(f"S{width}")[:, 0]
