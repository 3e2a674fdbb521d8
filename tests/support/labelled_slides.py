"""Painted slides whose nuclei have a table with outlines and the columns of `xenium label`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellslide import import_cells
from cellslide.store.anndata_columns import Categorical, Columns
from cellslide.store.cell_table import TableExtender, open_table
from cellslide.types import Float64, Int64
from tests.painted import DISC, PINK_DISC, PaintedSlide, paint_slide

CLASSES = ("a", "b")


@dataclass(frozen=True)
class LabelledSlide:
    """The painting, the folder of its table, and of each row: its class, whether it is kept, and its place (N, 2)."""

    painting: PaintedSlide
    folder: Path
    kind: Int64
    kept: np.ndarray
    xy: Float64


def labelled_slide(
    folder: Path, name: str = "s", size: tuple[int, int] = (800, 600), seed: int = 0, step: int = 40
) -> LabelledSlide:
    """Paint discs of two colours at 0.25 µm/px; every fifth label is not kept, every seventh nucleus not matched."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(12, size[0], step), np.arange(12, size[1], step)), -1).reshape(-1, 2)
    xy = grid + rng.uniform(0, 6, grid.shape)
    kind = rng.integers(0, 2, len(xy))
    colors = [(DISC, PINK_DISC)[k] for k in kind]
    folder.mkdir(parents=True, exist_ok=True)
    painting = paint_slide(folder / f"{name}.tif", *size, 0.25, xy, 8.0, background="tissue", disc_color=colors)
    angle = np.linspace(0, 2 * np.pi, 17)
    rings = xy[:, None] + 8 * np.stack([np.cos(angle), np.sin(angle)], -1)
    rings[:, -1] = rings[:, 0]
    shapes = [{"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]}}
              for ring in rings]  # fmt: skip
    (folder / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": shapes}))
    import_cells(folder / f"{name}.geojson", painting.path, folder / "out").close()
    out = folder / "out" / name
    return LabelledSlide(painting, out, *_add_labels(out, xy, kind))


def _add_labels(out: Path, xy: Float64, kind: Int64) -> tuple[Int64, np.ndarray, Float64]:
    with open_table(out / "cells.zarr") as table:
        found = np.stack([table.vector("x"), table.vector("y")], axis=1)
        kind = kind[((found[:, None] - xy) ** 2).sum(-1).argmin(1)]
        n = np.arange(len(found))
        kept, matched = n % 5 != 0, n % 7 != 0
        extender = TableExtender(table)
        extender.append(Columns({
            "label": Categorical(kind.astype(np.int16), CLASSES),
            "label_confidence": np.where(kept, 0.9, 0.3).astype(np.float32),
            "label_kept": kept,
            "matched_um": np.where(matched, 0.5, np.nan).astype(np.float32),
            "xenium_cell": np.array([f"cell-{i}" if m else "" for i, m in zip(n, matched, strict=True)], object),
        }))  # fmt: skip
        extender.close(table.run)
    return kind, kept & matched, found
