"""Columns of an AnnData table on zarr v3, appended block by block, encoded as the AnnData on-disk format says.

Nothing here knows cells: it writes and reads named columns (`obs`), matrices (`obsm`, `X`) and small values (`uns`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import LocalStore

from cellslide.errors import CellslideError

CHUNK_ROWS = 50_000
CHUNK_BYTES = 16 << 20
TEXT = np.dtype(object)
DICT_ATTRS = {"encoding-type": "dict", "encoding-version": "0.1.0"}


class TableError(CellslideError):
    """A cell table that is missing, incomplete, or not written by cellslide."""


@dataclass(frozen=True, slots=True)
class Categorical:
    """A column of few words: `codes` (N,) index `names`; -1 is missing."""

    codes: NDArray[Any]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.codes)


Column = NDArray[Any] | Categorical


@dataclass(frozen=True, slots=True)
class Columns:
    """A block of rows by column name: `obs` holds vectors (N,), `obsm` matrices (N, K), `x` the features (N, F)."""

    obs: Mapping[str, Column] = field(default_factory=dict)
    obsm: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    x: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        every = [*self.obs.values(), *self.obsm.values(), *([] if self.x is None else [self.x])]
        if len({len(column) for column in every}) > 1:
            sizes = {name: len(column) for name, column in {**self.obs, **self.obsm}.items()}
            raise ValueError(f"columns of one block differ in length: {sizes}")

    def __len__(self) -> int:
        every = [*self.obs.values(), *self.obsm.values(), *([] if self.x is None else [self.x])]
        return len(every[0]) if every else 0

    def rows(self, part: slice) -> Columns:
        """Return some of the rows."""
        obs: dict[str, Column] = {
            name: Categorical(column.codes[part], column.names) if isinstance(column, Categorical) else column[part]
            for name, column in self.obs.items()
        }
        x = None if self.x is None else self.x[part]
        return Columns(obs, {name: matrix[part] for name, matrix in self.obsm.items()}, x)


class GrowingArray:
    """A zarr array that grows by its first axis and is written in whole chunks, so that no chunk is written twice."""

    def __init__(self, group: zarr.Group, name: str, like: NDArray[Any]) -> None:
        """Take name, dtype and width from `like` (N, ...); nothing is written before a chunk is full."""
        self.group, self.name = group, name
        self.is_text = like.dtype.kind in "OUST"
        # Bytes stay bytes: they are laid out as a chunk at once, without an object a row.
        self.dtype = like.dtype if like.dtype.kind == "S" else TEXT if self.is_text else like.dtype
        self.tail = like.shape[1:]
        row_bytes = max(1, 64 if self.is_text else like.dtype.itemsize * int(np.prod(self.tail, dtype=np.int64)))
        self.chunk_rows = min(CHUNK_ROWS, max(1024, 1 << (CHUNK_BYTES // row_bytes).bit_length() - 1))
        self.pending: list[NDArray[Any]] = []
        self.n_pending = self.n_written = 0
        self.array: Any = None

    def append(self, values: NDArray[Any]) -> None:
        """Add rows; raises TableError where their width differs from the first block's."""
        if values.shape[1:] != self.tail:
            raise TableError(f"{self.name}: a block has rows of shape {values.shape[1:]}, the first had {self.tail}")
        as_bytes = values.dtype.kind == self.dtype.kind == "S"
        if not as_bytes and self.dtype.kind == "S":
            self.dtype, self.pending = TEXT, [_as_text(part) for part in self.pending]
        self.pending.append(values if as_bytes else values.astype(self.dtype))
        self.n_pending += len(values)
        if self.n_pending >= self.chunk_rows:
            whole = self.n_pending // self.chunk_rows * self.chunk_rows
            joined = np.concatenate(self.pending)
            self._write(joined[:whole])
            self.pending, self.n_pending = [joined[whole:].copy()], self.n_pending - whole

    def close(self) -> None:
        """Write what is pending; an array that never got a row is written empty."""
        empty = np.empty((0, *self.tail), self.dtype)
        rest = np.concatenate([empty, *self.pending])
        if len(rest) or self.array is None:
            self._write(rest)
        self._resize()
        self.pending = []

    def _write(self, values: NDArray[Any]) -> None:
        if self.array is None:
            self.array = self._create(len(values))
        first, self.n_written = self.n_written, self.n_written + len(values)
        if values.size and not (values.dtype != TEXT and self._write_chunks(values, first)):
            self._resize()
            self.array[first:] = _as_text(values) if self.is_text else values

    def _resize(self) -> None:
        if self.array.shape[0] != self.n_written:
            self.array.resize((self.n_written, *self.tail))

    def _write_chunks(self, values: NDArray[Any], first: int) -> bool:
        """Write rows from `first` on as whole chunks of a local store, several times faster than through zarr; returns
        whether it could."""
        store, rows = self.array.store, int(self.array.chunks[0])
        if not isinstance(store, LocalStore) or first % rows:
            return False
        folder, name = store.root / self.array.path / "c", "/".join(["{}", *("0" for _ in self.tail)])
        for begin in range(0, len(values), rows):
            part = values[begin : begin + rows]
            full = np.concatenate([part, np.zeros((rows - len(part), *self.tail), part.dtype)])
            path = folder / name.format((first + begin) // rows)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._encoded(full))
        return True

    def _encoded(self, chunk: NDArray[Any]) -> bytes:
        if chunk.dtype.kind == "S":
            return bytes(Zstd(level=1).encode(vlen_utf8(chunk)))
        plain = np.ascontiguousarray(chunk.astype(chunk.dtype.newbyteorder("<"), copy=False))
        if chunk.dtype.itemsize == 1:
            return bytes(Zstd(level=1).encode(plain.view(np.uint8)))
        return bytes(Blosc("lz4", clevel=5, shuffle=Blosc.BITSHUFFLE).encode(plain))

    def _create(self, n: int) -> Any:
        kind = "string-array" if self.is_text else "array"
        packed = self.is_text or self.dtype.itemsize == 1
        return self.group.create_array(
            name=self.name,
            shape=(n, *self.tail),
            chunks=(max(1, min(n, self.chunk_rows)), *(max(1, width) for width in self.tail)),
            dtype="string" if self.is_text else self.dtype,
            compressors=ZstdCodec(level=1) if packed else BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
            attributes={"encoding-type": kind, "encoding-version": "0.2.0"},
            overwrite=True,
        )


def _as_text(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.str_).astype(TEXT) if values.dtype.kind == "S" else values


def vlen_utf8(values: NDArray[np.bytes_]) -> bytes:
    """Return ASCII texts (N,) as zarr's vlen-utf8 has them: how many, then each with its length before it."""
    width = values.dtype.itemsize
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), width)
    lengths = np.strings.str_len(values).astype("<u4")
    rows = np.concatenate([lengths[:, None].view(np.uint8), raw], axis=1)
    keep = np.arange(4 + width) < 4 + lengths[:, None]
    body = rows if keep.all() else rows[keep]
    return len(values).to_bytes(4, "little") + body.tobytes()


