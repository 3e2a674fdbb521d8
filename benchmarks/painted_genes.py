"""Fusion networks on painted-transcripts over the annotated nuclei of BRCA-M2C: what must be learned, and what not.

Four groups of target genes: A copies genes that are read; B is of tumour, whose genes are otherwise those of stroma, so
that only the picture tells; C is of stromal nuclei within 20 µm of a lymphocyte; D lies anywhere: nothing tells it.
No figure of it says anything of tissue.

    python -m benchmarks.painted_genes path/to/brca-m2c runs/painted --seed 0 --shift-um 0
"""

from __future__ import annotations

import csv
from pathlib import Path

import click
import cv2
import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import spearmanr

from cellslide.api import evaluate_genes
from cellslide.evaluate.dataset import Sample, read_dataset
from cellslide.genes.samples import read_samples
from cellslide.genes.tiles import GeneTiles, TileShape
from cellslide.train.fit import fit
from cellslide.train.fusion.recipe import FusionRecipe
from cellslide.train.recipe import build
from cellslide.train.task import FitOptions
from cellslide.train.tasks.fusion import FUSION
from cellslide.types import Float64
from cellslide.xenium.painted import PaintSettings, paint_bundle, turned_matrix

KINDS = ("lymphocyte", "tumor_epithelial", "stromal")
SOURCES = ("L1", "L2", "S1", "S2", "H1", "H2")
GROUPS = {"A": ("A1", "A2"), "B": ("B1", "B2"), "C": ("C1", "C2"), "D": ("D1", "D2")}
TARGETS = tuple(name for group in GROUPS.values() for name in group)
# Mean transcripts of a nucleus by kind, of the sources and of A and B; tumour and stroma read alike.
RATES = {
    "L1": (6, 0.3, 0.3), "L2": (4, 0.2, 0.2), "S1": (0.3, 5, 5), "S2": (0.2, 3, 3), "H1": (3, 3, 3), "H2": (2, 2, 2),
    "A1": (6, 0.3, 0.3), "A2": (0.3, 5, 5), "B1": (0.2, 6, 0.2), "B2": (0.2, 4, 0.2),
}  # fmt: skip
NEAR_UM, NEAR_RATE, FAR_RATE, ANYWHERE = 20.0, 8.0, 0.2, 60
VARIANTS = ("morph_only", "expr_only_token", "expr_only_tile", "early_add", "late_concat_token", "late_concat_tile")
# All fields are cut to the smallest, which three tiles fill: one that hung over an edge would have fewer transcripts of
# every gene, D too, so that density alone would tell D.
FIELD_PX, MPP = 465, 0.5
SHAPE = TileShape(FIELD_PX * MPP / 3 / 96, 96, 8, 12)
VIT = {"img_size": 96, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}


def rates_of(xy: Float64, kind: np.ndarray, mpp: float) -> Float64:
    """Return mean transcripts (N, G) of nuclei at (N, 2) pixels."""
    lymphocytes = xy[kind == 0]
    far = cKDTree(lymphocytes).query(xy)[0] * mpp if len(lymphocytes) else np.full(len(xy), np.inf)
    near = np.where((kind == 2) & (far <= NEAR_UM), NEAR_RATE, FAR_RATE)
    own = [np.array(RATES[name], np.float64)[kind] for name in (*SOURCES, *GROUPS["A"], *GROUPS["B"])]
    return np.column_stack([*own, near, near / 2, np.zeros((len(xy), 2))])


def nuclei_of(sample: Sample) -> tuple[Float64, np.ndarray]:
    """Return places (N, 2) and kinds (N,) of the nuclei of a field as it is cut."""
    points = sample.load_points()
    inside = (points.xy < FIELD_PX).all(axis=1)
    kind = np.array([KINDS.index(name) for name in points.class_name], np.int64)
    return points.xy[inside], kind[inside]


def paint(sample: Sample, folder: Path, seed: int, shift_um: float) -> None:
    """Write one field as a slide and its bundle, the transcripts moved by `shift_um` along x."""
    if sample.mpp != MPP or min(sample.width, sample.height) < FIELD_PX:
        raise click.ClickException(f"{sample.image_path}: no field of {FIELD_PX} px at {MPP} µm")
    folder.mkdir()
    cv2.imwrite(str(folder / "field.png"), sample.load_image()[:FIELD_PX, :FIELD_PX, ::-1])
    (places, kind), rng = nuclei_of(sample), np.random.default_rng(seed)
    rates = rates_of(places, kind, MPP)
    size = FIELD_PX, FIELD_PX
    anywhere = rng.uniform(0, size, (ANYWHERE, 2))
    alone = np.zeros((ANYWHERE, rates.shape[1]))
    alone[:, -2:] = 3.0
    xy = np.concatenate([places + (shift_um / MPP, 0), anywhere])
    matrix = turned_matrix(size, MPP, 0.2125)
    paint_bundle(folder, xy, np.concatenate([rates, alone]), (*SOURCES, *TARGETS), matrix, PaintSettings(seed=seed))


