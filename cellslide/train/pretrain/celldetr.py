"""CellDETR's contrastive pretraining: a nucleus, its box shifted and scaled, is told from the others of its crop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cellslide.errors import UsageError
from cellslide.models import build_model
from cellslide.models.celldetr import CellDETR, DetrOutput, Found
from cellslide.train.celldetr_losses import info_nce, match, set_losses
from cellslide.train.celldetr_run import load_init
from cellslide.train.celldetr_slots import noised_slots
from cellslide.train.export import ModelWriter, model_writer, trained_entry
from cellslide.train.pretrain.data import BoxCrops, BoxedCrops
from cellslide.train.pretrain.fields import FieldSet, Sources
from cellslide.train.pretrain.module import Feed, Pretraining, begin
from cellslide.train.pretrain.recipe import CellDETRPretrainRecipe
from cellslide.train.pretrain.watch import Reading, spread_of
from cellslide.train.run import Outcome, RunOptions, fit
from cellslide.weights.manifest import WeightsEntry


class CellDETRPretraining(Pretraining):
    """Trains a CellDETR's representation decoder without classes, and its detector on the same boxes if asked to."""

    watched = ("cell",)
    recipe: CellDETRPretrainRecipe

    def __init__(
        self, recipe: CellDETRPretrainRecipe, model: CellDETR, feed: Feed, stop_on_collapse: bool = False
    ) -> None:
        super().__init__(recipe, model, model, feed, stop_on_collapse)

    def is_backbone(self, name: str) -> bool:
        """Whether a parameter belongs to the convolutional backbone."""
        return name.startswith("detr.backbone.")

    def training_step(self, batch: BoxedCrops, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its parts; raises FloatingPointError if it is not finite."""
        assert isinstance(self.model, CellDETR)
        noise = self.recipe.noise
        own = [boxes[valid] for boxes, valid in zip(batch.boxes, batch.valid, strict=True)]
        output = self.model.detect(self.normalized(batch.image))
        slots = noised_slots(own, noise.low, noise.high, noise.enlarge_p)
        projected = self.model.contrast(output, slots).logits
        contrast = info_nce(projected, slots.counts, noise.temperature)
        detection = self.detection_loss(output, own)
        total = self.check_finite(contrast + self.recipe.detection * detection)
        # What InfoNCE is where nothing is told apart: the mean log of the number to choose from.
        chance = [math.log(n) for n in slots.counts if n]
        self.say({"train/loss": total, "train/contrast": contrast, "train/detection": detection,
                  "train/chance": sum(chance) / max(len(chance), 1)})  # fmt: skip
        cells = torch.cat([rows[:n] for rows, n in zip(projected, slots.counts, strict=True)])
        self.say(Reading(spread_of(cells)).as_dict("cell"))
        return total

    def detection_loss(self, output: DetrOutput, boxes: Sequence[Tensor]) -> Tensor:
        """Return the weighted terms of the detector, summed over its layers and proposals; 0 if not asked for."""
        if self.recipe.detection == 0:
            return output.logits.sum() * 0.0
        layers = [Found(output.logits, output.boxes), *output.aux]
        layers += [] if output.proposals is None else [output.proposals]
        weights, terms = self.recipe.matcher, []
        for found in layers:
            pairs = match(found.logits, found.boxes, boxes, weights)
            everywhere = torch.ones_like(found.logits[..., 0], dtype=torch.bool)
            terms.append(set_losses(found.logits, found.boxes, boxes, pairs, everywhere).weighted(weights))
        return torch.stack(terms).sum()


def pretrain_celldetr(
    sources: Sources, recipe: CellDETRPretrainRecipe, options: RunOptions, stop_on_collapse: bool = False
) -> CellDETRPretraining:
    """Pretrain, or go on from `folder/last.ckpt` if it is there; returns the module.

    `options.init` holds weights of a whole network to start from. Raises UsageError for sources or a recipe that do not
    fit, WeightsError for weights that do not, CollapseError if asked to, Interrupted on a signal.
    """
    start, sets = begin(sources, recipe, options)
    model = build_model(recipe.model.arch, network_config(recipe))
    if not isinstance(model, CellDETR) or not hasattr(model, "contrastive_project"):
        raise UsageError("recipe model: arch must be celldetr, and config.repr_layers 1 or more")
    if options.init is not None and start.checkpoint is None:
        load_init(model, options.init)
    feed = Feed(BoxCrops(sets, recipe), options.workers, start.first_epoch)
    module = CellDETRPretraining(recipe, model, feed, stop_on_collapse)
    outcome = Outcome(writer(recipe, sets, sources), "", 0.0, recipe.optim.grad_clip)
    fit(module, (None, None), options, start, outcome)
    return module


def network_config(recipe: CellDETRPretrainRecipe) -> dict[str, Any]:
    """Return the network's configuration: no classes, and the head of the contrast."""
    return {**recipe.model.config, "num_classes": 0, "projection": True}


def writer(recipe: CellDETRPretrainRecipe, sets: Sequence[FieldSet], sources: Sources) -> ModelWriter:
    """Return what writes the whole network, which `train celldetr --init` starts from."""
    return model_writer(recipe, [s.as_dict() for s in sets], lambda _: entry_of(recipe, sources))


def entry_of(recipe: CellDETRPretrainRecipe, sources: Sources) -> WeightsEntry:
    """Return the manifest entry of a pretrained network, without what its file tells."""
    return replace(
        trained_entry(recipe, "backbone", recipe.model.arch, recipe.model, sources.named, {}),
        config=network_config(recipe),
        citation="CellDETR (method); weights trained with cellslide",
    )
