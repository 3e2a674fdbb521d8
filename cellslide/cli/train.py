"""`cellslide train cellvta DATASET... -o DIR`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from cellslide.errors import MissingDependencyError


@click.group()
def command() -> None:
    """Train a segmentation model on labelled data sets.

    \b
    Example:
      cellslide train cellvta data/tnbc data/mine --recipe recipe.yaml -o runs/mine
    """


@command.command()
@click.argument(
    "datasets", nargs=-1, required=True, metavar="DATASET...", type=click.Path(file_okay=False, path_type=Path)
)
@click.option(
    "-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of the run."
)
@click.option(
    "--recipe", type=click.Path(dir_okay=False, path_type=Path), help="YAML recipe; options given win over it."
)
@click.option(
    "--init", type=click.Path(dir_okay=False, path_type=Path), help="Weights of the whole model to start from."
)
@click.option("--mpp", type=float, help="Pixel size that all sets are resampled to, µm per pixel.")
@click.option("--crop-size", "crop_px", type=int, help="Edge of the training crops, px.")
@click.option("--batch-size", type=int, help="Crops per step.")
@click.option("--epochs", type=int, help="Epochs of the whole schedule.")
@click.option("--epoch-samples", type=int, help="Crops per epoch.")
@click.option(
    "--max-minutes", type=float, help="End after this many minutes; a cosine schedule reaches its end by then."
)
@click.option("--seed", type=int, help="Seed of weights, crops and augmentation.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="Number format of the forward pass.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, mps, cuda or cuda:N.")
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(0, 64), help="Processes that prepare crops."
)
@click.option("--max-steps", type=click.IntRange(1), help="Stop after this step, schedule unchanged.")
@click.option(
    "--log-every", default=20, show_default=True, type=click.IntRange(1), help="Steps between progress lines."
)
@click.option("--overwrite", is_flag=True, help="Start over; without it a run goes on from its last epoch.")
def cellvta(
    datasets: tuple[Path, ...], output: Path, recipe: Path | None, init: Path | None, device: str, workers: int,
    max_steps: int | None, log_every: int, overwrite: bool, **overrides: object,
) -> None:  # fmt: skip
    """Train CellVTA (or any model with its branches) on DATASET folders.

    Writes model.safetensors, model.yaml and card.json (best by validation bPQ), last/ (newest), last.ckpt and logs/.
    The same command again goes on from last.ckpt with the same numbers.
    """
    if find_spec("lightning") is None:
        raise MissingDependencyError("training needs lightning: pip install 'cellslide[train]'")
    from cellslide.train.recipe import load_recipe
    from cellslide.train.run import RunOptions, train

    loaded = load_recipe(recipe, overrides)
    train(datasets, loaded, RunOptions(output, device, workers, init, overwrite, max_steps, log_every))
