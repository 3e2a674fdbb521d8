"""A training of CellDETR, from data sets and a recipe to a folder with weights, card, logs and a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cellslide.errors import UsageError, WeightsError
from cellslide.models import build_model
from cellslide.models.backbones import efficientnet_to_timm, is_efficientnet
from cellslide.models.celldetr import CellDETR
from cellslide.models.celldetr_layout import own_names
from cellslide.models.checkpoint import check_fit
from cellslide.train.celldetr import CellDETRTraining
from cellslide.train.celldetr_data import BoxSet, MarkedImage, box_loader, load_box_sets
from cellslide.train.celldetr_recipe import CellDETRRecipe
from cellslide.train.data import TrainImage
from cellslide.train.export import ModelWriter, class_specs, drawn_from, model_writer, read_state, trained_entry, used
from cellslide.train.loaders import whole_loader
from cellslide.train.run import Outcome, RunOptions, find_start, fit
from cellslide.types import DetectDecode
from cellslide.weights.manifest import WeightsEntry

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
    validated = whole_loader([item for s in sets for item in s.val])
    loaders = box_loader(sets, recipe, options.workers, start.first_epoch), validated
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

    Counters of batch norms, which constants have not, do not matter. An EfficientNet-Lite is read under its published
    names too.
    """
    state = read_state(path)
    body = model.detr.backbone[0].body
    state = efficientnet_to_timm(state, body) if is_efficientnet(state) else state
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
    return model_writer(recipe, [_used(s) for s in sets], lambda metrics: entry_of(recipe, sets, metrics))


def entry_of(recipe: CellDETRRecipe, sets: Sequence[BoxSet], metrics: Mapping[str, float]) -> WeightsEntry:
    """Return the entry of `weights_manifest.yaml` for these weights, without what their file tells."""
    threshold = round(metrics.get("val/threshold", recipe.score_threshold), 4)
    return replace(
        trained_entry(recipe, "detect", ARCH, recipe.model, drawn_from(sets), metrics),
        config=network_config(recipe),
        tile_px=recipe.tile_px,
        overlap_px=recipe.tile_px // 4,
        classes=class_specs(recipe.model.classes),
        detect=DetectDecode(threshold, recipe.nms_um),
        citation="CellDETR (architecture); weights trained with cellslide",
    )


def _used(box_set: BoxSet) -> dict[str, Any]:
    def told(images: Sequence[TrainImage | MarkedImage]) -> dict[str, int]:
        return {"images": len(images), "nuclei": sum(_count(image) for image in images)}

    return used(box_set, told)


def _count(image: TrainImage | MarkedImage) -> int:
    return len(image.xy) if isinstance(image, MarkedImage) else len(image.label_class) - 1


def _say_sets(sets: Sequence[BoxSet]) -> None:
    for s in sets:
        told = _used(s)
        counts = ", ".join(f"{told[p]['images']} {p} ({told[p]['nuclei']} nuclei)" for p in ("train", "val"))
        print(f"data {s.name}: {counts}, weight {s.weight:g}", flush=True)
