"""Score a point detector on its validation images under several odds of its classes and of background.

    python try_odds.py runs/points path/to/brca-m2c --odds 1,1,1,1 --odds 1,1,2,0.7

Each line is one choice: F1 by class, their mean, and F1 of detection without classes.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from cellslide.train.export import load_start
from cellslide.train.points.data import load_point_sets
from cellslide.train.points.recipe import PointsRecipe
from cellslide.train.points.training import PointsTraining, ScoreBoard, find_points
from cellslide.train.recipe import load_recipe
from cellslide.train.task import build_recipe

BIAS = "cls_head.layers.3.bias"


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--weights", type=click.Path(exists=True, path_type=Path), help="Default: the best of RUN.")
@click.option("--odds", multiple=True, help="Factors of the classes and background, with commas; repeatable.")
def main(run: Path, dataset: Path, weights: Path | None, odds: tuple[str, ...]) -> None:
    """Score the detector of training folder RUN on the validation images of DATASET."""
    recipe = load_recipe(PointsRecipe, run / "recipe.yaml", {"datasets": {dataset.name: {"val": {"split": "val"}}}})
    images = load_point_sets([dataset], recipe)[0].val
    model = build_recipe(recipe)
    load_start(model, weights or run / "model.safetensors")
    training = PointsTraining(recipe, model).eval()
    bias = model.get_submodule("head").get_parameter(BIAS)
    trained = bias.detach().clone()
    for choice in odds or ("1,1,1,1",):
        factors = np.array([float(x) for x in choice.split(",")])
        with torch.no_grad():
            bias.copy_(trained + torch.from_numpy(np.log(factors)).to(trained))
        board = ScoreBoard(len(recipe.model.classes), recipe.mpp)
        for image in images:
            board.add(image, find_points(training, image.image))
        scores = board.take(recipe.model.classes)
        click.echo(f"{choice:16} " + " ".join(f"{name} {value:.4f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