class ColumnWriter:
    """Appends blocks of columns to the table in `group`; a column that is there already is replaced."""

    def __init__(self, group: zarr.Group) -> None:
        self.group = group
        self.arrays: dict[str, GrowingArray] = {}
        self.categories: dict[str, tuple[str, ...]] = {}
        self.order: list[str] = list(obs_names(group)) if "obs" in group else []
        self.n = 0

    def append(self, block: Columns) -> None:
        """Add one block of rows; every block must carry the same columns."""
        for name, column in block.obs.items():
            self._obs(name, column)
        for name, matrix in block.obsm.items():
            self._grow(f"obsm/{name}", matrix)
        if block.x is not None:
            self._grow("X", block.x)
        self.n += len(block)

    def _obs(self, name: str, column: Column) -> None:
        if isinstance(column, np.ndarray):
            self._grow(f"obs/{name}", column)
        else:
            if self.categories.setdefault(name, column.names) != column.names:
                raise TableError(f"column {name}: the categories changed from one block to the next")
            codes = np.int8 if len(column.names) < 128 else np.int16
            self._grow(f"obs/{name}/codes", column.codes.astype(codes))
        if name not in self.order and name != "_index":
            self.order.append(name)

    def _grow(self, path: str, values: NDArray[Any]) -> None:
        if path not in self.arrays:
            parent, _, name = path.rpartition("/")
            top = path.removesuffix("/codes")
            if top in self.group:
                del self.group[top]
            self.arrays[path] = GrowingArray(self.group.require_group(parent) if parent else self.group, name, values)
        self.arrays[path].append(values)

    def close(self) -> None:
        """Write what is pending and the column order; raises TableError where columns differ in length."""
        for array in self.arrays.values():
            array.close()
        lengths = {name: array.array.shape[0] for name, array in self.arrays.items()}
        if len(set(lengths.values())) > 1:
            raise TableError(f"columns differ in length: {lengths}")
        for name, words in self.categories.items():
            column = self.group[f"obs/{name}"]
            column.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
            write_values(self.group, f"obs/{name}/categories", words)
        mark_frame(self.group.require_group("obs"), self.order)
        self.group.require_group("obsm").attrs.update(DICT_ATTRS)


