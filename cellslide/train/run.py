"""One training run, from data sets and a recipe to a folder with weights, card, logs and a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from cellslide.errors import MissingDependencyError, UsageError
from cellslide.inference.device import cpu_computes_bf16
from cellslide.train.callbacks import AveragedWeights, Keeper, Progress, StopRequest
from cellslide.train.cellvta import CellVTATraining, load_encoder, load_start
from cellslide.train.data import TrainImage, TrainSet, load_sets, train_loader
from cellslide.train.export import ModelWriter, class_specs, drawn_from, model_writer, trained_entry, used
from cellslide.train.framework import CSVLogger, L, Logger, TensorBoardLogger
from cellslide.train.loaders import whole_loader
from cellslide.train.module import Course, Training
from cellslide.train.recipe import Recipe
from cellslide.types import HoverDecode
from cellslide.weights.manifest import WeightsEntry


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What does not belong to the recipe: where the run writes, on what it runs, and how far.

    max_steps ends the run early without changing its schedule; fresh starts over although a checkpoint is there.
    devices over 1 trains on so many at once (DDP), for trainings whose loaders know of it.
    """

    folder: Path
    device: str = "auto"
    workers: int = 1
    init: Path | None = None
    fresh: bool = False
    max_steps: int | None = None
    log_every: int = 20
    devices: int = 1


def train(
    paths: Sequence[Path], recipe: Recipe, options: RunOptions, model: nn.Module | None = None
) -> CellVTATraining:
    """Train, or go on from `folder/last.ckpt` if it is there; returns the module with its live weights.

    Raises UsageError for data or a recipe that do not fit, Interrupted after Ctrl-C or SIGTERM.
    """
    start = find_start(options, recipe)
    sets = load_sets(paths, recipe)
    _say_sets(sets)
    torch.manual_seed(recipe.seed)
    if model is None:
        from cellslide.models import build_model

        model = build_model(recipe.model.arch, recipe.model.config)
    if recipe.model.encoder_weights is not None:
        load_encoder(model, recipe.model.encoder_weights)
    if options.init is not None and start.checkpoint is None:
        load_start(model, options.init)
    module = CellVTATraining(recipe, model)
    validated = whole_loader([item for s in sets for item in s.val])
    loaders = train_loader(sets, recipe, options.workers, start.first_epoch), validated
    outcome = Outcome(writer(recipe, sets), "val/bpq", recipe.optim.ema, recipe.optim.grad_clip)
    fit(module, loaders, options, start, outcome)
    return module


def writer(recipe: Recipe, sets: Sequence[TrainSet]) -> ModelWriter:
    """Return what writes a segmentation model's weights, its manifest entry and its card."""

    def told(images: Sequence[TrainImage]) -> dict[str, int]:
        nuclei = sum(len(np.unique(item.labels[item.labels > 0])) for item in images)
        return {"images": len(images), "nuclei": nuclei}

    return model_writer(recipe, [used(s, told) for s in sets], lambda metrics: entry_of(recipe, sets, metrics))


def entry_of(recipe: Recipe, sets: Sequence[TrainSet], metrics: Mapping[str, float]) -> WeightsEntry:
    """Return the entry of `weights_manifest.yaml` for these weights, without what their file tells."""
    model = recipe.model
    return replace(
        trained_entry(recipe, "segment", model.arch, model, drawn_from(sets), metrics),
        config=model.config,
        tile_px=512,
        classes=class_specs(model.classes),
        decode=HoverDecode(**asdict(recipe.decode)),
        citation="CellVTA, Yang et al. 2025 (architecture); weights trained from scratch with cellslide",
    )


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: the checkpoint to go on from, or None, and the epochs done in it."""

    checkpoint: Path | None = None
    first_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How weights are averaged, bounded in their gradient, chosen by a validation score, and written."""

    write: ModelWriter
    monitor: str
    ema: float
    grad_clip: float


