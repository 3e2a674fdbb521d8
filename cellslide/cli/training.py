"""The commands of `train` and `pretrain`, built from the registry of trainings."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from cellslide.cli import grouped
from cellslide.cli.options import chain
from cellslide.errors import MissingDependencyError
from cellslide.train.task import FILE, FOLDER, FitOptions, TrainingTask
from cellslide.train.tasks import tasks_of

# What a command reads, and what its samples are called in the help.
SOURCES = {"train": ("DATASET...", "crops"), "pretrain": ("SLIDES_OR_TILES...", "samples")}
# Flags of keys inside a topic of the recipe.
RECIPE_KEYS = {"encoder_weights": "model.encoder_weights", "labels": "labels.file"}
ENDING = (
    "Writes model.safetensors, model.yaml and card.json (best by the recipe's monitor), last/ (newest), last.ckpt and "
    "logs/. The same command again goes on from last.ckpt with the same numbers."
)


class TrainingGroup(grouped.Group):
    """A group whose commands are the trainings of its name, `train` or `pretrain`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the registry."""
        return list(tasks_of(self.name or ""))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a training, or None if there is no such name."""
        task = tasks_of(self.name or "").get(cmd_name)
        return None if task is None else command_of(task)


def command_of(task: TrainingTask) -> click.Command:
    """Return the command of a training."""
    metavar, samples = SOURCES[task.command]
    kind: Any = click.Path(path_type=Path) if task.command == "train" else str
    sources = click.argument("sources", nargs=-1, required=True, metavar=task.metavar or metavar, type=kind)

    @chain(sources, *run_flags(samples), *task.flags)
    def run(recipe: Path | None, **given: Any) -> None:
        if find_spec("lightning") is None:
            raise MissingDependencyError("training needs lightning: pip install 'cellslide[train]'")
        from cellslide.train.fit import fit

        options, overrides = sort_flags(task, given)
        fit(task, task.load_recipe(recipe, overrides, options), options)

    return grouped.define(task.name, help=f"{task.help}\n\n{ENDING}")(run)


def run_flags(samples: str) -> list[Any]:
    """Return the flags of every training: folder, recipe and what wins over it, how it runs.

    samples  what they call theirs, in the help.
    """
    count = click.IntRange(1)
    return [
        click.option("-o", "--output", "folder", required=True, type=FOLDER, help="Folder of the run."),
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
        click.option(
            "--overwrite", "fresh", is_flag=True, help="Start over; without it a run goes on from its last epoch."
        ),
    ]  # fmt: skip


def sort_flags(task: TrainingTask, given: dict[str, Any]) -> tuple[FitOptions, dict[str, Any]]:
    """Return what concerns the run alone, and what wins over the recipe: the flags that are named as its keys."""
    of_recipe = {f.name for f in fields(task.recipe)} | RECIPE_KEYS.keys()  # type: ignore[arg-type]
    overrides = {RECIPE_KEYS.get(name, name): given.pop(name) for name in list(given) if name in of_recipe}
    known = {f.name for f in fields(FitOptions)}
    options = {name: value for name, value in given.items() if name in known}
    return FitOptions(**options, extra={k: v for k, v in given.items() if k not in known}), overrides
