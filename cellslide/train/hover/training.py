"""Training of CellVTA, and of every model with its three branches: criterion, encoder and validation."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellslide.evaluate.detection import RADIUS_UM, centroids, pair_points, tally
from cellslide.evaluate.matching import overlaps, panoptic_quality
from cellslide.models.checkpoint import check_fit
from cellslide.nuclei.hover_decode import hover_instances
from cellslide.train.data import Crops, TrainImage
from cellslide.train.export import read_state
from cellslide.train.hover.losses import hover_losses
from cellslide.train.hover.recipe import HoverRecipe
from cellslide.train.module import ImageTraining
from cellslide.types import HoverDecode, HoverMaps, Int32, UInt8
from cellslide.weights.backbone import fill_backbone


class HoverTraining(ImageTraining):
    """Trains a model that maps images (B, 3, H, W) to raw logits by published name."""

    whole = TrainImage
    recipe: HoverRecipe

    def __init__(self, recipe: HoverRecipe, model: nn.Module) -> None:
        super().__init__(recipe, model)
        self._scores: list[dict[str, float]] = []
        if recipe.model.freeze_encoder:
            freeze_encoder(model)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return raw logits of uint8 images (B, 3, H, W)."""
        outputs: dict[str, Tensor] = self.model(self.normalise(image))
        return outputs

    def rate_share(self, name: str) -> float:
        """Return the share of the learning rate of a parameter: the ViT has its own."""
        return self.recipe.optim.encoder_lr_scale if name.startswith(encoder_parts(self.model)) else 1.0

    def train(self, mode: bool = True) -> HoverTraining:
        """Switch modes, leaving a frozen encoder and frozen norms in evaluation mode."""
        super().train(mode)
        if mode and self.recipe.model.freeze_norms:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        if mode and self.recipe.model.freeze_encoder:
            for module in frozen_modules(self.model):
                module.eval()
        return self

    def training_step(self, batch: Crops, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its parts; raises FloatingPointError if it is not finite."""
        parts = hover_losses(self(batch.image), batch, self.recipe.loss)
        return self.log_losses(parts.total, parts._asdict(), len(batch.image))

    def validation_step(self, item: TrainImage, batch_idx: int) -> None:
        """Score one whole image."""
        self._scores.append(score_image(self, item))

    def on_validation_epoch_end(self) -> None:
        """Log the means over images, each over the images that it applies to."""
        names = sorted({name for scores in self._scores for name in scores})
        for name in names:
            values = [s[name] for s in self._scores if name in s and not math.isnan(s[name])]
            if values:
                self.log(f"val/{name}", float(np.mean(values)))
        self._scores.clear()


# The published adapter is trained beside the frozen ViT; these are the ViT's own parts.
VIT_PARTS = ("encoder.blocks.", "encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed", "encoder.norm.")
# Where a convolutional network of timm stands in a model that has one.
PYRAMIDS = ("encoder.spm.net", "encoder")


def pyramid_of(model: nn.Module) -> str | None:
    """Return the name of the convolutional network of timm in a model, None if it has none."""
    for name in PYRAMIDS:
        with suppress(AttributeError):
            if hasattr(model.get_submodule(name), "feature_info"):
                return name
    return None


def encoder_parts(model: nn.Module) -> tuple[str, ...]:
    """Return the beginnings of the names of what `encoder_weights` fills: a network of timm, else the ViT."""
    pyramid = pyramid_of(model)
    return VIT_PARTS if pyramid is None else (f"{pyramid}.",)


def freeze_encoder(model: nn.Module) -> None:
    """Stop the gradient of the encoder's parameters."""
    for name, parameter in model.named_parameters():
        if name.startswith(encoder_parts(model)):
            parameter.requires_grad_(False)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the encoder that stay in evaluation mode when it is frozen."""
    return [module for name, module in model.named_modules() if f"{name}." in encoder_parts(model)]


def load_encoder(model: nn.Module, source: str) -> None:
    """Fill the encoder with published weights and leave everything else as it is.

    A network of timm takes what `fill_backbone` takes, a ViT the tensors of a file, with or without the prefix
    `encoder.`. Raises WeightsError if they do not fit.
    """
    pyramid = pyramid_of(model)
    if pyramid is not None:
        fill_backbone(model.get_submodule(pyramid), source)
        return
    state = read_state(Path(source))
    wanted = {k: v for k, v in model.state_dict().items() if k.startswith(VIT_PARTS)}
    named = {k if k.startswith("encoder.") else f"encoder.{k}": v for k, v in state.items()}
    state = {k: v for k, v in named.items() if k in wanted}
    check_fit(wanted, state, f"{source}: does not fit")
    model.load_state_dict(state, strict=False)


@torch.no_grad()
def score_image(training: HoverTraining, item: TrainImage) -> dict[str, float]:
    """Return loss-free scores of one image: bPQ where instances are trusted, detection F1 within 3 µm where known."""
    maps = predict_maps(training, item.image)
    found = instances_of(maps, training.recipe)
    mpp = training.recipe.mpp
    radius_px = RADIUS_UM / mpp
    scores: dict[str, float] = {}
    if item.label_hover.all():
        unknown = item.labels < 0
        true, found = np.where(unknown, 0, item.labels), np.where(unknown, 0, found)
        if true.any():
            quality = panoptic_quality(overlaps(true, found))
            scores |= {"bpq": quality.pq, "bdq": quality.dq, "bsq": quality.sq}
        scores["f1_instances"] = _detection_f1(centroids(true)[1], centroids(found)[1], radius_px)
    elif item.points_xy is not None:
        scores["f1_points"] = _detection_f1(item.points_xy, centroids(found)[1], radius_px)
    if not (item.labels < 0).any():
        scores["dice"] = _dice(item.labels > 0, maps.foreground > 0)
    return scores


def _detection_f1(true_xy: Any, found_xy: Any, radius_px: float) -> float:
    f1 = tally(pair_points(true_xy, found_xy, radius_px), len(true_xy), len(found_xy)).f1
    return math.nan if f1 is None else f1


def _dice(true: Any, found: Any) -> float:
    return float(2 * (true & found).sum() / max(true.sum() + found.sum(), 1))


def predict_maps(training: HoverTraining, image: UInt8) -> HoverMaps:
    """Run the model on one whole image (H, W, 3), mirrored to a multiple of 16 and cut back."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="reflect")
    batch = torch.from_numpy(np.ascontiguousarray(padded.transpose(2, 0, 1)))[None].to(training.device)
    outputs = {name: value.float().cpu() for name, value in training(batch).items()}
    logits = outputs["nuclei_binary_map"][0, :, :height, :width]
    return HoverMaps(
        foreground=(logits[1] > logits[0]).numpy().astype(np.uint8),
        foreground_prob=logits.softmax(0)[1].numpy().astype(np.float16),
        hv=np.ascontiguousarray(outputs["hv_map"][0, :, :height, :width].numpy()),
    )


def instances_of(maps: HoverMaps, recipe: HoverRecipe) -> Int32:
    """Return the instance map (H, W) under the recipe's decode settings."""
    return hover_instances(maps, HoverDecode(**asdict(recipe.decode)))
