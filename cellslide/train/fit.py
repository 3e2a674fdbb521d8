"""The one runner: from sources and a recipe to a folder with weights, card, logs and a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from cellslide.errors import UsageError
from cellslide.train.callbacks import AveragedWeights, CheckpointCallback, Progress, StopRequest
from cellslide.train.export import ModelWriter, model_writer
from cellslide.train.framework import L, accelerator_of, loggers, precision_of
from cellslide.train.module import Training
from cellslide.train.recipe import Recipe, build
from cellslide.train.task import FitOptions, Run, TrainingTask


def fit(task: TrainingTask, recipe: Any, options: FitOptions, model: nn.Module | None = None) -> Any:
    """Train, or go on from `folder/last.ckpt` if it is there; returns the module with its live weights.

    model  network to train in place of the one that the task builds. Raises UsageError for data or a recipe that do
    not fit, WeightsError for weights to begin with that do not, Interrupted after Ctrl-C or SIGTERM.
    """
    if options.devices < 1 or recipe.batch_size % options.devices:
        raise UsageError(f"--devices {options.devices}: must divide batch_size {recipe.batch_size} of the recipe")
    resume = find_resume_point(options, recipe)
    sets = task.read_sets(options, recipe)
    cards = [task.set_card(s, recipe) for s in sets]
    for card in cards:
        print(f"data {describe_set(card)}", flush=True)
    run = Run(recipe, options, sets, resume.first_epoch)
    torch.manual_seed(recipe.seed)
    model = task.build(recipe, options) if model is None else model
    if resume.checkpoint is None:
        if recipe.encoder is not None:
            task.load_encoder(model, recipe.encoder[0])
        if options.init is not None:
            task.load_init(model, options.init)
    module = task.module(run, model)
    write = model_writer(task, run, cards)
    run_trainer(module, task.loaders(run, model), options, resume, write)
    return module


def describe_set(card: Mapping[str, Any]) -> str:
    """Return the line of a data set: its name and numbers, without the names of its images."""
    shown = {k: v for k, v in card.items() if k not in ("name", "licences", "val_images")}
    return f"{card['name']}: " + "; ".join(f"{key} {_numbers(value)}" for key, value in shown.items())


def _numbers(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_numbers(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run begins: the checkpoint to go on from, or None, and the epochs done in it."""

    checkpoint: Path | None = None
    first_epoch: int = 0


def find_resume_point(options: FitOptions, recipe: Recipe) -> ResumePoint:
    """Return the checkpoint to go on from and the epochs done in it; raises UsageError if the recipe is another one."""
    path = options.folder / "last.ckpt"
    if options.fresh or not path.is_file():
        return ResumePoint()
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    before, now = _filled_up(stored["cellslide"]["recipe"], recipe), recipe.as_dict()
    changed = sorted(key for key in now if before.get(key) != now[key] and key not in ("epochs", "max_minutes"))
    if changed:
        raise UsageError(f"{path} was made with another recipe ({', '.join(changed)}); use --overwrite or another -o")
    return ResumePoint(path, stored["global_step"] // recipe.epoch_steps)


def _filled_up(stored: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return a stored recipe with the defaults of keys that came later; as it is if it cannot be read any more."""
    try:
        return build(type(recipe), stored).as_dict()
    except UsageError:
        return stored


def run_trainer(
    module: Training, loaders: tuple[Any, Any], options: FitOptions, resume: ResumePoint, write: ModelWriter
) -> None:
    """Run `module` over (training, validation) loaders, writing to the run's folder; raises Interrupted on a signal."""
    options.folder.mkdir(parents=True, exist_ok=True)
    resolved = yaml.safe_dump(module.recipe.as_dict(), sort_keys=False)
    (options.folder / "recipe.yaml").write_text(resolved, encoding="utf-8")
    stop = StopRequest(options.max_steps)
    trainer = make_trainer(module.recipe, options, write, stop, resume.first_epoch)
    # Lightning leaves modes as they are; `train` of a module decides which of its parts stay in evaluation mode.
    module.train()
    with _signals(stop):
        trainer.fit(module, *loaders, ckpt_path=resume.checkpoint, weights_only=True)


def make_trainer(
    recipe: Recipe, options: FitOptions, write: ModelWriter, stop: StopRequest, first_epoch: int = 0
) -> L.Trainer:
    """Return the Lightning trainer; callbacks run in the order given, so the average is updated before it is kept."""
    average = AveragedWeights(recipe.optim.ema) if recipe.optim.ema > 0 else None
    checkpoints = CheckpointCallback(options.folder, write, average, recipe.monitor)
    accelerator, devices = accelerator_of(options.device)
    several = options.devices > 1
    return L.Trainer(
        accelerator=accelerator,
        devices=options.devices if several else devices,
        strategy="ddp_find_unused_parameters_true" if several else "auto",
        sync_batchnorm=several and accelerator == "cuda",
        precision=precision_of(recipe, accelerator),
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.optim.grad_clip or None,
        callbacks=[c for c in (average, Progress(options.log_every), checkpoints, stop) if c is not None],
        logger=loggers(options.folder, first_epoch),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


@contextmanager
def _signals(stop: StopRequest) -> Iterator[None]:
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
