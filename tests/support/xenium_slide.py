"""A painted slide with a painted bundle over its nuclei: what every part of the Xenium chain is tried on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.slides import painted
from cellslide.types import Float64, Int64
from cellslide.xenium.painted import PaintedBundle, PaintSettings, paint_bundle, turned_matrix

# Genes of Table A8 and two of no class; the programmes of four kinds of cells, of which one has no marker here.
GENES = (
    "EPCAM", "KRT8", "KRT18", "KRT19", "KRT5", "CD3D", "CD3E", "CD2", "CD4", "IL7R", "PECAM1", "VWF", "KDR", "CD34",
    "FLT1", "GENE1", "GENE2", "GENE3", "GENE4", "GENE5", "HOUSE1", "HOUSE2",
)  # fmt: skip
CLASSES = ("Epithelial_Malignant", "T_Cell", "Endothelial", "unknown")


def programmes(on: float = 12.0, off: float = 0.4) -> Float64:
    """Return mean transcripts (4, G): five genes of its own for each class, two of all."""
    rates = np.full((4, len(GENES)), off)
    for k in range(4):
        rates[k, 5 * k : 5 * k + 5] = on
    rates[:, 20:] = 4.0
    return rates


@dataclass(frozen=True)
class PaintedPair:
    """Slide, nuclei (N, 2) in its pixels, their classes (N,), and the bundle."""

    slide: Path
    xy_px: Float64
    kind: Int64
    bundle: PaintedBundle
    matrix: Float64


def paint_pair(folder: Path, turn: float = 90.0, mirrored: bool = False, **settings: Any) -> PaintedPair:
    """Paint the demonstration slide and a bundle over it; the class of a nucleus is a quarter of the slide."""
    slide = folder / "he_image.tif"
    folder.mkdir(parents=True, exist_ok=True)
    painting = painted.make_slide(slide)
    height, width = painting.image.shape[:2]
    xy = painting.centroid_xy
    kind = 2 * (xy[:, 0] > width / 2).astype(np.int64) + (xy[:, 1] > height / 2)
    kind = np.where(np.random.default_rng(0).random(len(kind)) < 0.3, np.arange(len(kind)) % 4, kind)
    matrix = turned_matrix((width, height), painted.MPP, 0.2125, turn, mirrored)
    bundle = paint_bundle(folder / "outs", xy, programmes()[kind], GENES, matrix, PaintSettings(**settings))
    return PaintedPair(slide, xy, kind, bundle, matrix)
