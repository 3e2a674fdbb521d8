"""A training of CellDETR, from data sets and a recipe to a folder with weights, card, logs and a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellslide.errors import UsageError, WeightsError
from cellslide.models import build_model
from cellslide.models.celldetr import CellDETR
from cellslide.models.celldetr_layout import own_names
from cellslide.models.checkpoint import check_fit
from cellslide.train.callbacks import ModelWriter
from cellslide.train.celldetr import CellDETRTraining
from cellslide.train.celldetr_data import BoxSet, box_loader, load_box_sets, marked_loader
from cellslide.train.celldetr_recipe import CellDETRRecipe
from cellslide.train.cellvta import read_state
from cellslide.train.export import WEIGHTS, color_of, licences, write_files
from cellslide.train.run import Outcome, RunOptions, find_start, fit

ARCH = "celldetr"
# What one training has and another has not: heads of the classes, and of the contrast.
HEADS = ("decouple_class_embed.", "contrastive_project.")


def train_celldetr(paths: Sequence[Path], recipe: CellDETRRecipe, options: RunOptions) -> CellDETRTraining:
    """Train, or go on from `folder/last.ckpt` if it is there; returns the module with its live weights.

    `options.init` holds weights to start from, those of a contrastive pretraining among them. Raises UsageError for
    data or a recipe that do not fit, WeightsError for weights that do not, Interrupted after Ctrl-C or SIGTERM.
    """
    start = find_start(options, recipe)
    sets = load_box_sets(paths, recipe)
    _say_sets(sets)
    torch.manual_seed(recipe.seed)
    model = build_celldetr(recipe)
    if start.checkpoint is None:
        if recipe.model.encoder_weights is not None:
            load_backbone(model, Path(recipe.model.encoder_weights))
        if options.init is not None:
            load_init(model, options.init)
    module = CellDETRTraining(recipe, model)
    loaders = box_loader(sets, recipe, options.workers, start.first_epoch), marked_loader(sets)
    outcome = Outcome(writer(recipe, sets), recipe.monitor, recipe.optim.ema, recipe.optim.grad_clip)
    fit(module, loaders, options, start, outcome)
    return module


def build_celldetr(recipe: CellDETRRecipe) -> CellDETR:
    """Return the network, weights untrained; raises UsageError where it cannot learn what the recipe asks."""
    model = build_model(ARCH, network_config(recipe))
    assert isinstance(model, CellDETR)
    if model.config.det_classes != 1:
        raise UsageError("recipe model.config.det_classes: must be 1; the representation decoder types the nuclei")
    if recipe.model.classes and model.config.repr_layers == 0:
        raise UsageError("recipe model.config.repr_layers: must be 1 or more where model.classes are named")
    return model


def network_config(recipe: CellDETRRecipe) -> dict[str, Any]:
    """Return the network's configuration: classes counted by who lists them, inference in the training's mode."""
    n_classes, contrast = len(recipe.model.classes), recipe.loss.contrastive > 0
    own = {"num_classes": n_classes, "projection": contrast, "placed": n_classes > 0 or not contrast}
    return {**own, "mode": recipe.mode, "score_threshold": recipe.score_threshold, **recipe.model.config}


def load_init(model: nn.Module, path: Path) -> None:
    """Fill a network from a file of weights, or from the folder of a run; a head that the two do not share stays.

    A head is that of the classes or of the contrast: a contrastive checkpoint lacks the first. Raises WeightsError for
    anything else that does not fit, UsageError if there is no file.
    """
    path = path / WEIGHTS if path.is_dir() else path
    state, wanted = own_names(read_state(path)), model.state_dict()
    shapes = [{name: value.shape for name, value in names.items()} for names in (state, wanted)]
    other = tuple(h for h in HEADS if _under(h, shapes[0]) != _under(h, shapes[1]))
    if other:
        print(f"init {path}: not taken are the heads {', '.join(h.rstrip('.') for h in other)}", flush=True)
    state = {name: value for name, value in state.items() if not name.startswith(other)}
    wanted = {name: value for name, value in wanted.items() if not name.startswith(other)}
    check_fit(wanted, state, f"{path}: does not fit")
    model.load_state_dict(state, strict=False)


def _under(prefix: str, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    return {name: shape for name, shape in shapes.items() if name.startswith(prefix)}


def load_backbone(model: CellDETR, path: Path) -> None:
    """Fill the backbone from any file that holds its weights under one prefix; raises WeightsError if none does.

    Counters of batch norms, which constants have not, do not matter.
    """
    path = path / WEIGHTS if path.is_dir() else path
    state = read_state(path)
    body = model.detr.backbone[0].body
    wanted = {name: value for name, value in body.state_dict().items() if not name.endswith("num_batches_tracked")}
    first = next(iter(wanted))
    for prefix in sorted({name.removesuffix(first) for name in state if name.endswith(first)}):
        found = {name: state[prefix + name] for name in wanted if prefix + name in state}
        if found.keys() == wanted.keys() and all(found[name].shape == wanted[name].shape for name in wanted):
            body.load_state_dict(found, strict=False)
            return
    raise WeightsError(f"{path}: holds no backbone {model.config.backbone} as model.config of --recipe describes it")


def writer(recipe: CellDETRRecipe, sets: Sequence[BoxSet]) -> ModelWriter:
    """Return what writes a detector's weights, its manifest entry and its card."""

    def write(folder: Path, state: Mapping[str, Tensor], metrics: Mapping[str, float], step: int) -> None:
        said = {"metrics": dict(metrics), "step": step, "recipe": recipe.as_dict()}
        card = {**said, "data": [_used(s) for s in sets]}
        write_files(folder, state, lambda sha256, size: entry_of(recipe, sets, metrics, sha256, size), card)

    return write


