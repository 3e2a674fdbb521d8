"""`cellslide train cellvta`: CellVTA, and every network that gives HoVer-Net's maps."""

from __future__ import annotations

from dataclasses import asdict

import click

from cellslide.models.registry import lazy
from cellslide.train.hover.recipe import HoverRecipe
from cellslide.train.task import FILE, TrainingTask, crop_flags, from_paths, trained_by
from cellslide.types import HoverDecode

TASK = TrainingTask(
    name="cellvta",
    help="Train CellVTA (or any model with its branches) on DATASET folders.",
    recipe=HoverRecipe,
    read_sets=from_paths("cellslide.train.data:load_sets"),
    set_card=lazy("cellslide.train.data:set_card"),
    module=trained_by("cellslide.train.hover.training:HoverTraining"),
    load_encoder=lazy("cellslide.train.hover.training:load_encoder"),
    loaders=lazy("cellslide.train.data:loaders"),
    entry=lambda recipe, metrics: {"decode": HoverDecode(**asdict(recipe.decode))},
    flags=(
        click.option("--init", type=FILE, help="Weights of the whole model to start from."),
        click.option(
            "--encoder-weights",
            metavar="FILE|ID",
            help="Encoder to start from: a timm network's weights (EfficientNet-Lite too), a ViT's, or an id of the "
            "manifest.",
        ),
        *crop_flags("--crop-size", "crop_px", "Edge of the training crops, px."),
    ),
)
