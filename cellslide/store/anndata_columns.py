"""Columns of an AnnData table on zarr v3, appended block by block, encoded as the AnnData on-disk format says.

Nothing here knows cells: it writes and reads named columns (`obs`), matrices (`obsm`, `X`) and small values (`uns`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore

from cellslide.errors import CellslideError
from cellslide.store.table_gate import check_size

CHUNK_ROWS = 50_000
CHUNK_BYTES = 16 << 20
TEXT = np.dtype(object)
DICT_ATTRS = {"encoding-type": "dict", "encoding-version": "0.1.0"}


# Its checksum is what notices a damaged chunk.
CODEC = ZstdCodec(level=1, checksum=True)


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


class GrowingArray:
    """A zarr array that grows by its first axis and is written in whole chunks, so that no chunk is written twice."""

    def __init__(self, group: zarr.Group, name: str, like: NDArray[Any]) -> None:
        """Take name, dtype and width from `like` (N, ...); nothing is written before a chunk is full."""
        self.group, self.name = group, name
        self.is_text = like.dtype.kind in "OUST"
        self.dtype = TEXT if self.is_text else like.dtype
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
        self.pending.append(_as_text(values) if self.is_text else values.astype(self.dtype, copy=False))
        self.n_pending += len(values)
        if self.n_pending >= self.chunk_rows:
            whole = self.n_pending // self.chunk_rows * self.chunk_rows
            joined = np.concatenate(self.pending) if len(self.pending) > 1 else self.pending[0]
            self._write(joined[:whole])
            # A copy, so that what is left does not keep the whole of it in memory.
            self.pending, self.n_pending = [joined[whole:].copy()] * (whole < len(joined)), self.n_pending - whole

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
        if values.size:
            self._resize()
            self.array[first:] = values

    def _resize(self) -> None:
        if self.array.shape[0] != self.n_written:
            self.array.resize((self.n_written, *self.tail))

    def _create(self, n: int) -> Any:
        kind = "string-array" if self.is_text else "array"
        return self.group.create_array(
            name=self.name,
            shape=(n, *self.tail),
            chunks=(max(1, min(n, self.chunk_rows)), *(max(1, width) for width in self.tail)),
            dtype="string" if self.is_text else self.dtype,
            compressors=CODEC,
            attributes={"encoding-type": kind, "encoding-version": "0.2.0"},
            overwrite=True,
        )


def _as_text(values: NDArray[Any]) -> NDArray[Any]:
    return (values.astype(np.str_) if values.dtype.kind == "S" else values).astype(TEXT)


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


def write_array(group: zarr.Group, path: str, values: NDArray[Any]) -> None:
    """Write an array of numbers, replacing what was there."""
    parent, _, name = path.rpartition("/")
    array = GrowingArray(group.require_group(parent), name, values[:0])
    array.append(values)
    array.close()


def write_word(group: zarr.Group, path: str, text: str) -> None:
    """Write one string, replacing what was there."""
    parent, _, name = path.rpartition("/")
    attrs: dict[str, Any] = {"encoding-type": "string", "encoding-version": "0.2.0"}
    array: Any = group.require_group(parent).create_array(
        name=name, shape=(), dtype="string", attributes=attrs, overwrite=True
    )
    array[()] = text


def write_number(group: zarr.Group, path: str, value: int) -> None:
    """Write one whole number, replacing what was there."""
    parent, _, name = path.rpartition("/")
    attrs: dict[str, Any] = {"encoding-type": "numeric-scalar", "encoding-version": "0.2.0"}
    array: Any = group.require_group(parent).create_array(
        name=name, shape=(), dtype="int64", attributes=attrs, overwrite=True
    )
    array[()] = value


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
    """Return one string, or one number as such; raises TableError where it is missing."""
    if path not in group:
        raise TableError(f"{group.store_path}: {path} is missing; this table was not written by cellslide")
    node: Any = group[path]
    if isinstance(node.store, LocalStore):
        check_size(node.store.root / node.path / "c", node)
    return str(node[()])


@dataclass(frozen=True, slots=True)
class OpenNodes:
    """Nodes of a table that does not change, kept open: arrays and groups, words of categories, and of each array the
    chunk that was read last, since zarr unpacks a whole chunk for a single row."""

    opened: dict[str, Any] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    last: dict[str, tuple[int, NDArray[Any]]] = field(default_factory=dict)


def _node(group: zarr.Group, path: str, nodes: OpenNodes | None) -> Any:
    """Return an array or group, None where it is missing; `nodes` keeps what was opened, which takes longer than to
    read."""
    if nodes is None:
        return group.get(path)
    if path not in nodes.opened:
        nodes.opened[path] = group.get(path)
    return nodes.opened[path]


def _rows(node: Any, start: int, stop: int | None, nodes: OpenNodes | None) -> NDArray[Any]:
    """Return rows [start, stop) of an array, texts as objects; raises TableError for a damaged chunk."""
    start, stop, _ = slice(start, stop).indices(node.shape[0])
    rows = int(node.chunks[0])
    k = start // rows
    first, end = k * rows, min((k + 1) * rows, node.shape[0])
    if nodes is None or stop > end or (start, stop) == (first, end):
        return _read(node, start, stop)
    kept = nodes.last.get(node.path)
    if kept is None or kept[0] != k:
        nodes.last[node.path] = kept = k, _read(node, first, end)
    return kept[1][start - first : stop - first].copy()


def _read(node: Any, start: int, stop: int) -> NDArray[Any]:
    check_chunks(node, start, stop)
    try:
        values = np.asarray(node[start:stop])
    except (RuntimeError, ValueError) as error:
        raise TableError(f"{node.store_path} is damaged: {error}; write the table again with --overwrite") from error
    return values.astype(TEXT) if values.dtype.kind in "UT" else values


def check_chunks(node: Any, start: int, stop: int) -> None:
    """Raise CellslideError where a chunk of rows [start, stop) would unpack to more than belongs there."""
    if not (isinstance(node.store, LocalStore) and node.ndim) or start >= stop:
        return
    rows = int(node.chunks[0])
    for k in range(start // rows, -(-stop // rows)):
        check_size(node.store.root / node.path / "c" / "/".join([str(k), *("0" for _ in node.shape[1:])]), node)


def read_obs(
    group: zarr.Group, name: str, start: int = 0, stop: int | None = None, nodes: OpenNodes | None = None
) -> Column:
    """Return rows [start, stop) of one column; raises TableError naming the columns there are.

    `nodes` is where the arrays of a table that does not change are kept open.
    """
    node = _node(group, f"obs/{name}", nodes)
    if node is None:
        raise TableError(f"no column {name}; there are {', '.join(obs_names(group))}")
    if isinstance(node, zarr.Group):
        codes, words = (_node(group, f"obs/{name}/{part}", nodes) for part in ("codes", "categories"))
        return Categorical(_rows(codes, start, stop, nodes), _words(words, nodes))
    return _rows(node, start, stop, nodes)


def _words(array: Any, nodes: OpenNodes | None) -> tuple[str, ...]:
    found = nodes.words.get(array.path) if nodes else None
    if found is None:
        check_chunks(array, 0, array.shape[0])
        found = tuple(str(word) for word in array[:])
        if nodes is not None:
            nodes.words[array.path] = found
    return found


def read_matrix(
    group: zarr.Group, path: str, start: int = 0, stop: int | None = None, nodes: OpenNodes | None = None
) -> NDArray[Any]:
    """Return rows [start, stop) of `X` or of `obsm/NAME`; raises TableError where it is missing."""
    node = _node(group, path, nodes)
    if node is None:
        raise TableError(f"no {path} in the table")
    return _rows(node, start, stop, nodes)