def entry_of(
    recipe: CellDETRRecipe, sets: Sequence[BoxSet], metrics: Mapping[str, float], sha256: str, size_bytes: int
) -> dict[str, Any]:
    """Return the entry of `weights_manifest.yaml` for these weights."""
    model = recipe.model
    scores = {name[4:]: round(value, 4) for name, value in metrics.items() if name.startswith("val/")}
    threshold = round(metrics.get("val/threshold", recipe.score_threshold), 4)
    return {
        "id": recipe.id,
        "task": "detect",
        "arch": ARCH,
        "config": network_config(recipe),
        "file": WEIGHTS,
        "sha256": sha256,
        "size_bytes": size_bytes,
        "licence": "Apache-2.0",
        "gated": False,
        "mpp": recipe.mpp,
        "tile_px": recipe.tile_px,
        "overlap_px": recipe.tile_px // 4,
        "mean": list(model.mean),
        "std": list(model.std),
        "classes": [{"name": name, "color": list(color_of(i))} for i, name in enumerate(model.classes)],
        "organs": [],
        "trained_on": [
            {"dataset": s.drawn.name, "licence": "; ".join(licences(s.drawn.path))} for s in sets if s.drawn.trains
        ],
        "metrics": {"validation": scores},
        "detect": {"score_threshold": threshold, "nms_um": 0.0},
        "citation": "CellDETR (architecture); weights trained with cellslide",
    }


def _used(box_set: BoxSet) -> dict[str, Any]:
    drawn = box_set.drawn
    nuclei = sum(len(item.label_class) - 1 for item in drawn.train)
    return {"name": drawn.name, "weight": drawn.weight, "licences": licences(drawn.path),
            "train": {"images": len(drawn.train), "nuclei": nuclei},
            "val": {"images": len(box_set.val), "nuclei": sum(len(item.xy) for item in box_set.val)},
            "val_images": [item.name for item in box_set.val]}  # fmt: skip


def _say_sets(sets: Sequence[BoxSet]) -> None:
    for s in sets:
        used = _used(s)
        counts = ", ".join(f"{used[p]['images']} {p} ({used[p]['nuclei']} nuclei)" for p in ("train", "val"))
        print(f"data {s.drawn.name}: {counts}, weight {s.drawn.weight:g}", flush=True)
