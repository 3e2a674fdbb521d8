"""A point detector's training, from data sets and a recipe to a folder with weights, card, logs and a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellslide.errors import UsageError
from cellslide.models import build_model
from cellslide.models.muse_layout import fill_backbone
from cellslide.train.cellvta import load_start
from cellslide.train.export import WEIGHTS, color_of, licences, write_files
from cellslide.train.points import PointsTraining
from cellslide.train.points_data import PointImage, PointSet, field_loader, load_point_sets, whole_loader
from cellslide.train.points_losses import UNKNOWN
from cellslide.train.points_recipe import PointsRecipe
from cellslide.train.run import Outcome, RunOptions, find_start, fit


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
            load_start(model, options.init / WEIGHTS if options.init.is_dir() else options.init)
    module = PointsTraining(recipe, model)

    def write(folder: Path, state: Mapping[str, Tensor], metrics: Mapping[str, float], step: int) -> None:
        card = {"metrics": dict(metrics), "step": step, "recipe": recipe.as_dict()}
        card["data"] = [_used(s, recipe) for s in sets]
        write_files(folder, state, lambda sha256, size: points_entry(recipe, sets, metrics, sha256, size), card)

    loaders = field_loader(sets, recipe, options.workers, start.first_epoch), whole_loader(sets)
    fit(module, loaders, options, start, Outcome(write, recipe.monitor, recipe.optim.ema, recipe.optim.grad_clip))
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

    Heads in the file are left out; raises WeightsError where a tensor of the backbone is missing or of another shape.
    """
    fill_backbone(model.get_submodule("backbone"), path / WEIGHTS if path.is_dir() else path)


def points_entry(
    recipe: PointsRecipe, sets: Sequence[PointSet], metrics: Mapping[str, float], sha256: str, size: int
) -> dict[str, Any]:
    """Return the entry of `weights_manifest.yaml` for these weights."""
    model = recipe.model
    scores = {name[4:]: round(value, 4) for name, value in metrics.items() if name.startswith("val/")}
    return {
        "id": recipe.id,
        "task": "detect",
        "arch": model.arch,
        "config": model_config(recipe),
        "file": WEIGHTS,
        "sha256": sha256,
        "size_bytes": size,
        "licence": "Apache-2.0",
        "gated": False,
        "mpp": recipe.mpp,
        "tile_px": 512,
        "mean": list(model.mean),
        "std": list(model.std),
        "classes": [{"name": name, "color": list(color_of(i))} for i, name in enumerate(model.classes)],
        "organs": [],
        "trained_on": [{"dataset": s.name, "licence": "; ".join(licences(s.path))} for s in sets if s.trains],
        "metrics": {"validation": scores},
        "detect": {"score_threshold": recipe.detect.score_threshold, "nms_um": recipe.detect.nms_um},
        "citation": "MUSE (backbone) and DPA-P2PNet (head), the latter as cellslide builds it; trained with cellslide",
    }


def _used(point_set: PointSet, recipe: PointsRecipe) -> dict[str, Any]:
    def told(images: Sequence[PointImage]) -> dict[str, Any]:
        labels = np.concatenate([np.empty(0, np.int64), *(image.label for image in images)])
        nuclei = {name: int((labels == k).sum()) for k, name in enumerate(recipe.model.classes)}
        return {"images": len(images), "nuclei": nuclei | {"of unknown class": int((labels == UNKNOWN).sum())}}

    return {"name": point_set.name, "weight": point_set.weight, "licences": licences(point_set.path),
            "train": told(point_set.train), "val": told(point_set.val),
            "val_images": [image.name for image in point_set.val]}  # fmt: skip


def _say_sets(sets: Sequence[PointSet], recipe: PointsRecipe) -> None:
    for s in sets:
        used = _used(s, recipe)
        for part in ("train", "val"):
            nuclei = ", ".join(f"{n} {name}" for name, n in used[part]["nuclei"].items() if n)
            print(f"data {s.name} {part}: {used[part]['images']} images; nuclei: {nuclei or 'none'}", flush=True)
