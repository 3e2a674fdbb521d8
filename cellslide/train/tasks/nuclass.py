"""`cellslide train nuclass-local|nuclass-global|nuclass-gate`: the three stages of NuClass.

Each stage writes the network as far as it goes: the local path; both paths; both paths and the gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from cellslide.models.registry import lazy
from cellslide.train.nuclass.recipe import NuClassRecipe, Stage, load_nuclass_recipe
from cellslide.train.task import FILE, FOLD, LABELS, RUN, FitOptions, Flag, TrainingTask, from_paths

HELP: dict[Stage, str] = {
    "local": "Train NuClass's local path, which sees the nucleus, on DATASET folders of typed points.\n\n"
    "Slides whose nuclei have labels are read too: a folder of tables (`xenium label`), or a .csv list with the "
    "columns cells, slide, patient, organ, split.",
    "global": "Train NuClass's global path, which also sees the surroundings, beside the frozen local path.\n\n"
    "What the recipe does not say is as in the local run.",
    "gate": "Train NuClass's gate between both paths, and write the complete classifier.\n\nBoth paths stay as "
    "they are: their features are computed once and kept below the run's folder. What the recipe does not say is as in "
    "the global run. `cellslide calibrate` comes next.",
}
FLAGS: dict[Stage, tuple[Flag, ...]] = {
    "local": (
        click.option("--init", type=FILE, help="Local path, or weights of its backbone alone (UNI2-h), to start from."),
    ),
    "global": (
        click.option(
            "--local", "local_run", required=True, type=RUN, help="Folder of the nuclass-local run that it begins with."
        ),
        click.option("--init", type=FILE, help="Weights of a nuclass-global run to start from."),
        click.option("--context-init", type=FILE, help="Weights of the context's backbone (DINOv3) to start from."),
    ),
    "gate": (
        click.option("--local", "local_run", required=True, type=RUN, help="Folder of the nuclass-local run."),
        click.option("--global", "global_run", required=True, type=RUN, help="Folder of the nuclass-global run."),
    ),
}
BEFORE: dict[Stage, str] = {"global": "local_run", "gate": "global_run"}


def _read_recipe(stage: Stage, path: Path | None, overrides: Mapping[str, Any], options: FitOptions) -> NuClassRecipe:
    return load_nuclass_recipe(path, overrides, options.extra[BEFORE[stage]] if stage in BEFORE else None)


def _entry(stage: Stage, recipe: NuClassRecipe, metrics: Mapping[str, float]) -> dict[str, Any]:
    crops = {"local": asdict(recipe.local), "context": asdict(recipe.context)}
    return {"config": {**recipe.stage_config(stage), "crops": crops}}


def _task(stage: Stage) -> TrainingTask:
    work = "cellslide.train.nuclass.training"
    return TrainingTask(
        name=f"nuclass-{stage}",
        help=HELP[stage],
        recipe=NuClassRecipe,
        read_recipe=partial(_read_recipe, stage),
        read_sets=from_paths("cellslide.train.nuclass.cells:load_cell_sets"),
        set_card=lazy("cellslide.train.nuclass.cells:cell_set_card"),
        build=lazy(f"{work}:build", stage),
        load_init=lazy(f"{work}:load_path"),
        module=lazy(f"{work}:module", stage),
        loaders=lazy(f"{work}:loaders", stage),
        entry=partial(_entry, stage),
        card={"stage": stage},
        flags=(FOLD, LABELS, *FLAGS[stage]),
    )


LOCAL, GLOBAL, GATE = _task("local"), _task("global"), _task("gate")
TASKS = (LOCAL, GLOBAL, GATE)
