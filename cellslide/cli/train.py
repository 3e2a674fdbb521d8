"""`cellslide train cellvta|nuclass-local|nuclass-global|nuclass-gate DATASET... -o DIR`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli.options import chain
from cellslide.errors import MissingDependencyError

if TYPE_CHECKING:
    from cellslide.train.run import RunOptions

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
PATH = click.Path(exists=True, path_type=Path)
RUN = click.Path(file_okay=False, exists=True, path_type=Path)


def course_options(samples: str) -> Callable[[Any], Any]:
    """Return the options of every training and pretraining: folder, recipe and what wins over it, how it runs.

    samples  what they call theirs, in the help.
    """
    count = click.IntRange(1)
    return chain(
        click.option("-o", "--output", required=True, type=FOLDER, help="Folder of the run."),
        click.option("--recipe", type=FILE, help="YAML recipe; options given win over it."),
        click.option("--batch-size", type=int, help=f"{samples.capitalize()} per step."),
        click.option("--epochs", type=int, help="Epochs of the whole schedule."),
        click.option("--epoch-samples", type=int, help=f"{samples.capitalize()} per epoch."),
        click.option(
            "--max-minutes", type=float, help="End after so many minutes; a cosine schedule reaches its end by then.",
        ),
        click.option("--seed", type=int, help=f"Seed of weights, {samples} and augmentation."),
        click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="Number format of the network."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, mps, cuda or cuda:N."),
        click.option(
            "--workers", default=1, show_default=True, type=click.IntRange(0, 64),
            help=f"Processes that prepare {samples}.",
        ),
        click.option("--max-steps", type=count, help="Stop after this step, schedule unchanged."),
        click.option("--log-every", default=20, show_default=True, type=count, help="Steps between progress lines."),
        click.option("--overwrite", is_flag=True, help="Start over; without it a run goes on from its last epoch."),
    )  # fmt: skip


shared_options = chain(
    click.argument("datasets", nargs=-1, required=True, metavar="DATASET...", type=FOLDER),
    course_options("crops"),
    click.option(
        "--fold", metavar="K/N",
        help="Cross-validate: part K of N, by patient or organ, validates in place of what the recipe says.",
    ),
)  # fmt: skip


@click.group()
def command() -> None:
    """Train a model on labelled data sets: nuclei (cellvta), or their types in three stages (nuclass-...).

    \b
    Examples:
      cellslide train cellvta data/tnbc data/mine --recipe recipe.yaml -o runs/mine
      cellslide train nuclass-local data/typed --recipe local.yaml -o runs/local
      cellslide train nuclass-global data/typed --recipe global.yaml --local runs/local -o runs/global
      cellslide train nuclass-gate data/typed --recipe gate.yaml --local runs/local --global runs/global -o runs/gate
    """


@command.command()
@shared_options
@click.option("--init", type=FILE, help="Weights of the whole model to start from.")
@click.option(
    "--encoder-weights",
    metavar="FILE|ID",
    help="Encoder to start from: a timm network's weights (EfficientNet-Lite too), a ViT's, or an id of the manifest.",
)
@click.option("--mpp", type=float, help="Pixel size that all sets are resampled to, µm per pixel.")
@click.option("--crop-size", "crop_px", type=int, help="Edge of the training crops, px.")
def cellvta(recipe: Path | None, init: Path | None, encoder_weights: str | None, **rest: Any) -> None:  # fmt: skip
    """Train CellVTA (or any model with its branches) on DATASET folders.

    Writes model.safetensors, model.yaml and card.json (best by validation bPQ), last/ (newest), last.ckpt and logs/.
    The same command again goes on from last.ckpt with the same numbers.
    """
    need_lightning()
    from cellslide.train.recipe import load_recipe
    from cellslide.train.run import train

    datasets, options, overrides = _run_options(init, rest)
    train(datasets, load_recipe(recipe, overrides, encoder_weights), options)


@command.command("nuclass-local")
@shared_options
@click.option("--init", type=FILE, help="Local path, or weights of its backbone alone (UNI2-h), to start from.")
def nuclass_local(recipe: Path | None, init: Path | None, **rest: Any) -> None:
    """Train NuClass's local path, which sees the nucleus, on DATASET folders of typed points.

    Writes model.safetensors, model.yaml and card.json (best by the recipe's monitor), last/ (newest), last.ckpt and
    logs/. The same command again goes on from last.ckpt with the same numbers.
    """
    need_lightning()
    from cellslide.train.nuclass_recipe import load_nuclass_recipe
    from cellslide.train.nuclass_run import train_local

    datasets, options, overrides = _run_options(init, rest)
    train_local(datasets, load_nuclass_recipe(recipe, overrides), options)


@command.command("nuclass-global")
@shared_options
@click.option("--local", required=True, type=RUN, help="Folder of the nuclass-local run to begin with.")
@click.option("--init", type=FILE, help="Weights of a nuclass-global run to start from.")
@click.option("--context-init", type=FILE, help="Weights of the context's backbone (DINOv3) to start from.")
def nuclass_global(
    recipe: Path | None, local: Path, init: Path | None, context_init: Path | None, **rest: Any
) -> None:  # fmt: skip
    """Train NuClass's global path, which also sees the surroundings, beside the frozen local path.

    What the recipe does not say is as in the local run. Writes what nuclass-local writes, with both paths.
    """
    need_lightning()
    from cellslide.train.nuclass_recipe import load_nuclass_recipe
    from cellslide.train.nuclass_run import recipe_before, train_global

    datasets, options, overrides = _run_options(init, rest)
    loaded = load_nuclass_recipe(recipe, overrides, recipe_before(local))
    train_global(datasets, loaded, options, local, context_init)


@command.command("nuclass-gate")
@shared_options
@click.option("--local", required=True, type=RUN, help="Folder of the nuclass-local run.")
@click.option("--global", "global_", required=True, type=RUN, help="Folder of the nuclass-global run.")
def nuclass_gate(recipe: Path | None, local: Path, global_: Path, **rest: Any) -> None:
    """Train NuClass's gate between both paths, and write the complete classifier.

    Both paths stay as they are: their features are computed once and kept below the run's folder. What the recipe does
    not say is as in the global run. `cellslide calibrate` comes next.
    """
    need_lightning()
    from cellslide.train.nuclass_recipe import load_nuclass_recipe
    from cellslide.train.nuclass_run import recipe_before, train_gate

    datasets, options, overrides = _run_options(None, rest)
    train_gate(datasets, load_nuclass_recipe(recipe, overrides, recipe_before(global_)), options, local, global_)


@command.command("muse-points")
@shared_options
@click.option("--init", type=PATH, help="Whole detector to start from: a file of weights, or the folder of a run.")
@click.option(
    "--encoder-weights",
    type=PATH,
    help="Backbone to start from: a published MUSE, one of `cellslide pretrain muse`, or another detector's.",
)
@click.option("--mpp", type=float, help="Pixel size that all sets are resampled to, µm per pixel.")
@click.option("--field-size", "field_px", type=int, help="Edge of the fields that the network sees, px.")
def muse_points(recipe: Path | None, init: Path | None, encoder_weights: Path | None, **rest: Any) -> None:
    """Train a point detector (a MUSE backbone and a head after DPA-P2PNet) on DATASET folders.

    Points of the recipe's classes teach place and type, other points and masks (by their centroids) the place alone.
    Writes model.safetensors, model.yaml and card.json (best by mean F1), last/ (newest), last.ckpt and logs/.
    The same command again goes on from last.ckpt with the same numbers.
    """
    need_lightning()
    from cellslide.train.points_recipe import load_points_recipe
    from cellslide.train.points_run import train_points

    datasets, options, overrides = _run_options(init, rest)
    train_points(datasets, load_points_recipe(recipe, overrides, encoder_weights), options)


@command.command("celldetr")
@shared_options
@click.option("--init", type=PATH, help="Detector to start from, also one of `cellslide pretrain celldetr`.")
@click.option("--encoder-weights", type=PATH, help="Weights of the backbone alone, under any prefix.")
@click.option("--mpp", type=float, help="Pixel size that all sets are resampled to, µm per pixel.")
@click.option("--crop-size", "crop_px", type=int, help="Edge of the training crops, px.")
def celldetr(recipe: Path | None, init: Path | None, encoder_weights: Path | None, **rest: Any) -> None:
    """Train CellDETR, which finds nuclei as boxes, on DATASET folders of masks.

    Boxes are those of the masks; points give classes where the recipe names some. Writes model.safetensors, model.yaml
    and card.json (best by the recipe's monitor), last/ (newest), last.ckpt and logs/. The same command again goes on
    from last.ckpt with the same numbers.
    """
    need_lightning()
    from cellslide.train.celldetr_recipe import load_celldetr_recipe
    from cellslide.train.celldetr_run import train_celldetr

    datasets, options, overrides = _run_options(init, rest)
    train_celldetr(datasets, load_celldetr_recipe(recipe, overrides, encoder_weights), options)


def _run_options(init: Path | None, given: dict[str, Any]) -> tuple[tuple[Path, ...], RunOptions, dict[str, Any]]:
    """Return the data sets, what concerns the run alone, and what wins over the recipe."""
    from cellslide.train.run import RunOptions

    names = ("output", "device", "workers", "overwrite", "max_steps", "log_every")
    output, device, workers, overwrite, max_steps, log_every = (given.pop(name) for name in names)
    datasets = given.pop("datasets")
    return datasets, RunOptions(output, device, workers, init, overwrite, max_steps, log_every), given


def need_lightning() -> None:
    """Raise MissingDependencyError where the training extra is not installed."""
    if find_spec("lightning") is None:
        raise MissingDependencyError("training needs lightning: pip install 'cellslide[train]'")
