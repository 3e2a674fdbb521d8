"""`cellslide train muse-points`: a point detector, a MUSE backbone with a head after DPA-P2PNet."""

from __future__ import annotations

from dataclasses import asdict

import click

from cellslide.models.registry import lazy
from cellslide.train.points.recipe import PointsRecipe
from cellslide.train.task import LABELS, PATH, TrainingTask, crop_flags, from_paths, trained_by
from cellslide.types import DetectDecode

TASK = TrainingTask(
    name="muse-points",
    help="Train a point detector (a MUSE backbone and a head after DPA-P2PNet) on DATASET folders.\n\nPoints of the "
    "recipe's classes teach place and type, other points and masks (by their centroids) the place alone. Slides whose "
    "nuclei are known are read too: a folder of tables (`segment`, `xenium label`), or a .csv list with the columns "
    "cells, slide, patient, organ, split.",
    recipe=PointsRecipe,
    read_sets=from_paths("cellslide.train.points.data:load_point_sets"),
    set_card=lazy("cellslide.train.points.data:point_set_card"),
    module=trained_by("cellslide.train.points.training:PointsTraining"),
    load_encoder=lazy("cellslide.train.points.training:load_backbone"),
    loaders=lazy("cellslide.train.points.data:loaders"),
    entry=lambda recipe, metrics: {"detect": DetectDecode(**asdict(recipe.detect))},
    flags=(
        click.option(
            "--init", type=PATH, help="Whole detector to start from: a file of weights, or the folder of a run."
        ),
        click.option(
            "--encoder-weights",
            type=PATH,
            help="Backbone to start from: a published MUSE, one of `cellslide pretrain muse`, or another detector's.",
        ),
        LABELS,
        *crop_flags("--field-size", "field_px", "Edge of the fields that the network sees, px."),
    ),
)
