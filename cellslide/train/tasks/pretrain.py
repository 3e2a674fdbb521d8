"""`cellslide pretrain muse|celldetr`: learning without labels, from slides or tiles and the places of their nuclei."""

from __future__ import annotations

import click

from cellslide.models.registry import lazy
from cellslide.train.pretrain.recipe import CellDETRPretrainRecipe, MuseRecipe
from cellslide.train.recipe import Recipe
from cellslide.train.task import FOLDER, PATH, TrainingTask

FLAGS = (
    click.option(
        "--nuclei", type=FOLDER, help="Folder that `cellslide segment` wrote for the slides.  [default: the one given]"
    ),
    click.option(
        "--mpp", "slide_mpp", type=click.FloatRange(0.05, 2.0), help="Pixel size of the slides, µm, over what they say."
    ),
    click.option("--init", type=PATH, help="Weights to start from: of an earlier run, or published."),
    click.option(
        "--devices", default=1, show_default=True, type=click.IntRange(1),
        help="Train on so many at once (DDP), which share a batch.",
    ),
    click.option("--stop-on-collapse", is_flag=True, help="End with an error where the run learns nothing any more."),
)  # fmt: skip


def _task(name: str, recipe: type[Recipe], help: str, work: str, **own: object) -> TrainingTask:
    return TrainingTask(
        name=name,
        help=help,
        recipe=recipe,
        read_sets=lazy("cellslide.train.pretrain.fields:read_sources"),
        seen=lazy("cellslide.train.pretrain.fields:named_datasets"),
        set_card=lazy("cellslide.train.pretrain.fields:field_set_card"),
        module=lazy(work),
        entry=lambda recipe, metrics: {"metrics": {}},
        flags=FLAGS,
        command="pretrain",
        **own,  # type: ignore[arg-type]
    )


MUSE = _task(
    "muse",
    MuseRecipe,
    "Pretrain a MUSE backbone by self-distillation of images and of their nuclei.\n\nWrites the teacher's backbone, "
    "and teacher.pth, the whole teacher as published.",
    "cellslide.train.pretrain.muse:MuseTraining",
    load_init=lazy("cellslide.train.pretrain.muse:load_init"),
    weights=lazy("cellslide.train.pretrain.muse:backbone_of"),
    write_more=lazy("cellslide.train.pretrain.muse:write_teacher"),
)
CELLDETR = _task(
    "celldetr",
    CellDETRPretrainRecipe,
    "Pretrain a CellDETR to tell each nucleus, its box shifted and scaled, from the others of its crop.\n\n"
    "`train celldetr --init` starts from what it writes.",
    "cellslide.train.pretrain.celldetr:CellDETRPretraining",
    load_init=lazy("cellslide.train.celldetr.training:load_init"),
)
TASKS = (MUSE, CELLDETR)
