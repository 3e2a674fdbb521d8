"""Training of CellVTA, and of every model with its three branches: criterion, optimiser, schedule and validation."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellslide.decode import hover_instances
from cellslide.errors import UsageError
from cellslide.evaluate.detection import centroids, pair_points, tally
from cellslide.evaluate.matching import overlaps, panoptic_quality
from cellslide.models.checkpoint import check_fit
from cellslide.train.data import Crops, TrainImage
from cellslide.train.losses import hover_losses
from cellslide.train.module import Training
from cellslide.train.recipe import Recipe
from cellslide.types import HoverDecode, HoverMaps, Int32, UInt8

DETECTION_RADIUS_UM = 3.0


class CellVTATraining(Training):
    """Trains a model that maps images (B, 3, H, W) to raw logits by published name."""

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        super().__init__(recipe, model.to(memory_format=torch.channels_last) if recipe.channels_last else model)
        self.recipe = recipe
        self.register_buffer("mean", 255 * torch.tensor(recipe.model.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(recipe.model.std).view(1, 3, 1, 1), persistent=False)
        self._scores: list[dict[str, float]] = []
        if recipe.model.freeze_encoder:
            freeze_encoder(model)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return raw logits of uint8 images (B, 3, H, W)."""
        x = (image.float() - self.mean) / self.std
        if self.recipe.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        outputs: dict[str, Tensor] = self.model(x)
        return outputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW; biases, norms and other vectors have no weight decay, the ViT its own rate."""
        optim = self.recipe.optim
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                scale = optim.encoder_lr_scale if is_encoder(name) else 1.0
                groups.setdefault((scale, optim.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
        return torch.optim.AdamW(
            [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()],
            lr=optim.lr,
            betas=optim.betas,
        )

    def train(self, mode: bool = True) -> CellVTATraining:
        """Switch modes, leaving a frozen encoder in evaluation mode."""
        super().train(mode)
        if mode and self.recipe.model.freeze_encoder:
            for module in frozen_modules(self.model):
                module.eval()
        return self

    def training_step(self, batch: Crops, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its parts; raises FloatingPointError if it is not finite."""
        parts = hover_losses(self(batch.image), batch, self.recipe.loss)
        total = self.check_finite(parts.total)
        shown = {f"train/{name}": value.detach() for name, value in parts._asdict().items()}
        shown["train/loss"] = total.detach()
        self.log_dict(shown, on_step=False, on_epoch=True, batch_size=len(batch.image))
        return total

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move crops; a validation image stays, since it is decoded on the CPU."""
        if isinstance(batch, TrainImage):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

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


def is_encoder(name: str) -> bool:
    """Whether a parameter belongs to the ViT itself, not to the adapter or the decoder."""
    return name.startswith(VIT_PARTS)


def freeze_encoder(model: nn.Module) -> None:
    """Stop the gradient of the ViT's parameters."""
    for name, parameter in model.named_parameters():
        if is_encoder(name):
            parameter.requires_grad_(False)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the ViT that stay in evaluation mode when it is frozen."""
    return [module for name, module in model.named_modules() if f"{name}." in VIT_PARTS]


def load_start(model: nn.Module, path: Path, encoder_only: bool = False) -> None:
    """Load weights to start from (.safetensors, or a state dict saved by torch); WeightsError if they do not fit.

    `encoder_only` takes ViT weights with or without the prefix `encoder.` and leaves everything else as it is.
    """
    state = read_state(path)
    wanted = model.state_dict()
    if encoder_only:
        state = {k if k.startswith("encoder.") else f"encoder.{k}": v for k, v in state.items()}
        wanted = {k: v for k, v in wanted.items() if is_encoder(k)}
        state = {k: v for k, v in state.items() if k in wanted}
    check_fit(wanted, state, f"{path}: does not fit")
    model.load_state_dict(state, strict=not encoder_only)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file; raises UsageError if there is none."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    document = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model_state_dict", "state_dict", "model"):
        document = document.get(key, document)
    return {name.removeprefix("model."): value for name, value in document.items()}


@torch.no_grad()
def score_image(training: CellVTATraining, item: TrainImage) -> dict[str, float]:
    """Return loss-free scores of one image: bPQ where instances are trusted, detection F1 within 3 µm where known."""
    maps = predict_maps(training, item.image)
    found = instances_of(maps, training.recipe)
    mpp = training.recipe.mpp
    radius_px = DETECTION_RADIUS_UM / mpp
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
    counts = tally(pair_points(true_xy, found_xy, radius_px), len(true_xy), len(found_xy))
    total = 2 * counts.tp + counts.fp + counts.fn
    return 2 * counts.tp / total if total else float("nan")


def _dice(true: Any, found: Any) -> float:
    return float(2 * (true & found).sum() / max(true.sum() + found.sum(), 1))


def predict_maps(training: CellVTATraining, image: UInt8) -> HoverMaps:
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


def instances_of(maps: HoverMaps, recipe: Recipe) -> Int32:
    """Return the instance map (H, W) under the recipe's decode settings."""
    return hover_instances(maps, HoverDecode(**asdict(recipe.decode)))
