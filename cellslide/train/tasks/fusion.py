"""`cellslide train fusion` and `cellslide pretrain clip`: genes from H&E tiles and transcripts, and their contrast."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import click

from cellslide.models.registry import lazy
from cellslide.train.fusion.recipe import ClipRecipe, FusionRecipe
from cellslide.train.task import FOLD, FOLDER, PATH, TrainingTask, trained_by


def _read_recipe(kind: type[FusionRecipe], *given: Any) -> FusionRecipe:
    found: FusionRecipe = lazy("cellslide.train.fusion.data:read_recipe")(kind, *given)
    return found


def _task(name: str, command: Literal["train", "pretrain"], recipe: type[FusionRecipe], help: str) -> TrainingTask:
    work = "cellslide.train.fusion"
    return TrainingTask(
        name=name,
        command=command,
        help=help + "\n\nSAMPLES is a table with the columns slide and bundle, and alignment, patient, split (train, "
        "val, test), mpp and organ where they are known. Transcripts are counted once, below the run's folder.",
        recipe=recipe,
        read_recipe=partial(_read_recipe, recipe),
        read_sets=lazy(f"{work}.data:read_sets"),
        seen=lambda options, sets: [],
        set_card=lazy(f"{work}.data:set_card"),
        module=trained_by(f"{work}.training:{'ClipTraining' if recipe.contrast else 'FusionTraining'}"),
        load_encoder=lazy(f"{work}.training:load_encoder"),
        load_init=lazy(f"{work}.training:load_init"),
        loaders=lazy(f"{work}.data:loaders"),
        metavar="SAMPLES...",
        flags=(
            click.option("--init", type=PATH, help="Run of `train fusion` or `pretrain clip` to start from."),
            click.option("--encoder-weights", metavar="FILE|ID", help="Weights of the ViT to start from."),
            click.option("--tokens", type=FOLDER, help="Folder of the counts.  [default: in the run's]"),
            FOLD,
        ),
    )  # fmt: skip


FUSION = _task(
    "fusion",
    "train",
    FusionRecipe,
    "Train a network that predicts genes that were not measured, from H&E tiles and the transcripts of other genes "
    "(early or late fusion), or from one of both.",
)
CLIP = _task(
    "clip",
    "pretrain",
    ClipRecipe,
    "Teach image and transcripts of a tile to be alike and unlike those of other tiles. `train fusion --init` starts "
    "from it.",
)
TASKS = (FUSION, CLIP)
