"""painted-transcripts over annotated nuclei of BRCA-M2C: the recovered labels are those of the annotation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellslide.xenium.bundle import Bundle, id_text
from cellslide.xenium.expression import LabelSettings
from cellslide.xenium.label import label_cells
from cellslide.xenium.markers import read_markers
from cellslide.xenium.painted import PaintSettings, paint_bundle, turned_matrix
from tests.support.xenium_slide import GENES, programmes
from tests.xenium.test_label import WANTED, auroc

KINDS = {"tumor_epithelial": 0, "lymphocyte": 1, "stromal": 3}  # the last is no class of the markers
N_FIELDS, FIELD_PX = 12, 500


@pytest.mark.skipif(importlib.util.find_spec("scanpy") is None, reason="needs the extra spatial")
def test_labels_of_annotated_nuclei_are_recovered(shared: Path, tmp_path: Path) -> None:
    from sklearn.metrics import adjusted_rand_score

    folder = shared / "data/brca-m2c"
    manifest = pd.read_csv(folder / "manifest.csv")
    fields = manifest[manifest["split"] == "train"]["points"].sort_values()[:N_FIELDS]
    points = [
        pd.read_csv(folder / name).assign(x=lambda t, k=k: t["x"] + k * FIELD_PX) for k, name in enumerate(fields)
    ]
    table = pd.concat(points)
    table = table[table["class"].isin(list(KINDS))]
    kind = table["class"].map(KINDS).to_numpy(np.int64)
    matrix = turned_matrix((N_FIELDS * FIELD_PX, FIELD_PX), 0.5, 0.2125, 90)
    xy, rates = table[["x", "y"]].to_numpy(float), programmes()[kind]
    painted = paint_bundle(tmp_path, xy, rates, GENES, matrix, PaintSettings(doublets=0.1))
    bundle = Bundle(tmp_path)
    found = label_cells(bundle, read_markers("nuclass", bundle.genes, WANTED), LabelSettings())
    order = {code: k for k, code in enumerate(bundle.cells().cell.tolist())}
    rows = np.array([order[code] for code in found.cell.tolist()])
    truth, single = kind[rows], ~np.isin(rows, painted.doublet)
    classes = np.array([WANTED.index(name) for name in found.classes])
    label = np.where(found.label < 0, 3, classes[found.label])
    kept = (found.confidence.confidence >= 0.6) & (label < 3)
    right = label == truth
    typed = label < 3
    # A doublet is of two classes, so that it counts in no share of what is right; all cells are told beside.
    cluster, missing = found.clusters.cluster, truth == 3
    ari = [adjusted_rand_score(truth[rows], cluster[rows]) for rows in (single, np.ones(len(truth), bool))]
    rank = auroc(-found.confidence.confidence[typed], ~right[typed])
    figures = {
        "cells": len(truth), "clusters": len(found.names.label), "ari": ari[0], "ari_all": ari[1],
        "kept": kept.sum() / typed.sum(), "accuracy_kept": right[kept & single].mean(),
        "accuracy_kept_all": right[kept].mean(), "missing_ambiguous": right[missing & single].mean(),
        "missing_ambiguous_all": right[missing].mean(), "auroc": rank,
    }  # fmt: skip
    print("painted-transcripts", {name: round(float(value), 3) for name, value in figures.items()})
    # Nuclei touch in these fields and transcripts of one lie in the cell of the next, which blurs the clusters.
    assert figures["ari_all"] >= 0.75, figures
    assert figures["accuracy_kept_all"] >= 0.95, figures
    assert figures["kept"] >= 0.6, figures
    assert figures["missing_ambiguous_all"] >= 0.75, figures
    assert rank >= 0.8, figures
    assert id_text(int(found.cell[0])).endswith("-1")
