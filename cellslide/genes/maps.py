"""Maps of genes as images of a SpatialData store, channel by gene; written in place of an older one in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cellslide.store.atomic import Staging
from cellslide.store.shapes import mark_store
from cellslide.types import Float32, Float64

CHUNK = 256


@dataclass(frozen=True, slots=True)
class GeneMap:
    """Values (genes, rows, columns), NaN where nothing was predicted; a row and a column are `step` level-0 pixels.

    first  centre (x, y) of the corner's square, level-0 pixels.
    """

    values: Float32
    first: tuple[float, float]
    step: tuple[float, float]

    def at(self, xy: Float64) -> Float32:
        """Return the values at level-0 places: (N, 2) -> (N, genes), between centres linearly, NaN off the map.

        A square without a value leaves its share to its neighbours.
        """
        place = (np.asarray(xy, np.float64) - self.first) / self.step
        low = np.floor(place).astype(np.int64)
        part = place - low
        total = np.zeros((len(xy), len(self.values)), np.float64)
        weight = np.zeros((len(xy), 1), np.float64)
        rows, cols = self.values.shape[1:]
        for dy in (0, 1):
            for dx in (0, 1):
                col, row = low[:, 0] + dx, low[:, 1] + dy
                share = np.abs(1 - dx - part[:, 0]) * np.abs(1 - dy - part[:, 1])
                inside = (col >= 0) & (row >= 0) & (col < cols) & (row < rows)
                found = self.values[:, row.clip(0, rows - 1), col.clip(0, cols - 1)].T
                known = (inside & ~np.isnan(found[:, 0]))[:, None] if len(self.values) else weight > 0
                total += np.where(known, found, 0) * share[:, None]
                weight += known * share[:, None]
        with np.errstate(invalid="ignore"):
            return np.asarray(np.where(weight > 1e-9, total / weight, np.nan), np.float32)


def write_maps(path: Path, genes: Sequence[str], maps: dict[str, GeneMap]) -> None:
    """Write maps by name as `images/NAME` of a store at `path`, each with its place in level-0 pixels."""
    staging = Staging(path)
    try:
        root = zarr.create_group(staging.folder)
        mark_store(root, shapes=False)
        for name, one in maps.items():
            group = root.require_group(f"images/{name}")
            group.attrs.update(_attributes(name, genes, one))
            chunks = (1, min(CHUNK, one.values.shape[1]), min(CHUNK, one.values.shape[2]))
            group.create_array("s0", data=one.values, chunks=chunks, dimension_names=("c", "y", "x"), fill_value=np.nan)
        staging.publish()
    except BaseException:
        staging.abort()
        raise


def _attributes(name: str, genes: Sequence[str], one: GeneMap) -> dict[str, Any]:
    plain = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space"} for n in "yx")]
    axes = [plain[0], *({**axis, "unit": "unit"} for axis in plain[1:])]
    frame = {"input": {"name": "cyx", "axes": axes}, "output": {"name": "global", "axes": axes}}
    (step_x, step_y), (x, y) = one.step, one.first
    steps = [
        {"type": "scale", "scale": [1.0, step_y, step_x], **frame},
        # Pixel 0 covers [0, 1), so its corner lies half a step before its centre.
        {"type": "translation", "translation": [0.0, y - step_y / 2, x - step_x / 2], **frame},
    ]
    scales = {
        "name": f"/images/{name}",
        "axes": plain,
        "datasets": [{"path": "s0", "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]}],
        "coordinateTransformations": [{"type": "sequence", "transformations": steps, **frame}],
    }
    shown = {"channels": [{"label": gene} for gene in genes]}
    return {
        "ome": {"omero": shown, "version": "0.5-dev-spatialdata", "multiscales": [scales]},
        "spatialdata_attrs": {"version": "0.3"},
    }
