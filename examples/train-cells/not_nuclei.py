"""Add places that are no nucleus to labelled images: the class `not_nucleus` of a classifier learns from them.

Every image of DATASET is copied with its points and further ones: each object that a model of outlines finds where
annotators saw nothing, or places drawn far from every annotated nucleus. The first needs a data set in which every
nucleus is annotated, or regions that hold none; where annotators missed some, as in BRCA-M2C, most of what the model
finds beside their points are nuclei, and drawn places are right.

    python not_nuclei.py DATASET -o OUT --weights runs/outlines/model.safetensors
    python not_nuclei.py DATASET -o OUT --drawn 15
"""

from __future__ import annotations

import csv
import shutil
import zlib
from pathlib import Path

import click
import numpy as np
from scipy.spatial import KDTree

import cellslide
from cellslide.api import Model
from cellslide.evaluate.dataset import Sample, read_dataset, write_manifest
from cellslide.train.data import licences
from cellslide.types import Float64

NAME, NOTE = "not_nucleus", "and places that are no nuclei"


def wrong_objects(model: Model, sample: Sample, mpp: float, least_um: float) -> Float64:
    """Return the centroids (N, 2) of found objects at least `least_um` from every annotated nucleus, image pixels."""
    found = cellslide.segment(sample.load_image(), model=model, mpp=mpp).centroid_xy
    if len(found) and sample.points_path is not None and len(true := sample.load_points().xy):
        found = found[KDTree(true).query(found)[0] * mpp >= least_um]
    if len(found) and sample.mask_path is not None:
        mask = sample.load_mask()
        x, y = (np.clip(found[:, i].astype(int), 0, mask.shape[1 - i] - 1) for i in (0, 1))
        found = found[mask[y, x] == 0]
    return found


def drawn_places(sample: Sample, mpp: float, n: int, least_um: float) -> Float64:
    """Return at most `n` places (N, 2) of an image that lie at least `least_um` from every annotated nucleus."""
    height, width = sample.load_image().shape[:2]
    rng = np.random.default_rng(zlib.crc32(sample.stem.encode()))
    places = rng.uniform((0, 0), (width, height), (50 * n, 2))
    return places[KDTree(sample.load_points().xy).query(places)[0] * mpp >= least_um][:n]


def copy_sample(sample: Sample, extra: Float64, out: Path) -> tuple[str, str, int]:
    """Copy an image and its points, with the extra ones; returns both paths in `out`, and the number of points."""
    image, points = f"images/{sample.image_path.name}", f"points/{sample.stem}.csv"
    shutil.copyfile(sample.image_path, out / image)
    rows = [(f"{x:.2f}", f"{y:.2f}", NAME) for x, y in extra]
    if sample.points_path is not None:
        true = sample.load_points()
        rows = [(f"{x:.2f}", f"{y:.2f}", name) for (x, y), name in zip(true.xy, true.class_name, strict=True)] + rows
    with (out / points).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("x", "y", "class"), *rows])
    return image, points, len(rows)


@click.command()
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--weights", "weights", multiple=True, help="Weights of a model of outlines; may be given again.")
@click.option("--drawn", default=0, help="Places to draw in each image.")
@click.option("--least-um", default=5.0, show_default=True, help="Least distance from an annotated nucleus.")
def main(dataset: Path, output: Path, weights: tuple[str, ...], drawn: int, least_um: float) -> None:
    """Write DATASET again with places that are no nuclei."""
    for folder in ("images", "points"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    models = [cellslide.load_model(weights=path) for path in weights]
    licence = "; ".join(licences(dataset))
    rows: list[dict[str, object]] = []
    for s in (s for s in read_dataset(dataset).samples if s.split != "test"):
        if s.mpp is None:
            raise click.ClickException(f"{s.image_path}: mpp is empty in the manifest")
        found = [wrong_objects(model, s, s.mpp, least_um) for model in models]
        extra = np.concatenate([*found, drawn_places(s, s.mpp, drawn, least_um)] if drawn else found)
        image, points, n = copy_sample(s, extra, output)
        about = {"split": s.split, "patient": s.patient, "organ": s.organ, "mpp": s.mpp}
        size = {"width": s.width, "height": s.height, "n_nuclei": n}
        rows.append({"file": image, "points": points, **about, **size, "licence": licence, "note": NOTE})
        click.echo(f"{s.stem}: {len(extra)} places that are no nuclei, {n} points")
    write_manifest(output, rows)
    for model in models:
        model.close()


if __name__ == "__main__":
    main()