def write_samples(data: Path, folder: Path, seed: int, shift_um: float) -> Path:
    """Paint all fields and write SAMPLES.csv: the official validation fields test, every eighth other one validates."""
    table = folder / "samples.csv"
    if table.exists():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    fields = [(s, split) for split in ("train", "val") for s in read_dataset(data, split).samples]
    patients = sorted({s.patient for s, split in fields if split == "train"})
    val = set(np.random.default_rng(seed).permutation(patients)[: len(patients) // 8].tolist())
    tested = {s.patient for s, split in fields if split == "val"}
    rows = []
    for number, (sample, split) in enumerate(fields):
        if split == "train" and sample.patient in tested:
            continue
        place = folder / f"bundle{number:03d}"
        paint(sample, place, seed * 1000 + number, shift_um)
        name = "test" if split == "val" else "val" if sample.patient in val else "train"
        files = [(place / "field.png").resolve(), place.resolve(), (place / "he_imagealignment.csv").resolve()]
        rows.append([*files, sample.patient, name, MPP])
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["slide", "bundle", "alignment", "patient", "split", "mpp"], *rows])
    return table


def oracle(data: Path, table: Path, tokens: Path) -> dict[str, float]:
    """Return the rank correlation of what the nuclei of each test tile let one expect, by group."""
    tests, found, true = [s for s in read_samples(table) if s.split == "test"], [], []
    for one, sample in zip(tests, read_dataset(data, "val").samples, strict=True):
        tiles = GeneTiles(one, SHAPE, tokens, least_transcripts=20)
        assert tiles.tokens is not None and one.patient == sample.patient
        places, kind = nuclei_of(sample)
        rates, place = rates_of(places, kind, MPP), tiles.plane.from_level0(places)
        columns = np.array([tiles.tokens.genes.index(name) for name in TARGETS])
        for number in tiles.kept:
            x0, y0, x1, y1 = tiles.grid.tile(int(number)).read_xyxy
            inside = ((place >= (x0, y0)) & (place < (x1, y1))).all(axis=1)
            found.append(rates[inside][:, len(SOURCES) :].sum(0))
            true.append(tiles.counts(int(number), columns).sum(0))
    pred, truth = np.array(found), np.array(true)
    rank = {name: spearmanr(pred[:, k], truth[:, k])[0] for k, name in enumerate(TARGETS) if np.ptp(pred[:, k]) > 0}
    return {group: float(np.mean([rank[n] for n in names if n in rank] or [0])) for group, names in GROUPS.items()}


@click.command()
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0)
@click.option("--shift-um", default=0.0, help="Break it: move all transcripts beside their nuclei.")
@click.option("--epochs", default=30)
@click.option("--variant", "variants", multiple=True, default=VARIANTS)
def main(data: Path, folder: Path, seed: int, shift_um: float, epochs: int, variants: tuple[str, ...]) -> None:
    """Train each variant on painted-transcripts and print the rank correlation by group on fields of other patients."""
    table = write_samples(data, folder, seed, shift_um)
    tokens = folder / "tokens"
    lines = {"oracle": oracle(data, table, tokens)} if not shift_um else {}
    for variant in variants:
        recipe = build(FusionRecipe, {
            "id": f"painted-{variant}", "mpp": SHAPE.mpp, "stride": SHAPE.stride, "min_transcripts": 20, "flips": True,
            "source_panel": list(SOURCES), "target_panel": list(TARGETS), "batch_size": 32, "epochs": epochs,
            "epoch_samples": 768, "patience": 0, "seed": seed, "precision": "fp32",
            "model": {"variant": variant, "vit": "vit_tiny_patch16_224", "vit_args": VIT},
            "optim": {"lr": 2e-3, "backbone_lr": 5e-4, "expr_lr": 2e-3, "weight_decay": 0.02, "warmup_steps": 40},
        })  # fmt: skip
        run = folder / f"{variant}-{epochs}"
        fit(FUSION, recipe, FitOptions(run, [table], workers=0, extra={"tokens": tokens}, log_every=200))
        report = evaluate_genes(table, weights=run, min_transcripts=20, tokens=tokens)
        assert report.scores is not None
        for name, scores in (("density", report.baselines.get("density")), (variant, report.scores)):
            if scores is not None:
                by = {n: scores.by_gene[n]["spearman"] or 0.0 for n in TARGETS}
                lines[name] = {g: float(np.mean([by[n] for n in names])) for g, names in GROUPS.items()}
        for name, row in lines.items():
            print(f"painted-transcripts {name:>18} " + " ".join(f"{g} {v:+.3f}" for g, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
