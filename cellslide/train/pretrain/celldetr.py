"""CellDETR's contrastive pretraining: a nucleus, its box shifted and scaled, is told from the others of its crop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cellslide.models.celldetr import CellDETR, DetrOutput, Found
from cellslide.train.celldetr.losses import info_nce, match, set_losses
from cellslide.train.celldetr.slots import noised_slots
from cellslide.train.pretrain.data import BoxCrops, BoxedCrops
from cellslide.train.pretrain.module import Pretraining
from cellslide.train.pretrain.recipe import CellDETRPretrainRecipe
from cellslide.train.pretrain.watch import Reading, spread_of
from cellslide.train.task import Run


class CellDETRPretraining(Pretraining):
    """Trains a CellDETR's representation decoder without classes, and its detector on the same boxes if asked to."""

    watched = ("cell",)
    recipe: CellDETRPretrainRecipe

    def __init__(self, run: Run, model: CellDETR) -> None:
        super().__init__(run, model, model, BoxCrops(run.sets, run.recipe))

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
        self.log_means({"train/loss": total, "train/contrast": contrast, "train/detection": detection,
                  "train/chance": sum(chance) / max(len(chance), 1)})  # fmt: skip
        cells = torch.cat([rows[:n] for rows, n in zip(projected, slots.counts, strict=True)])
        self.log_means(Reading(spread_of(cells)).as_dict("cell"))
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
