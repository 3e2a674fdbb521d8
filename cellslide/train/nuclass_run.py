"""The three stages of NuClass, each from data sets and a recipe to a folder with weights, card, logs and a checkpoint.

Each stage writes the network as far as it goes: the local path; both paths; both paths and the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellslide.errors import UsageError
from cellslide.models import build_model
from cellslide.models.backbones import to_timm
from cellslide.models.checkpoint import check_fit
from cellslide.models.nuclass import NuClass
from cellslide.train.cell_data import CellImage, CellSet, cell_loader, class_counts, exact_loader, load_cell_sets
from cellslide.train.export import WEIGHTS, ModelWriter, class_specs, licences, model_writer, read_state, trained_entry
from cellslide.train.features import feature_loaders, kept_features
from cellslide.train.nuclass import GateTraining, PathStage, PathTraining
from cellslide.train.nuclass_losses import effective_number_weights
from cellslide.train.nuclass_recipe import NuClassRecipe, Stage, load_nuclass_recipe
from cellslide.train.run import Outcome, RunOptions, accelerator_of, find_start, fit
from cellslide.weights.manifest import WeightsEntry


def train_local(paths: Sequence[Path], recipe: NuClassRecipe, options: RunOptions) -> PathTraining:
    """Train the local path; `options.init` is a local path to start from, or weights of its backbone alone.

    Raises UsageError for data or a recipe that do not fit, WeightsError for weights that do not.
    """
    return _train_path(paths, recipe, options, "local", None, None)


def train_global(
    paths: Sequence[Path], recipe: NuClassRecipe, options: RunOptions, local: Path, context_init: Path | None = None
) -> PathTraining:
    """Train the global path beside the frozen local path of the run `local`, whose backbone it begins with.

    context_init  weights of the context's backbone; `options.init` a global path to start from. Raises as above.
    """
    return _train_path(paths, recipe, options, "global", local, context_init)


def _train_path(
    paths: Sequence[Path],
    recipe: NuClassRecipe,
    options: RunOptions,
    stage: PathStage,
    local: Path | None,
    context_init: Path | None,
) -> PathTraining:
    start = find_start(options, recipe)
    sets = load_cell_sets(paths, recipe)
    _say_sets(sets, recipe)
    torch.manual_seed(recipe.seed)
    model = build_stage(recipe, stage)
    if start.checkpoint is None:
        if local is not None:
            begin_with_local(model, local, recipe)
        if context_init is not None:
            _load(model.context_backbone, to_timm(read_state(context_init), model.context_backbone), context_init)
        if options.init is not None:
            load_path(model, options.init)
    counts = class_counts(sets, len(recipe.classes))
    weight = effective_number_weights(counts, recipe.loss.effective_beta)
    module = PathTraining(recipe, model, stage, weight)
    train, val = images_of(sets)
    wide = stage == "global"
    loaders = cell_loader(train, recipe, wide, options.workers, start.first_epoch), exact_loader(val, recipe, wide)
    fit(module, loaders, options, start, outcome_of(recipe, sets, stage))
    return module


def train_gate(
    paths: Sequence[Path], recipe: NuClassRecipe, options: RunOptions, local: Path, global_: Path
) -> GateTraining:
    """Train the gate between the paths of the runs `local` and `global_`, and write the complete classifier.

    The features of the frozen paths are kept in the run's folder. Raises as above.
    """
    start = find_start(options, recipe)
    sets = load_cell_sets(paths, recipe)
    _say_sets(sets, recipe)
    torch.manual_seed(recipe.seed)
    model = build_stage(recipe, "gate")
    load_paths(model, local, global_)
    name, device = accelerator_of(options.device)
    model.to(torch.device(f"{name}:{device[0]}" if isinstance(device, list) else name))
    folder, (train, val) = options.folder / "features", images_of(sets)
    kept = [kept_features(folder, n, model, i, recipe, options.workers) for n, i in (("train", train), ("val", val))]
    module = GateTraining(recipe, model)
    loaders = feature_loaders(kept[0], kept[1], recipe, start.first_epoch)
    fit(module, loaders, options, start, outcome_of(recipe, sets, "gate"))
    return module


def build_stage(recipe: NuClassRecipe, stage: Stage) -> NuClass:
    """Return the network as far as a stage needs it, weights untrained; raises WeightsError for a config that fails."""
    sizes = {"num_classes": len(recipe.classes), "num_organs": len(recipe.organs)}
    model = build_model("nuclass", {**stage_config(recipe, stage), **sizes})
    assert isinstance(model, NuClass)
    return model


def stage_config(recipe: NuClassRecipe, stage: Stage) -> dict[str, Any]:
    """Return the network's configuration in a stage; classes and organs are counted by who lists them."""
    missing: dict[str, Any] = {"context": None} if stage == "local" else {"gate": False} if stage == "global" else {}
    return {**recipe.model, **missing}


