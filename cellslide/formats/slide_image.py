"""The slide's picture beside its nuclei in `cells.zarr`: a pyramid of limited size, as SpatialData reads images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cellslide.slides.reopen import reopen
from cellslide.slides.slide import Slide, thumbnail_plane
from cellslide.store.cell_table import CellTable, TableExtender
from cellslide.store.shapes import MICROMETRES, frame_steps, mark_store
from cellslide.types import UInt8

NAME = "slide"
CHUNK_PX, LEAST_PX = 1024, 512


def add_image(table: CellTable, most_mb: int, moved_to: Path | None = None) -> None:
    """Write the table again with `images/slide`, RGB, and the frames of image and shapes; closes it.

    most_mb   MB of all levels before compression; the largest level is as fine as this lets it be.
    moved_to  where the slide is now. Raises UsageError where it is gone or another.
    """
    with reopen(table, moved_to) as slide:
        extender = TableExtender(table)
        try:
            root: Any = zarr.open_group(extender.staging.folder, mode="r+", zarr_format=3, use_consolidated=False)
            _write_pyramid(root, slide, most_mb)
            mpp = (table.slide.mpp_x, table.slide.mpp_y)
            mark_store(root, "nuclei" in root["shapes"], mpp)
            extender.close(table.run)
        except BaseException:
            extender.abort()
            raise


def _write_pyramid(root: zarr.Group, slide: Slide, most_mb: int) -> None:
    info = slide.info
    # The levels above the largest take a third of it together.
    factor = max(1.0, math.sqrt(info.width_px * info.height_px * 3 / (most_mb * 1e6 * 0.75)))
    if f"images/{NAME}" in root:
        del root[f"images/{NAME}"]
    group, plane = root.require_group(f"images/{NAME}"), thumbnail_plane(info, factor)
    width, height, levels = plane.width_px, plane.height_px, 0
    above: Any = None
    while not levels or max(above.shape[1:]) > LEAST_PX:
        level = group.create_array(
            f"s{levels}", shape=(3, height, width), chunks=(3, min(CHUNK_PX, height), min(CHUNK_PX, width)),
            dtype="uint8", dimension_names=("c", "y", "x"),
        )  # fmt: skip
        for y in range(0, height, CHUNK_PX):
            for x in range(0, width, CHUNK_PX):
                box = (x, y, min(x + CHUNK_PX, width), min(y + CHUNK_PX, height))
                pixels = slide.read_plane(plane, box) if above is None else _halved(above, box)
                level[:, y : box[3], x : box[2]] = np.moveaxis(pixels, -1, 0)
        above, levels = level, levels + 1
        width, height = -(-width // 2), -(-height // 2)
    group.attrs.update(_attributes(levels, factor, (info.mpp_x, info.mpp_y)))


def _halved(level: Any, box: tuple[int, int, int, int]) -> UInt8:
    """Return a box of the next level (h, w, 3): the mean of four pixels each, an odd edge repeated."""
    x0, y0, x1, y1 = box
    pixels = np.moveaxis(np.asarray(level[:, 2 * y0 : 2 * y1, 2 * x0 : 2 * x1]), 0, -1)
    pad = [(0, 2 * (y1 - y0) - pixels.shape[0]), (0, 2 * (x1 - x0) - pixels.shape[1]), (0, 0)]
    four = np.pad(pixels, pad, mode="edge").reshape(y1 - y0, 2, x1 - x0, 2, 3).astype(np.uint16)
    return np.asarray((four.sum(axis=(1, 3)) + 2) // 4, np.uint8)


def _attributes(levels: int, factor: float, mpp: tuple[float, float]) -> dict[str, Any]:
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space"} for n in "yx")]
    scales = {
        "name": f"/images/{NAME}",
        "axes": axes,
        "datasets": [
            {"path": f"s{k}", "coordinateTransformations": [{"type": "scale", "scale": [1.0, 2.0**k, 2.0**k]}]}
            for k in range(levels)
        ],
        "coordinateTransformations": frame_steps(
            "cyx", {"global": (factor, factor), MICROMETRES: (factor * mpp[0], factor * mpp[1])}
        ),
    }
    shown = {"channels": [{"label": name} for name in "rgb"]}
    return {
        "ome": {"omero": shown, "version": "0.5-dev-spatialdata", "multiscales": [scales]},
        "spatialdata_attrs": {"version": "0.3"},
    }
