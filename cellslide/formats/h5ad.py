"""The table of a `cells.zarr` as one HDF5 file (.h5ad): AnnData's format is the same tree in both, so it is copied.

Outlines are not part of it; `obsm["spatial"]` holds the centroids in level-0 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr

from cellslide.store.cell_table import BLOCK_ROWS, CellTable

FILE_NAME = "cells.h5ad"

TEXT = h5py.string_dtype()
CHUNK_ROWS = 16_384


def write_h5ad(table: CellTable, path: Path) -> None:
    """Write the table to `path`, rows a block at a time: memory does not grow with the cells."""
    with table.newest() as current, h5py.File(path, "w") as file:
        _copy_group(current.group, file)


def _copy_group(source: zarr.Group, target: h5py.Group) -> None:
    _copy_attrs(source.attrs, target)
    for name, node in sorted(source.members()):
        if isinstance(node, zarr.Group):
            _copy_group(node, target.create_group(name))
        else:
            _copy_array(node, target, name)


def _copy_array(source: Any, group: h5py.Group, name: str) -> None:
    is_text = source.dtype.kind not in "biuf"
    dtype = TEXT if is_text else source.dtype
    if not source.shape:
        target = group.create_dataset(name, data=str(source[()]) if is_text else source[()], dtype=dtype)
    else:
        target = group.create_dataset(name, source.shape, dtype, **_layout(source.shape))
        for first in range(0, source.shape[0], BLOCK_ROWS):
            block = np.asarray(source[first : first + BLOCK_ROWS])
            target[first : first + len(block)] = block.astype(object) if is_text else block
    _copy_attrs(source.attrs, target)


def _layout(shape: tuple[int, ...]) -> dict[str, Any]:
    # HDF5 refuses chunks of nothing, and gains nothing from chunks in a short list.
    if shape[0] < 1024 or 0 in shape:
        return {}
    return {"chunks": (min(shape[0], CHUNK_ROWS), *shape[1:]), "compression": "gzip", "compression_opts": 1,
            "shuffle": True}  # fmt: skip


def _copy_attrs(source: Mapping[str, Any], target: h5py.Group | h5py.Dataset) -> None:
    for name, value in source.items():
        if isinstance(value, list):
            target.attrs.create(name, np.array(value, dtype=object), dtype=TEXT)
        elif value is not None:  # HDF5 has no word for nothing.
            target.attrs[name] = value
