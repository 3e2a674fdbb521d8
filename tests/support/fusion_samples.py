"""Small painted slides with painted bundles, of several patients: what fusion networks are tried on.

Cells are dark (kind 0) or pale (kind 1). Gene D is of dark cells, P of pale ones, H of both alike, B twice that of dark
cells: what H tells of B is how many cells there are, what the picture tells is of which kind they are.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cellslide.types import Float64, Int64
from cellslide.xenium.painted import PaintSettings, paint_bundle, turned_matrix

# Those with numbers are of no kind, each more frequent than the last.
GENES = ("B", "D", "H", "P", *(f"N{k:02}" for k in range(24)))
MPP, SIZE_PX = 1.0, 256
COLORS = ((70, 40, 120), (200, 130, 190))


@dataclass(frozen=True)
class PaintedSample:
    """A slide, its nuclei (N, 2) in pixels, their kinds (N,), and the folder of its bundle."""

    slide: Path
    xy_px: Float64
    kind: Int64
    bundle: Path


def paint_sample(folder: Path, seed: int, n: int = 160) -> PaintedSample:
    """Paint one slide: dark cells on one side of a line, pale ones on the other, more of them here than there."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    xy = rng.uniform(8, SIZE_PX - 8, (n, 2))
    xy = xy[rng.random(n) < 0.3 + 0.7 * (np.sin(xy[:, 1] / 40 + seed) > 0)]
    kind = (xy @ rng.normal(size=2) > SIZE_PX / 2 * rng.normal()).astype(np.int64)
    kind = np.where(rng.random(len(xy)) < 0.2, 1 - kind, kind)
    image = np.full((SIZE_PX, SIZE_PX, 3), (236, 190, 214), np.uint8)
    row, col = np.mgrid[:SIZE_PX, :SIZE_PX]
    for (x, y), k in zip(xy, kind, strict=True):
        image[(col - x) ** 2 + (row - y) ** 2 < 20] = COLORS[k]
    slide = folder / f"slide{seed}.png"
    Image.fromarray(image).save(slide)
    rates = np.array([[6, 8, 3, 0.2], [1, 0.2, 3, 8.0]])[kind]
    rates = np.column_stack([rates, np.tile(np.geomspace(0.3, 6.0, len(GENES) - 4), (len(xy), 1))])
    matrix = turned_matrix((SIZE_PX, SIZE_PX), MPP, 0.2125)
    paint_bundle(folder / "outs", xy, rates, GENES, matrix, PaintSettings(seed=seed, depth_sd=0.2, ambient=0.0))
    return PaintedSample(slide, xy, kind, folder / "outs")


def write_samples(folder: Path, splits: tuple[str, ...]) -> Path:
    """Paint a slide for each split and write SAMPLES.csv."""
    table = folder / "samples.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "bundle", "alignment", "patient", "split", "mpp"])
        for k, split in enumerate(splits):
            made = paint_sample(folder / f"s{k}", k)
            places = [
                str(p.relative_to(folder)) for p in (made.slide, made.bundle, made.bundle / "he_imagealignment.csv")
            ]
            writer.writerow([*places, f"P{k}", split, MPP])
    return table
