"""A point detector's training, from data sets and a recipe to a folder with weights, card, logs and a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cellslide.errors import UsageError
from cellslide.models import build_model, muse_layout
from cellslide.models.backbones import holds_network
from cellslide.models.checkpoint import read_tensors
from cellslide.models.muse import ConvEncoder
from cellslide.train.cellvta import load_start
from cellslide.train.export import ModelWriter, class_specs, drawn_from, model_writer, trained_entry, used, weights_in
from cellslide.train.loaders import whole_loader
from cellslide.train.points import PointsTraining
from cellslide.train.points_data import PointImage, PointSet, field_loader, load_point_sets
from cellslide.train.points_losses import UNKNOWN
from cellslide.train.points_recipe import PointsRecipe
from cellslide.train.run import Outcome, RunOptions, find_start, fit
from cellslide.types import DetectDecode
from cellslide.weights.backbone import fill_backbone
from cellslide.weights.manifest import WeightsEntry


def train_points(
    paths: Sequence[Path], recipe: PointsRecipe, options: RunOptions, model: nn.Module | None = None
) -> PointsTraining:
    """Train, or go on from `folder/last.ckpt` if it is there; returns the module with its live weights.

    `options.init` is a whole detector to start from, the recipe's encoder_weights a backbone. Raises UsageError for
    data or a recipe that do not fit, WeightsError for weights that do not, Interrupted after Ctrl-C or SIGTERM.
    """
    start = find_start(options, recipe)
    sets = load_point_sets(paths, recipe)
    _say_sets(sets, recipe)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model.arch, model_config(recipe)) if model is None else model
    if start.checkpoint is None:
        if recipe.model.encoder_weights is not None:
            load_backbone(model, Path(recipe.model.encoder_weights))
        if options.init is not None:
            load_start(model, options.init)
    module = PointsTraining(recipe, model)
    validated = whole_loader([item for s in sets for item in s.val])
    loaders = field_loader(sets, recipe, options.workers, start.first_epoch), validated
    outcome = Outcome(writer(recipe, sets), recipe.monitor, recipe.optim.ema, recipe.optim.grad_clip)
    fit(module, loaders, options, start, outcome)
    return module


def model_config(recipe: PointsRecipe) -> dict[str, Any]:
    """Return the network's configuration; its classes are those that the recipe names."""
    config = dict(recipe.model.config)
    head = dict(config.get("head") or {})
    n = len(recipe.model.classes)
    if head.setdefault("n_classes", n) != n:
        raise UsageError(f"recipe model.config.head.n_classes: {head['n_classes']} must be {n}, as model.classes names")
    return {**config, "head": head}


def load_backbone(model: nn.Module, path: Path) -> None:
    """Fill the backbone from a published or pretrained one, or from that of a detector (a file, or a run's folder).

    A file that holds the convolutional encoder alone, as timm or EfficientNet-Lite name it, fills the encoder. Heads in
    the file are left out; raises WeightsError where a tensor of the backbone is missing or of another shape.
    """
    file = weights_in(path)
    encoder = model.get_submodule("backbone").encoder
    if isinstance(encoder, ConvEncoder) and holds_network(read_tensors(file)[0], encoder.encoder):
        fill_backbone(encoder.encoder, str(file))
    else:
        muse_layout.fill_backbone(model.get_submodule("backbone"), file)


def writer(recipe: PointsRecipe, sets: Sequence[PointSet]) -> ModelWriter:
    """Return what writes a detector's weights, its manifest entry and its card."""
    return model_writer(recipe, [_used(s, recipe) for s in sets], lambda metrics: entry_of(recipe, sets, metrics))


def entry_of(recipe: PointsRecipe, sets: Sequence[PointSet], metrics: Mapping[str, float]) -> WeightsEntry:
    """Return the entry of `weights_manifest.yaml` for these weights, without what their file tells."""
    model = recipe.model
    return replace(
        trained_entry(recipe, "detect", model.arch, model, drawn_from(sets), metrics),
        config=model_config(recipe),
        tile_px=512,
        classes=class_specs(model.classes),
        detect=DetectDecode(recipe.detect.score_threshold, recipe.detect.nms_um),
        citation="MUSE (backbone) and DPA-P2PNet (head), the latter as cellslide builds it; trained with cellslide",
    )


def _used(point_set: PointSet, recipe: PointsRecipe) -> dict[str, Any]:
    def told(images: Sequence[PointImage]) -> dict[str, Any]:
        labels = np.concatenate([np.empty(0, np.int64), *(image.label for image in images)])
        nuclei = {name: int((labels == k).sum()) for k, name in enumerate(recipe.model.classes)}
        return {"images": len(images), "nuclei": nuclei | {"of unknown class": int((labels == UNKNOWN).sum())}}

    return used(point_set, told)


def _say_sets(sets: Sequence[PointSet], recipe: PointsRecipe) -> None:
    for s in sets:
        used = _used(s, recipe)
        for part in ("train", "val"):
            nuclei = ", ".join(f"{n} {name}" for name, n in used[part]["nuclei"].items() if n)
            print(f"data {s.name} {part}: {used[part]['images']} images; nuclei: {nuclei or 'none'}", flush=True)
