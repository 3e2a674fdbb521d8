"""Cells made up for the tests of the output: ellipses at random places, in the order that a slide gives them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cellslide.store.cell_table import CellTable, open_table
from cellslide.store.shapes import ring_boxes
from cellslide.store.table_writer import CellTableWriter
from cellslide.types import Cells, ClassSpec, Level, ModelKind, ModelSpec, RunRecord, SlideInfo

BOUNDS = (100, 200, 3000, 2000)
CLASSES = (ClassSpec("Tumor", (200, 0, 0)), ClassSpec('T-"cell" µ', (0, 99, 255)), ClassSpec("Stroma", (0, 160, 60)))


def slide_info(bounds: tuple[int, int, int, int] | None = BOUNDS, width: int = 4000, height: int = 3000) -> SlideInfo:
    """Return a slide whose pixels are not square."""
    levels = (Level(width, height, 1.0), Level(width // 4, height // 4, 4.0))
    return SlideInfo("s1", Path("s1.svs"), "aperio", width, height, 0.25, 0.26, "vendor", levels, 40.0, bounds)


def model_spec(kind: ModelKind = "mask", classes: tuple[ClassSpec, ...] = CLASSES) -> ModelSpec:
    """Return a model of that kind and those classes."""
    return ModelSpec("fake", kind, 0.25, 256, 64, (0.5,) * 3, (0.5,) * 3, classes, weights_sha256="ab" * 32)


def run_record(sha256: str = "f0" * 32) -> RunRecord:
    """Return the record of a finished run on a slide of that hash."""
    slide = {"path": "s1.svs", "sha256_head": sha256}
    return RunRecord("0.0", "done", slide, {}, [], "cpu", "torch", "fp32", 0, "2026-01-01T00:00:00Z")


def ellipses(n: int, classes: int = 3, seed: int = 0, width: int = 4000, height: int = 3000) -> Cells:
    """Return `n` nuclei with 8 to 30 vertices each, tile rows of 256 px, sorted by row, then x."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(20, (width - 20, height - 20), (n, 2))
    row = (centre[:, 1] // 256).astype(np.int32)
    order = np.lexsort((centre[:, 0], row))
    centre, row = centre[order], row[order]
    counts = rng.integers(8, 31, n)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    owner = np.repeat(np.arange(n), counts)
    angle = 2 * np.pi * (np.arange(start[-1]) - start[owner]) / counts[owner]
    a = rng.uniform(6, 14, n)
    b = a * rng.uniform(0.5, 1, n)
    turn = rng.uniform(0, np.pi, n)
    u, v = a[owner] * np.cos(angle), b[owner] * np.sin(angle)
    spin = np.stack([np.cos(turn), np.sin(turn)])[:, owner]
    xy = np.stack([u * spin[0] - v * spin[1], u * spin[1] + v * spin[0]], axis=1) + centre[owner]
    prob = rng.dirichlet([0.5] * classes, n).astype(np.float32) if classes else None
    score = rng.uniform(0.5, 1, n).astype(np.float32)
    area = (np.pi * a * b * 0.25 * 0.26).astype(np.float32)
    tile = (row * 16 + centre[:, 0] // 256).astype(np.int32)
    return Cells(centre, tile, row, score, area, prob, None, xy, start)


def as_kind(cells: Cells, kind: ModelKind) -> Cells:
    """Return the cells as a model of that kind gives them."""
    if kind == "mask" or cells.contour_xy is None or cells.contour_start is None:
        return cells
    box = ring_boxes(cells.contour_xy, cells.contour_start) if kind == "box" else None
    return replace(cells, contour_xy=None, contour_start=None, box_xyxy=box)


def write_table(
    folder: Path,
    cells: Cells,
    spec: ModelSpec | None = None,
    slide: SlideInfo | None = None,
    run: RunRecord | None = None,
) -> CellTable:
    """Write the cells as `folder/cells.zarr` and open it."""
    writer = CellTableWriter(folder / "cells.zarr", slide or slide_info(), spec or model_spec())
    writer.append(cells)
    writer.close(run or run_record())
    return open_table(folder / "cells.zarr")
