"""`cellslide pretrain muse|celldetr SLIDES_OR_TILES... -o DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellslide.cli.options import chain
from cellslide.cli.train import FOLDER, PATH, course_options, need_lightning

shared_options = chain(
    click.argument("sources", nargs=-1, required=True, metavar="SLIDES_OR_TILES..."),
    course_options("samples"),
    click.option(
        "--nuclei", type=FOLDER, help="Folder that `cellslide segment` wrote for the slides.  [default: the one given]"
    ),
    click.option("--mpp", type=click.FloatRange(0.05, 2.0), help="Pixel size of the slides, µm, over what they say."),
    click.option("--init", type=PATH, help="Weights to start from: of an earlier run, or published."),
    click.option(
        "--devices", default=1, show_default=True, type=click.IntRange(1),
        help="Train on so many at once (DDP), which share a batch.",
    ),
    click.option("--stop-on-collapse", is_flag=True, help="End with an error where the run learns nothing any more."),
)  # fmt: skip


@click.group()
def command() -> None:
    """Learn from slides or tiles without labels, given where the nuclei are: MUSE, or CellDETR's contrastive variant.

    SLIDES_OR_TILES are slides whose nuclei `cellslide segment` found, its output folders, or data sets with masks or
    points, of which only the places count.

    \b
    Examples:
      cellslide segment slides/ -o out
      cellslide pretrain muse out -o runs/muse --recipe muse.yaml
      cellslide pretrain muse slides/*.svs data/tnbc --nuclei out -o runs/muse --devices 4
      cellslide pretrain celldetr out --recipe contrastive.yaml -o runs/contrastive --stop-on-collapse
    """


@command.command()
@shared_options
def muse(**given: Any) -> None:
    """Pretrain a MUSE backbone by self-distillation of images and of their nuclei.

    Writes model.safetensors, model.yaml and card.json (the teacher's backbone), teacher.pth (the whole teacher, as
    published), last.ckpt and logs/. The same command again goes on from last.ckpt with the same numbers.
    """
    need_lightning()
    from cellslide.train.pretrain.muse import pretrain_muse
    from cellslide.train.pretrain.recipe import load_muse_recipe

    sources, options, stop, recipe, overrides = _run_options(given)
    pretrain_muse(sources, load_muse_recipe(recipe, overrides), options, stop)


@command.command()
@shared_options
def celldetr(**given: Any) -> None:
    """Pretrain a CellDETR by telling each nucleus, its box shifted and scaled, from the others of its crop.

    Writes model.safetensors, model.yaml and card.json for `train celldetr --init`, last.ckpt and logs/. The same
    command again goes on from last.ckpt with the same numbers.
    """
    need_lightning()
    from cellslide.train.pretrain.celldetr import pretrain_celldetr
    from cellslide.train.pretrain.recipe import load_celldetr_recipe

    sources, options, stop, recipe, overrides = _run_options(given)
    pretrain_celldetr(sources, load_celldetr_recipe(recipe, overrides), options, stop)


def _run_options(given: dict[str, Any]) -> tuple[Any, Any, bool, Path | None, dict[str, Any]]:
    """Return the sources, what concerns the run alone, whether to stop, the recipe and what wins over it."""
    from cellslide.train.pretrain.fields import Sources
    from cellslide.train.run import RunOptions

    sources = Sources(given.pop("sources"), given.pop("nuclei"), given.pop("mpp"))
    names = ("output", "device", "workers", "init", "overwrite", "max_steps", "log_every", "devices")
    options = RunOptions(*(given.pop(name) for name in names))
    return sources, options, given.pop("stop_on_collapse"), given.pop("recipe"), given
