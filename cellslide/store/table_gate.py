"""What a stranger's table states of itself is bounded before work is done on it: sizes, counts, and where files lie."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.errors import CellslideError
from cellslide.store.foreign_files import read_json

MOST_ROWS = 1 << 31
# A chunk of texts, and the least that is allowed for numbers.
MOST_TEXT_BYTES, LEAST_BYTES = 256 << 20, 1 << 16
MOST_NODE_BYTES = 4 << 20
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_HEAD_BYTES = 20


def check_store(path: Path) -> None:
    """Raise CellslideError where a store holds anything but folders and plain files, or links that lead out of it."""
    root = path.resolve()
    waiting = [path]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                    raise CellslideError(f"{entry.path}: leads out of the table")
                # Chunks are looked at when they are read; there may be many thousands.
                if entry.is_dir():
                    if entry.name != "c":
                        waiting.append(Path(entry.path))
                elif not stat.S_ISREG(entry.stat().st_mode):
                    raise CellslideError(f"{entry.path}: not a plain file")
                elif entry.name == "zarr.json":
                    _check_node(Path(entry.path), entry.stat().st_size)


def _check_node(path: Path, size: int) -> None:
    if size > MOST_NODE_BYTES:
        raise CellslideError(f"{path}: {size} bytes are no description of an array")
    node = read_json(path, CellslideError)
    if not isinstance(node, dict):
        raise CellslideError(f"{path}: no description of an array")
    shape = node.get("shape") or []
    grid = (node.get("chunk_grid") or {}).get("configuration") or {}
    for name, counts in (("shape", shape), ("chunks", grid.get("chunk_shape") or [])):
        if not all(isinstance(n, int) and 0 <= n <= MOST_ROWS for n in counts):
            raise CellslideError(f"{path}: its {name} is not believable")
    if len(shape) > 2 and np.prod([float(n) for n in shape[1:]]) > MOST_ROWS:
        raise CellslideError(f"{path}: its shape is not believable")


def check_rows(array: Any, where: Path) -> int:
    """Return the rows of the column that counts cells; raises CellslideError where its chunks are not there."""
    n, rows = int(array.shape[0]), int(array.chunks[0])
    folder = where / "tables" / "cells" / "obs" / "cell_id" / "c"
    there = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
    # A chunk of zeros need not be written.
    if n > (there + 1) * rows:
        raise CellslideError(f"{where}: states {n:,} rows, but holds {there} chunks of {rows:,}; write it again")
    return n


def check_size(path: Path, array: Any) -> None:
    """Raise CellslideError where a chunk would unpack to more than its array can hold."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CellslideError(f"{path}: not a plain file")
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except FileNotFoundError:
        return
    limit, stated = _limit(array), _stated(head, type(array.metadata.codecs[-1]).__name__)
    if stated is not None and stated > limit:
        raise CellslideError(f"{path} is damaged: {stated:,} bytes unpacked, at most {limit:,} belong there")


def _limit(array: Any) -> int:
    if array.dtype.kind in "OUT":
        return MOST_TEXT_BYTES
    return max(LEAST_BYTES, int(np.prod([float(n) for n in array.chunks])) * int(array.dtype.itemsize))


def _stated(head: bytes, codec: str) -> int | None:
    """Return the size that the head of a Zstandard or Blosc frame states, None for others."""
    if codec == "ZstdCodec" and head[:4] == _ZSTD_MAGIC and len(head) > 5:
        flags = head[4]
        width = {0: 1 if flags & 32 else 0, 1: 2, 2: 4, 3: 8}[flags >> 6]
        start = 5 + (0 if flags & 32 else 1) + (0, 1, 2, 4)[flags & 3]
        if not width:
            return MOST_TEXT_BYTES + 1  # it does not say
        return int.from_bytes(head[start : start + width], "little") + (256 if width == 2 else 0)
    if codec == "BloscCodec" and len(head) >= 16:
        return int.from_bytes(head[4:8], "little")
    return None
