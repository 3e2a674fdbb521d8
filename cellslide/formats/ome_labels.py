"""Instance labels as OME-NGFF 0.5 (zarr v3): a pyramid of label maps at level 0, written shard by shard.

A pixel holds `cell_id` + 1 of the nucleus whose outline covers its centre, else 0; of two that overlap the later wins.
What a classifier rejected is no nucleus and is not drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from cellslide.errors import UsageError
from cellslide.geometry.outlines import rasterise, ring_bounds
from cellslide.store.atomic import Staging
from cellslide.store.cell_table import CellTable
from cellslide.types import Float32, Float64, Int64, SlideInfo, take_rings

CHUNK_PX, SHARD_PX, SMALLEST_PX = 512, 4096, 1024
LABELS_NAME = "labels.ome.zarr"
UInt32 = NDArray[np.uint32]
Shard = tuple[int, int]


def write_labels(table: CellTable, out_dir: Path) -> Path:
    """Write `labels.ome.zarr` and return its path; memory is bounded by one row of shards.

    Raises UsageError for a model that gives points, which have no extent.
    """
    if table.kind == "point":
        raise UsageError(f"{table.path}: the model gives points, which have no label map; leave labels out of --format")
    staging = Staging(out_dir / LABELS_NAME)
    try:
        levels = _create(staging.folder, table.slide)
        filled = _fill(levels[0], table)
        for fine, coarse in pairwise(levels):
            filled = _halve(fine, coarse, filled)
        staging.publish()
    except BaseException:
        staging.abort()
        raise
    return out_dir / LABELS_NAME


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Return (height, width) of each level, halved and rounded up until it fits SMALLEST_PX."""
    shapes = [(height, width)]
    while max(shapes[-1]) > SMALLEST_PX:
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
    return shapes


def _create(folder: Path, slide: SlideInfo) -> list[Any]:
    shapes = level_shapes(slide.height_px, slide.width_px)
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    group.attrs["ome"] = _metadata(slide, len(shapes))
    return [
        group.create_array(
            name=str(level),
            shape=shape,
            chunks=(CHUNK_PX, CHUNK_PX),
            shards=(_shard_px(shape), _shard_px(shape)),
            dtype="uint32",
            compressors=ZstdCodec(level=1),
            dimension_names=("y", "x"),
        )
        for level, shape in enumerate(shapes)
    ]


def _shard_px(shape: tuple[int, int]) -> int:
    return min(SHARD_PX, -(-max(shape) // CHUNK_PX) * CHUNK_PX)


def _metadata(slide: SlideInfo, n_levels: int) -> dict[str, Any]:
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [slide.mpp_y * 2**level, slide.mpp_x * 2**level]},
            ],
        }
        for level in range(n_levels)
    ]
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in ("y", "x")]
    image = {"name": "nuclei", "axes": axes, "datasets": datasets}
    return {"version": "0.5", "multiscales": [image], "image-label": {}}


def _boxes(table: CellTable) -> Float32:
    """Return the boxes xyxy (N, 4) of all outlines, widened by float32's rounding; NaN for what is no nucleus."""
    boxes = np.empty((len(table), 4), np.float32)
    for chunk in table.iter_chunks(obs=("is_nucleus",)):
        xy, start = chunk.cells.contour_xy, chunk.cells.contour_start
        if xy is not None and start is not None:
            boxes[chunk.start : chunk.start + len(chunk)] = ring_bounds(xy, start) + (-1, -1, 1, 1)
        rejected = ~np.asarray(chunk.columns.obs["is_nucleus"], np.bool_)
        boxes[chunk.start + np.flatnonzero(rejected)] = np.nan
    return boxes


def _fill(array: Any, table: CellTable) -> set[Shard]:
    """Draw the outlines into the finest level; returns the shards (row, column) that hold a nucleus."""
    boxes, step, filled = _boxes(table), array.shards[0], set()
    for row in range(-(-array.shape[0] // step)):
        rows = np.flatnonzero((boxes[:, 1] < (row + 1) * step) & (boxes[:, 3] > row * step))
        if not len(rows):
            continue
        xy, start = _rings(table, rows)
        for col in range(-(-array.shape[1] // step)):
            here = np.flatnonzero((boxes[rows, 0] < (col + 1) * step) & (boxes[rows, 2] > col * step))
            if len(here):
                _draw(array, (row, col), *take_rings(xy, start, here), rows[here])
                filled.add((row, col))
    return filled


def _rings(table: CellTable, rows: Int64) -> tuple[Float64, Int64]:
    # Cells lie in the order of tile rows, so a row of shards is nearly one run of table rows.
    first = int(rows[0])
    rings = table.rings(first, int(rows[-1]) + 1)
    if rings is None:
        raise UsageError(f"{table.path}: no outlines")
    return take_rings(*rings, rows - first)


def _draw(array: Any, shard: Shard, xy: Float64, start: Int64, cell_id: Int64) -> None:
    step = array.shards[0]
    y, x = shard[0] * step, shard[1] * step
    shape = (min(step, array.shape[0] - y), min(step, array.shape[1] - x))
    value = np.concatenate([[0], cell_id + 1]).astype(np.uint32)
    array[y : y + shape[0], x : x + shape[1]] = value[rasterise(xy - (x, y), start, shape)]


def _halve(fine: Any, coarse: Any, filled: set[Shard]) -> set[Shard]:
    """Take every second pixel into the next level; shards whose four parents are empty stay unwritten."""
    step, done = coarse.shards[0], set()
    ratio = 2 * step // fine.shards[0]
    for row, col in sorted({(r // ratio, c // ratio) for r, c in filled}):
        y, x = row * step, col * step
        block: UInt32 = np.zeros((min(step, coarse.shape[0] - y), min(step, coarse.shape[1] - x)), np.uint32)
        for top, left, height, width in _quarters(block.shape):
            y0, x0 = 2 * (y + top), 2 * (x + left)
            block[top : top + height, left : left + width] = fine[y0 : y0 + 2 * height, x0 : x0 + 2 * width][::2, ::2]
        coarse[y : y + block.shape[0], x : x + block.shape[1]] = block
        done.add((row, col))
    return done


def _quarters(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    # The finer level is read in four parts: a whole one would be four times the block.
    height, width = -(-shape[0] // 2), -(-shape[1] // 2)
    for top in range(0, shape[0], height):
        for left in range(0, shape[1], width):
            yield top, left, min(height, shape[0] - top), min(width, shape[1] - left)
