"""What a training is made of: one record each, from which the commands and the runner are built. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cellslide.models.registry import build_model, lazy
from cellslide.train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cellslide.train.module import Training

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
PATH = click.Path(exists=True, path_type=Path)
RUN = click.Path(file_okay=False, exists=True, path_type=Path)

Flag = Callable[[Any], Any]
FOLD = click.option(
    "--fold",
    metavar="K/N",
    help="Cross-validate: part K of N, by patient or organ, validates in place of what the recipe says.",
)

LABELS = click.option(
    "--labels", type=FILE, help="Labels of a slide's nuclei, cell_id,label, in place of those in its table."
)


def crop_flags(size: str, key: str, help: str) -> tuple[Flag, ...]:
    """Return the flags of trainings that draw crops of one pixel size; `size` is the flag of the recipe's `key`."""
    mpp = click.option("--mpp", type=float, help="Pixel size that all sets are resampled to, µm per pixel.")
    return FOLD, mpp, click.option(size, key, type=int, help=help)


def from_paths(place: str) -> Callable[[FitOptions, Any], Sequence[Any]]:
    """Return `read_sets` of a task whose sources are folders: the function `module:name` of them and a recipe."""
    read = lazy(place)
    return lambda options, recipe: read([Path(source) for source in options.sources], recipe)


@dataclass(frozen=True, slots=True)
class FitOptions:
    """What does not belong to the recipe: what is read, where the run writes, on what it runs, and how far.

    init       weights to start from.
    fresh      start over although a checkpoint is there.
    max_steps  end the run early without changing its schedule.
    devices    train on so many at once (DDP), for trainings whose loaders know of it.
    extra      values of the task's own flags, by name.
    """

    folder: Path
    sources: Sequence[Path | str] = ()
    device: str = "auto"
    workers: int = 1
    init: Path | None = None
    fresh: bool = False
    max_steps: int | None = None
    log_every: int = 20
    devices: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """A run as far as it is known before its network: `first_epoch` counts the epochs done before it."""

    recipe: Any
    options: FitOptions
    sets: Sequence[Any]
    first_epoch: int = 0


def build_recipe(recipe: Recipe) -> nn.Module:
    """Return the network of a recipe, weights untrained; raises UsageError or WeightsError if it cannot be."""
    network = recipe.network()
    return build_model(network["arch"], network["config"])


def trained_by(place: str) -> Callable[[Run, Any], Training]:
    """Return `module` of a task: the class `module:name`, made of a recipe and a network."""
    make = lazy(place)
    return lambda run, model: make(run.recipe, model)


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """One training.

    name, command, help   `cellslide COMMAND NAME`; `flags` are its own: one that is named as a key of the recipe wins
                          over it, another is an option.
    recipe                class of its recipe; `read_recipe(path, overrides, options)` reads it, where more than the
                          file decides.
    read_sets             options and recipe -> the data sets, each with `name`.
    set_card              data set and recipe -> what a card says of it; printed when the run begins.
    seen                  options and data sets -> name and folder of those that are learned from.
    module                run and network -> what trains it.
    build                 recipe and options -> the network, where the recipe's `network` is not enough.
    load_encoder          fills the encoder of a network with the recipe's weights (a file, or an id of the manifest).
    load_init             fills a network with the weights of `--init`; neither is called where a run goes on.
    loaders               run and network -> loaders of training and of validation.
    entry                 recipe and scores -> keys of the manifest entry beside those of the recipe's `network`.
    card                  recipe -> what else the card says.
    weights               the tensors to write, of those of the module's `model`.
    metavar               what its sources are called where they are no data sets.
    write_more            writes other files than those of every training into a folder, from the module's tensors.
    """

    name: str
    help: str
    recipe: type[Recipe]
    read_sets: Callable[[FitOptions, Any], Sequence[Any]]
    set_card: Callable[[Any, Any], dict[str, Any]]
    module: Callable[[Run, Any], Training]
    build: Callable[[Any, FitOptions], nn.Module] = lambda recipe, options: build_recipe(recipe)
    load_encoder: Callable[[Any, str], None] = lazy("cellslide.train.export:load_start")
    load_init: Callable[[Any, Path], None] = lazy("cellslide.train.export:load_start")
    loaders: Callable[[Run, Any], tuple[Any, Any]] = lambda run, model: (None, None)
    seen: Callable[[FitOptions, Sequence[Any]], list[tuple[str, Path]]] = lambda options, sets: [
        (s.name, s.path) for s in sets if s.trains
    ]
    entry: Callable[[Any, Mapping[str, float]], dict[str, Any]] = lambda recipe, metrics: {}
    card: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda state: state
    write_more: Callable[[Path, Mapping[str, Tensor]], None] = lambda folder, state: None
    read_recipe: Callable[[Path | None, Mapping[str, Any], FitOptions], Recipe] | None = None
    flags: tuple[Flag, ...] = ()
    command: Literal["train", "pretrain"] = "train"
    metavar: str = ""

    def load_recipe(self, path: Path | None, overrides: Mapping[str, Any], options: FitOptions) -> Recipe:
        """Read the recipe of a run; raises UsageError for an unknown key or a value of the wrong kind."""
        if self.read_recipe is not None:
            return self.read_recipe(path, overrides, options)
        return load_recipe(self.recipe, path, overrides)


TASKS: dict[str, TrainingTask] = {}


def register(task: TrainingTask) -> None:
    """Add a training; raises ValueError if its command has one of this name."""
    key = f"{task.command} {task.name}"
    if key in TASKS:
        raise ValueError(f"training {key}: registered already")
    TASKS[key] = task
