"""A classifier learns from recovered labels of painted-transcripts what it learns from the true ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide import import_cells, open_slide
from cellslide.store.anndata_columns import Categorical, Columns
from cellslide.store.cell_table import TableExtender, open_table
from cellslide.train.fit import fit
from cellslide.train.nuclass.recipe import NuClassRecipe
from cellslide.train.recipe import build
from cellslide.train.task import FitOptions
from cellslide.train.tasks import nuclass
from cellslide.types import Float64, Int64
from cellslide.xenium.alignment import read_alignment
from cellslide.xenium.bundle import Bundle
from cellslide.xenium.expression import LabelSettings
from cellslide.xenium.label import label_slide
from cellslide.xenium.markers import read_markers
from cellslide.xenium.painted import PaintSettings, paint_bundle, turned_matrix
from tests.painted import paint_slide
from tests.support.xenium_slide import GENES, programmes
from tests.train.test_nuclass import PLAIN, RECIPE
from tests.xenium.test_label import WANTED, needs_spatial

SIZE, COLORS = (1000, 640), ((70, 50, 150), (130, 70, 130), (190, 90, 110))


def _slide(folder: Path, name: str, seed: int) -> tuple[Path, Float64, Int64]:
    """Paint nuclei of three classes, of colours that run into each other, and import them as the slide's."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(20, SIZE[0], 40), np.arange(20, SIZE[1], 40)), -1).reshape(-1, 2)
    xy, kind = grid + rng.uniform(0, 6, grid.shape), rng.integers(0, 3, len(grid))
    colors = [tuple(np.clip(COLORS[k] + rng.normal(0, 10, 3), 0, 255).astype(int)) for k in kind]
    path = folder / f"{name}.tif"
    paint_slide(path, *SIZE, 0.25, xy, 9.0, background="tissue", disc_color=colors, seed=seed)  # type: ignore[arg-type]
    (folder / f"{name}.csv").write_text("x,y\n" + "".join(f"{x:.3f},{y:.3f}\n" for x, y in xy))
    import_cells(folder / f"{name}.csv", path, folder / "out").close()
    return path, xy, kind


def _add_truth(folder: Path, xy: Float64, kind: Int64, *names: str) -> None:
    with open_table(folder / "cells.zarr") as table:
        found = np.stack([table.vector("x"), table.vector("y")], axis=1)
        codes = kind[((found[:, None] - xy) ** 2).sum(-1).argmin(1)].astype(np.int16)
        extender = TableExtender(table)
        extender.append(Columns(dict.fromkeys(names, Categorical(codes, tuple(WANTED)))))
        extender.close(table.run)


@needs_spatial
def test_recovered_labels_teach_as_much_as_the_true_ones(tmp_path: Path) -> None:
    path, xy, kind = _slide(tmp_path, "s", 0)
    matrix = turned_matrix(SIZE, 0.25, 0.2125)
    painted = paint_bundle(tmp_path / "outs", xy, programmes()[kind], GENES, matrix, PaintSettings(doublets=0.1))
    bundle = Bundle(tmp_path / "outs")
    with open_slide(path) as slide:
        place, markers = read_alignment(painted.alignment, bundle.pixel_size), read_markers("nuclass", GENES, WANTED)
        counts = label_slide(bundle, tmp_path / "out/s", slide, place, markers, LabelSettings(neighbours=20))
    assert 0.5 < counts.kept_share < 1
    _add_truth(tmp_path / "out/s", xy, kind, "truth")
    _, *other = _slide(tmp_path, "t", 1)
    _add_truth(tmp_path / "out/t", *other, "truth", "label")
    (tmp_path / "pair.csv").write_text("cells,split\nout/s,train\nout/t,val\n")
    accuracy = {}
    for column in ("truth", "label"):
        recipe = build(NuClassRecipe, {
            **RECIPE, "classes": list(WANTED), "batch_size": 32, "epoch_samples": 480, "epochs": 2, "monitor": "",
            "labels": {"column": column}, "datasets": {"pair": {"val": {"split": "val"}}},
            "augment": {**PLAIN, "flip": True},
        })  # fmt: skip
        fit(nuclass.LOCAL, recipe, FitOptions(tmp_path / column, [tmp_path / "pair.csv"], "cpu", 0, log_every=1000))
        accuracy[column] = json.loads((tmp_path / column / "card.json").read_text())["metrics"]["val/accuracy"]
    print("painted-transcripts", accuracy, counts.kept_share)
    assert accuracy["truth"] > 0.9, accuracy
    assert accuracy["label"] >= accuracy["truth"] - 0.02, accuracy