def recipe_before(run: Path) -> NuClassRecipe:
    """Return the recipe of an earlier stage's run; raises UsageError if there is none."""
    path = run / "recipe.yaml"
    if not path.is_file():
        raise UsageError(f"{run}: not the folder of a training run, recipe.yaml is missing")
    return load_nuclass_recipe(path)


def begin_with_local(model: NuClass, run: Path, recipe: NuClassRecipe) -> None:
    """Fill the local path from its run, and what the global path takes over from it (section 3.2)."""
    _load(model.modelA, _prefixed(read_state(run / WEIGHTS), "modelA."), run / WEIGHTS)
    theirs = model.local_backbone.state_dict()
    if not model.shares_backbone:
        model.global_backbone.load_state_dict(theirs)
    if recipe.context_training.start_from_local:
        _load(model.context_backbone, theirs, run / WEIGHTS)


def load_path(model: NuClass, path: Path) -> None:
    """Fill a network from one of the same stage (a file or a run's folder), or its crop backbone from a file of one."""
    state = read_state(path)
    if any(name.startswith("modelA.") for name in state):
        _load(model, state, path)
    else:
        _load(model.local_backbone, to_timm(state, model.local_backbone), path)


def load_paths(model: NuClass, local: Path, global_: Path) -> None:
    """Fill both paths; raises UsageError where the global path was trained beside another local one."""
    state, beside = read_state(local / WEIGHTS), read_state(global_ / WEIGHTS)
    own, other = _prefixed(state, "modelA."), _prefixed(beside, "modelA.")
    if own.keys() != other.keys() or any(not torch.equal(own[name], other[name]) for name in own):
        raise UsageError(f"--global {global_}: was trained beside another local path than --local {local}")
    assert model.modelB is not None
    _load(model.modelA, own, local / WEIGHTS)
    _load(model.modelB, _prefixed(beside, "modelB."), global_ / WEIGHTS)


def _prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _load(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    check_fit(module.state_dict(), state, f"{path}: does not fit")
    module.load_state_dict(dict(state))


def images_of(sets: Sequence[CellSet]) -> tuple[list[CellImage], list[CellImage]]:
    """Return the images of all sets that train and those that validate, without those that show no cell."""
    train = [image for s in sets for image in s.train if len(image)]
    return train, [image for s in sets for image in s.val if len(image)]


def outcome_of(recipe: NuClassRecipe, sets: Sequence[CellSet], stage: Stage) -> Outcome:
    """Return how a stage's weights are averaged, chosen and written."""
    return Outcome(writer(recipe, sets, stage), recipe.monitor, recipe.optim.ema, recipe.optim.grad_clip)


def writer(recipe: NuClassRecipe, sets: Sequence[CellSet], stage: Stage) -> ModelWriter:
    """Return what writes a classifier's weights, its manifest entry and its card."""
    data = [_used(s, recipe) for s in sets]
    return model_writer(recipe, data, lambda metrics: entry_of(recipe, sets, stage, metrics), stage=stage)


def entry_of(
    recipe: NuClassRecipe, sets: Sequence[CellSet], stage: Stage, metrics: Mapping[str, float]
) -> WeightsEntry:
    """Return the entry of `weights_manifest.yaml` for the weights of a stage, without what their file tells."""
    crops = {"local": asdict(recipe.local), "context": asdict(recipe.context)}
    return replace(
        trained_entry(recipe, "classify", "nuclass", recipe, [(s.name, s.path) for s in sets if s.train], metrics),
        config={**stage_config(recipe, stage), "crops": crops},
        classes=class_specs(recipe.classes),
        organs=recipe.organs,
        citation="NuClass, Xu et al. 2025 (architecture); weights trained with cellslide",
    )


def _used(cell_set: CellSet, recipe: NuClassRecipe) -> dict[str, Any]:
    def told(images: Sequence[CellImage]) -> dict[str, Any]:
        counts = np.bincount(np.concatenate([np.empty(0, np.int64), *(i.label for i in images)]), minlength=1)
        cells = {name: int(counts[k]) if k < len(counts) else 0 for k, name in enumerate(recipe.classes)}
        return {"images": len(images), "cells": cells}

    return {"name": cell_set.name, "licences": licences(cell_set.path), "train": told(cell_set.train),
            "val": told(cell_set.val), "val_images": [image.name for image in cell_set.val]}  # fmt: skip


def _say_sets(sets: Sequence[CellSet], recipe: NuClassRecipe) -> None:
    for s in sets:
        used = _used(s, recipe)
        for part, images in (("train", s.train), ("val", s.val)):
            cells = ", ".join(f"{n} {name}" for name, n in used[part]["cells"].items())
            unknown = sum(image.organ < 0 for image in images)
            organ = f", organ unknown in {unknown}" if unknown else ""
            print(f"data {s.name} {part}: {len(images)} images{organ}; cells: {cells}", flush=True)
