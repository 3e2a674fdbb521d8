"""`cellslide train celldetr`: CellDETR, which finds nuclei as boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from cellslide.models.registry import lazy
from cellslide.train.celldetr.recipe import CellDETRRecipe
from cellslide.train.task import LABELS, PATH, TrainingTask, crop_flags, from_paths, trained_by
from cellslide.types import DetectDecode


def entry(recipe: CellDETRRecipe, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return which boxes count, as validation chose, and the tiles that they are found in."""
    threshold = round(metrics.get("val/threshold", recipe.score_threshold), 4)
    return {"overlap_px": recipe.tile_px // 4, "detect": DetectDecode(threshold, recipe.nms_um)}


TASK = TrainingTask(
    name="celldetr",
    help="Train CellDETR, which finds nuclei as boxes, on DATASET folders of masks.\n\nBoxes are those of the masks; "
    "points give classes where the recipe names some. Slides whose nuclei have outlines are read too: a folder of "
    "tables (`segment`, `xenium label`), or a .csv list with the columns cells, slide, patient, organ, split.",
    recipe=CellDETRRecipe,
    read_sets=from_paths("cellslide.train.celldetr.data:load_box_sets"),
    set_card=lazy("cellslide.train.data:set_card"),
    module=trained_by("cellslide.train.celldetr.training:CellDETRTraining"),
    load_encoder=lazy("cellslide.train.celldetr.training:load_backbone"),
    load_init=lazy("cellslide.train.celldetr.training:load_init"),
    loaders=lazy("cellslide.train.celldetr.data:loaders"),
    entry=entry,
    flags=(
        click.option("--init", type=PATH, help="Detector to start from, also one of `cellslide pretrain celldetr`."),
        click.option("--encoder-weights", type=PATH, help="Weights of the backbone alone, under any prefix."),
        LABELS,
        *crop_flags("--crop-size", "crop_px", "Edge of the training crops, px."),
    ),
)