def fit(module: Training, loaders: tuple[Any, Any], options: RunOptions, start: Start, outcome: Outcome) -> None:
    """Run `module` over (training, validation) loaders, writing to the run's folder; raises Interrupted on a signal."""
    options.folder.mkdir(parents=True, exist_ok=True)
    resolved = yaml.safe_dump(module.course.as_dict(), sort_keys=False)
    (options.folder / "recipe.yaml").write_text(resolved, encoding="utf-8")
    stop = StopRequest(options.max_steps)
    trainer = make_trainer(module.course, options, outcome, stop, start.first_epoch)
    with _signals(stop):
        trainer.fit(module, *loaders, ckpt_path=start.checkpoint, weights_only=True)


def make_trainer(
    course: Course, options: RunOptions, outcome: Outcome, stop: StopRequest, first_epoch: int = 0
) -> L.Trainer:
    """Return the Lightning trainer; callbacks run in the order given, so the average is updated before it is kept."""
    average = AveragedWeights(outcome.ema) if outcome.ema > 0 else None
    keeper = Keeper(options.folder, outcome.write, average, outcome.monitor)
    accelerator, devices = accelerator_of(options.device)
    several = options.devices > 1
    return L.Trainer(
        accelerator=accelerator,
        devices=options.devices if several else devices,
        strategy="ddp_find_unused_parameters_true" if several else "auto",
        sync_batchnorm=several and accelerator == "cuda",
        precision=precision_of(course, accelerator),
        max_epochs=course.epochs,
        gradient_clip_val=outcome.grad_clip or None,
        callbacks=[c for c in (average, Progress(options.log_every), keeper, stop) if c is not None],
        logger=loggers(options.folder, first_epoch),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def accelerator_of(device: str) -> tuple[str, int | list[int]]:
    """Return Lightning's accelerator and devices for auto, cpu, mps, cuda or cuda:N; raises if it is not there."""
    name, _, index = device.partition(":")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name not in ("cpu", "mps", "cuda") or (index and not (name == "cuda" and index.isdigit())):
        raise UsageError(f"--device {device}: must be auto, cpu, mps, cuda or cuda:N")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[name]:
        raise MissingDependencyError(f"--device {device}: this device is not there; use --device cpu")
    return name, [int(index)] if index else 1


def precision_of(recipe: Course, accelerator: str) -> str:
    """Return Lightning's precision; auto is bf16 where the device computes it, which on a CPU needs AVX512-BF16."""
    if recipe.precision == "fp32":
        return "32-true"
    if recipe.precision == "bf16":
        return "bf16-mixed"
    quick = torch.cuda.is_bf16_supported() if accelerator == "cuda" else accelerator == "cpu" and cpu_computes_bf16()
    return "bf16-mixed" if quick else "32-true"


def loggers(folder: Path, first_epoch: int) -> list[Logger]:
    """Return a CSV logger, and a TensorBoard logger where it is installed.

    A resumed run writes a CSV file of its own, since Lightning deletes the one that it finds.
    """
    found: list[Logger] = [CSVLogger(folder, name="logs", version=f"csv_from_epoch_{first_epoch:04d}")]
    with suppress(ModuleNotFoundError):
        found.append(TensorBoardLogger(folder, name="logs", version="tensorboard"))
    return found


def find_start(options: RunOptions, recipe: Course) -> Start:
    """Return the checkpoint to go on from and the epochs done in it; raises UsageError if the recipe is another one."""
    path = options.folder / "last.ckpt"
    if options.fresh or not path.is_file():
        return Start()
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    before = stored["cellslide"]["recipe"]
    now = recipe.as_dict()
    changed = sorted(key for key in now if before.get(key) != now[key] and key not in ("epochs", "max_minutes"))
    if changed:
        raise UsageError(f"{path} was made with another recipe ({', '.join(changed)}); use --overwrite or another -o")
    return Start(path, stored["global_step"] // recipe.epoch_steps)


def _say_sets(sets: Sequence[TrainSet]) -> None:
    for s in sets:
        mpp = sorted(item.mpp for item in (*s.train, *s.val))
        spread = f"{mpp[0]:.3f}..{mpp[-1]:.3f}" if mpp else "-"
        counts = f"{len(s.train)} train, {len(s.val)} val"
        print(f"data {s.name}: {counts}, weight {s.weight:g}, source {spread} um/px", flush=True)


@contextmanager
def _signals(stop: StopRequest) -> Iterator[None]:
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