def mark_frame(group: zarr.Group, order: Sequence[str]) -> None:
    """Say that `group` is a data frame whose index is `_index` and whose columns are `order`."""
    frame = {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"}
    group.attrs.update({**frame, "column-order": list(order)})


def write_skeleton(group: zarr.Group, var_names: Sequence[str]) -> None:
    """Write what AnnData expects beside the columns: `var` with its names, and empty mappings."""
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name in ("layers", "obsp", "varm", "varp", "obsm", "uns"):
        group.require_group(name).attrs.update(DICT_ATTRS)
    group.require_group("obs")
    write_values(group, "var/_index", var_names)
    mark_frame(group.require_group("var"), ())


def write_values(group: zarr.Group, path: str, values: Sequence[str]) -> None:
    """Write a short list of words as one array, replacing what was there."""
    parent, _, name = path.rpartition("/")
    array = GrowingArray(group.require_group(parent), name, np.empty(0, TEXT))
    array.append(np.array(list(values), dtype=TEXT))
    array.close()


def write_word(group: zarr.Group, path: str, text: str) -> None:
    """Write one string, replacing what was there."""
    parent, _, name = path.rpartition("/")
    attrs: dict[str, Any] = {"encoding-type": "string", "encoding-version": "0.2.0"}
    array: Any = group.require_group(parent).create_array(
        name=name, shape=(), dtype="string", attributes=attrs, overwrite=True
    )
    array[()] = text


def write_mapping(group: zarr.Group, path: str, words: Mapping[str, str]) -> None:
    """Write a mapping of strings as AnnData's `dict`."""
    group.require_group(path).attrs.update(DICT_ATTRS)
    for key, text in words.items():
        write_word(group, f"{path}/{key}", text)


def obs_names(group: zarr.Group) -> tuple[str, ...]:
    """Return the names of the columns of `obs`, in their order."""
    names: Any = group["obs"].attrs.get("column-order", [])
    return tuple(str(name) for name in names)


def read_word(group: zarr.Group, path: str) -> str:
    """Return one string; raises TableError where it is missing."""
    if path not in group:
        raise TableError(f"{group.store_path}: {path} is missing; this table was not written by cellslide")
    node: Any = group[path]
    return str(node[()])


Nodes = dict[str, Any]


def _node(group: zarr.Group, path: str, nodes: Nodes | None) -> Any:
    """Return an array or group, None where it is missing; `nodes` keeps what was opened, which takes longer than to
    read."""
    if nodes is None:
        return group.get(path)
    if path not in nodes:
        nodes[path] = group.get(path)
    return nodes[path]


def read_obs(
    group: zarr.Group, name: str, start: int = 0, stop: int | None = None, nodes: Nodes | None = None
) -> Column:
    """Return rows [start, stop) of one column; raises TableError naming the columns there are.

    `nodes` is where the arrays of a table that does not change are kept open.
    """
    node = _node(group, f"obs/{name}", nodes)
    if node is None:
        raise TableError(f"no column {name}; there are {', '.join(obs_names(group))}")
    if isinstance(node, zarr.Group):
        codes, words = (_node(group, f"obs/{name}/{part}", nodes) for part in ("codes", "categories"))
        return Categorical(np.asarray(codes[start:stop]), tuple(str(word) for word in words[:]))
    if node.dtype.kind in "OUT" and (texts := _stored_texts(node, start, stop)) is not None:
        # Through zarr it takes several times as long.
        return texts.astype(np.str_).astype(TEXT)
    values = np.asarray(node[start:stop])
    return values.astype(TEXT) if values.dtype.kind in "UT" else values


def read_ascii(group: zarr.Group, name: str, start: int, stop: int, nodes: Nodes | None = None) -> NDArray[np.bytes_]:
    """Return rows [start, stop) of a text column as bytes; texts of one length, as UUIDs are, without an object a row.

    Raises TableError as `read_obs` does, and where the column is no text or not ASCII.
    """
    texts = _stored_texts(_node(group, f"obs/{name}", nodes), start, stop)
    if texts is not None:
        return texts
    values = read_obs(group, name, start, stop, nodes)
    if not isinstance(values, np.ndarray) or values.dtype != TEXT:
        raise TableError(f"column {name} is no text")
    try:
        return values.astype(np.bytes_)
    except UnicodeEncodeError as error:
        raise TableError(f"column {name} is not ASCII: {error}") from error


def _stored_texts(node: Any, start: int, stop: int | None) -> NDArray[np.bytes_] | None:
    """Return rows [start, stop) of a text array from its chunks where all are of one length, None otherwise."""
    if not (isinstance(node, zarr.Array) and isinstance(node.store, LocalStore) and stop and 0 <= start < stop):
        return None
    rows = int(node.chunks[0])
    parts: list[NDArray[np.bytes_]] = []
    for k in range(start // rows, -(-min(stop, node.shape[0]) // rows)):
        part = _even_texts(node.store.root / node.path / "c" / str(k))
        if part is None or (parts and part.dtype != parts[0].dtype):
            return None
        parts.append(part)
    return np.concatenate(parts)[start % rows :][: stop - start] if parts else None


def _even_texts(path: Path) -> NDArray[np.bytes_] | None:
    """Return the texts of a chunk as written by `vlen_utf8` where all are of one length, those behind the end aside."""
    try:
        raw = np.frombuffer(Zstd().decode(path.read_bytes()), np.uint8)
    except (OSError, RuntimeError):
        return None
    count, width = (int.from_bytes(raw[k : k + 4].tobytes(), "little") for k in (0, 4))
    n = (len(raw) - 4 - 4 * count) // max(width, 1)
    if not width or n > count or len(raw) != 4 + 4 * count + n * width:
        return None
    rows = raw[4 : 4 + n * (4 + width)].reshape(n, 4 + width)
    if (rows[:, :4] != raw[4:8]).any() or raw[4 + n * (4 + width) :].any():
        return None
    return np.ascontiguousarray(rows[:, 4:]).view(f"S{width}")[:, 0]


def read_matrix(
    group: zarr.Group, path: str, start: int = 0, stop: int | None = None, nodes: Nodes | None = None
) -> NDArray[Any]:
    """Return rows [start, stop) of `X` or of `obsm/NAME`; raises TableError where it is missing."""
    node = _node(group, path, nodes)
    if node is None:
        raise TableError(f"no {path} in the table")
    return np.asarray(node[start:stop])
