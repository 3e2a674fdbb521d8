"""A slide folder to look at: a painted slide, a disc for every cell, typed by two made-up paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np

from cellslide.classify.columns import Rule, Tally, decided_columns
from cellslide.classify.decision import DecisionConfig
from cellslide.slides.identity import describe_slide
from cellslide.slides.slide import open_slide
from cellslide.store.anndata_columns import Columns
from cellslide.store.cell_table import TableExtender, open_table
from cellslide.store.run_record import plain, write_record
from cellslide.store.table_writer import CellTableWriter
from cellslide.types import Calibration, Cells, ClassSpec, CropSpec, Float64, ModelSpec, PathProbs, RunRecord
from cellslide.view.answers import Viewer
from cellslide.view.server import Server, open_server
from tests.painted import paint_slide

CLASSES = (ClassSpec("tumour", (220, 30, 30)), ClassSpec("stroma", (30, 90, 220)), ClassSpec("immune", (20, 150, 60)))
CALIBRATION = Calibration(
    temperature_local=0.9, temperature_global=1.3, temperature_mix=0.7, reliability_local=(0.9, 0.5, 0.7),
    reliability_global=(0.6, 0.8, 0.7), tau=0.6, gamma=0.05, thresholds=(0.6, 0.4, 0.5), abstain=0.55,
)  # fmt: skip
WIDTH, HEIGHT, MPP, RADIUS, SPACING = 1600, 1200, 0.25, 16.0, 80.0


@dataclass(frozen=True, slots=True)
class Viewed:
    """A slide's folder below `root`, what two paths say of its cells, where these are in level-0 pixels (N, 2)."""

    root: Path
    folder: Path
    slide: Path
    probs: PathProbs
    xy: Float64


def made_up_probs(n: int, k: int = 3, seed: int = 0) -> PathProbs:
    """Return probabilities of both paths with ties, with rows that the global path skipped, and rows not typed."""
    rng = np.random.default_rng(seed)
    local, global_ = (rng.dirichlet([0.6] * k, n).astype(np.float32) for _ in range(2))
    gate = rng.uniform(0, 1, n).astype(np.float32)
    local[::17] = global_[::17]
    local[::23, :2] = local[::23, 1:2]
    gate[::29] = np.float32(0.6)
    local[5::31, 0] = 0.0
    global_[3::11], gate[3::11] = np.nan, np.nan
    local[7::37], global_[7::37], gate[7::37] = np.nan, np.nan, np.nan
    return PathProbs(local, global_, gate)


def write_viewed(root: Path, name: str = "s", *, typed: bool = True) -> Viewed:
    """Write `root/NAME` with a cell table of 300 cells, and the slide beside `root`."""
    centres = np.stack(np.meshgrid(np.arange(40, WIDTH, SPACING), np.arange(40, HEIGHT, SPACING)), axis=-1).reshape(
        -1, 2
    )
    slide = root.parent / f"{name}.tif"
    paint_slide(slide, WIDTH, HEIGHT, MPP, centres, RADIUS, (1, 4))
    folder = root / name
    info = open_slide(slide).info
    n = len(centres)
    angle = np.arange(16) * np.pi / 8
    rings = centres[:, None] + RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    whole = np.zeros(n, np.int32)
    score = np.linspace(0.5, 1, n).astype(np.float32)
    cells = Cells(
        centres, whole, whole, score, np.full(n, 50, np.float32), None, None, rings.reshape(-1, 2),
        np.arange(0, 16 * n + 1, 16, dtype=np.int64),
    )  # fmt: skip
    run = RunRecord("0", "done", describe_slide(info), {}, [], "cpu", "torch", "fp32", 0, "2026-01-01T00:00:00Z")
    model = ModelSpec("fake", "mask", MPP, 256, 64, (0.0,) * 3, (1.0,) * 3, weights_sha256="0" * 64)
    writer = CellTableWriter(folder / "cells.zarr", info, model)
    writer.append(cells)
    writer.close(run)
    probs = made_up_probs(n)
    if typed:
        _type(folder, probs, run)
    write_record(folder, run)
    return Viewed(root, folder, slide, probs, centres)


def _type(folder: Path, probs: PathProbs, run: RunRecord) -> None:
    """Add what `classify` would have written."""
    rule = Rule(DecisionConfig(), CALIBRATION, tuple(c.name for c in CLASSES))
    spec = {"mpp": 0.5, "local": plain(CropSpec(64, 64)), "context": plain(CropSpec(256, 128))}
    run.config["classify"] = {
        "spec": spec, "rule": {"decision": plain(rule.decision), "calibration": plain(CALIBRATION), "taxonomy": None}
    }  # fmt: skip
    known = ~np.isnan(probs.local).any(axis=1)
    with open_table(folder / "cells.zarr") as table:
        extender = TableExtender(table)
        columns = decided_columns(probs, known, rule, Tally())
        extender.append(Columns(columns.obs, columns.obsm))
        extender.close(run, CLASSES)


@contextmanager
def serving(viewer: Viewer) -> Iterator[Server]:
    """Serve a viewer for the block, in a thread of this process."""
    with open_server(viewer) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
