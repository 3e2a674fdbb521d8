"""Losses, rates and validation of the fusion networks and of their contrastive pretraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellslide.genes.scores import recall_at, spearman
from cellslide.models.morpho_fusion import MorphoFusion
from cellslide.models.state_dict import below
from cellslide.train.export import load_fitting, read_state
from cellslide.train.fusion.data import FusionBatch
from cellslide.train.fusion.recipe import FusionRecipe
from cellslide.train.module import Training, adamw, groups_of
from cellslide.weights.backbone import fill_backbone


class FusionTraining(Training):
    """Trains a fusion network on log1p counts, and scores it on the validation tiles of all slides."""

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: FusionRecipe, model: nn.Module) -> None:
        super().__init__(recipe, model)
        assert isinstance(model, MorphoFusion)
        self.net = model
        for name, value in (("mean", recipe.model.mean), ("std", recipe.model.std)):
            self.register_buffer(name, 255 * torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        if self.is_frozen:
            self.net.backbone.morph_encoder.requires_grad_(False)
        self._seen: list[tuple[Any, ...]] = []
        self.best, self.since = -float("inf"), 0

    @property
    def is_frozen(self) -> bool:
        """Whether the ViT stays as it is."""
        return bool(self.recipe.model.freeze_vit and self.net.config.reads_image)

    def train(self, mode: bool = True) -> FusionTraining:
        """Choose training or evaluation mode; a frozen ViT stays in evaluation mode."""
        super().train(mode)
        if self.is_frozen:
            self.net.backbone.morph_encoder.eval()
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW, each part at its rate."""
        optim = self.recipe.optim

        def share(name: str) -> float:
            if name.startswith(("head.", "token_head.", "logit_scale")):
                return 1.0
            if name == "backbone.fusion_alpha":
                return float(optim.gate_lr / optim.lr)
            vit = name.startswith("backbone.morph_encoder.")
            rate = optim.backbone_lr if vit or optim.expr_lr is None else optim.expr_lr
            return float(rate / optim.lr)

        return adamw(groups_of(self.net, share), optim)

    def inputs(self, batch: FusionBatch) -> tuple[Tensor, Tensor]:
        """Return image and expression as the network takes them."""
        return (batch.image.float() - self.mean) / self.std, batch.x

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its parts."""
        found = self.net(*self.inputs(batch))
        error = F.huber_loss if self.recipe.loss == "huber" else F.mse_loss
        parts = {"tile": error(found.y.float(), batch.y)}
        if found.token_y is not None:
            # Patches without any transcript of the sources or the targets may lie beside the tissue.
            there = (batch.x.sum(2) > 0) | (batch.token_y.sum(2) > 0)
            parts["token"] = (
                error(found.token_y.float()[there], batch.token_y[there]) if there.any() else parts["tile"] * 0
            )
        return self.log_losses(torch.stack(list(parts.values())).sum(), parts, len(batch.y))

    def validation_step(self, batch: FusionBatch, batch_idx: int) -> None:
        """Collect predictions and truth of one batch."""
        y = self.net(*self.inputs(batch)).y.float()
        self._seen.append((y.cpu().numpy(), batch.y.cpu().numpy()))

    def on_validation_epoch_end(self) -> None:
        """Log error and mean rank correlation over all validation tiles; end where nothing gets better for long."""
        pred, true = (np.concatenate(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        mse = float(((pred - true) ** 2).mean())
        rank = spearman(pred, true)
        self.log("val/mse", mse)
        self.log("val/spearman", float(np.nanmean(rank)) if (~np.isnan(rank)).any() else 0.0)
        self._watch(-mse, "val/negative_mse")

    def _watch(self, score: float, name: str) -> None:
        self.log(name, score)
        self.since = 0 if score > self.best else self.since + 1
        self.best = max(self.best, score)
        if self.recipe.patience and self.since >= self.recipe.patience:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep also how long nothing got better."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["cellslide"] |= {"best": self.best, "since": self.since}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        super().on_load_checkpoint(checkpoint)
        self.best, self.since = (checkpoint["cellslide"][name] for name in ("best", "since"))


class ClipTraining(FusionTraining):
    """Contrast between image and transcripts of the tiles of a batch, both ways (InfoNCE)."""

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        image, expression, scale = self.net.contrast(*self.inputs(batch))
        return self.log_losses(info_nce(image, expression, scale), {}, len(batch.y))

    def validation_step(self, batch: FusionBatch, batch_idx: int) -> None:
        """Collect the vectors of one batch."""
        image, expression, _ = self.net.contrast(*self.inputs(batch))
        self._seen.append((image.cpu().numpy(), expression.cpu().numpy()))

    def on_validation_epoch_end(self) -> None:
        """Log recall within pools of a batch."""
        image, expression = (np.concatenate(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        found = recall_at(image, expression, min(self.recipe.batch_size, len(image)))
        self.log("val/recall@5", found["recall@5"])
        self._watch(found["recall@1"], "val/recall@1")


def info_nce(image: Tensor, expression: Tensor, scale: Tensor) -> Tensor:
    """Return the symmetric cross entropy of the likeness of (B, d) vectors of length 1, times `scale`."""
    logits = scale * image @ expression.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def load_encoder(model: nn.Module, weights: str) -> None:
    """Fill the ViT from a file or an id of the manifest."""
    fill_backbone(model.get_submodule("backbone.morph_encoder"), weights)


def load_init(model: nn.Module, path: Path) -> None:
    """Fill both encoders from a fusion or a contrastive run of the same genes; the head is left as it is."""
    load_fitting(model.get_submodule("backbone"), below(read_state(path), "backbone."), path)
