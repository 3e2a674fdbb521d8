"""The recipe of a CellDETR training; defaults are the published code's where it has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cellslide.models.celldetr_layout import MEAN, STD
from cellslide.train.recipe import (
    AugmentConfig,
    DatasetConfig,
    ModelConfig,
    Range,
    Recipe,
    RunLength,
    build,
    read_document,
    require,
)

Mode = Literal["parallel", "sequential"]
BoxInput = Literal["given", "noised", "denoising"]


@dataclass(frozen=True, slots=True)
class DetrModelConfig:
    """The network's configuration, how its images are normalised, its classes, and weights to begin with.

    classes          names of the points' classes, in order; empty finds nuclei without typing them.
    encoder_weights  file with the backbone's weights, under any prefix.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    classes: tuple[str, ...] = ()
    encoder_weights: str | None = None


@dataclass(frozen=True, slots=True)
class DetrOptimConfig:
    """AdamW; the backbone learns at `encoder_lr_scale` of the rate, sampling offsets at `point_lr_scale` of it.

    ema  decay of the averaged weights that are validated and written; 0 turns averaging off.
    """

    lr: float = 8e-5
    encoder_lr_scale: float = 0.1
    point_lr_scale: float = 1.0
    weight_decay: float = 1e-4
    betas: Range = (0.9, 0.999)
    schedule: Literal["exponential", "cosine", "constant"] = "cosine"
    gamma: float = 0.85
    warmup_steps: int = 600
    final_lr: float = 0.0
    grad_clip: float = 0.1
    ema: float = 0.0

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "above 0")
        require(0 <= self.encoder_lr_scale <= 1, "optim.encoder_lr_scale", self.encoder_lr_scale, "0 to 1")
        require(0 <= self.ema < 1, "optim.ema", self.ema, "0 up to, not including, 1")


@dataclass(frozen=True, slots=True)
class MatcherConfig:
    """Weights of the matcher's cost.

    proposal_repeats  how many proposals of a two-stage network may find the same nucleus (1 published).
    """

    ce: float = 2.0
    bbox: float = 5.0
    giou: float = 2.0
    proposal_repeats: int = 1

    def __post_init__(self) -> None:
        require(self.proposal_repeats >= 1, "matcher.proposal_repeats", self.proposal_repeats, "1 or more")


@dataclass(frozen=True, slots=True)
class DetrLossConfig:
    """Weights of the loss terms; `label` is that of the classes, `proposals` scales the terms of a first stage.

    contrastive  weight of the InfoNCE loss of noised boxes beside the other terms (section 3.3), which teaches the
                 embedding where nuclei have no class; 0 turns it off.
    """

    ce: float = 2.0
    bbox: float = 5.0
    giou: float = 2.0
    label: float = 0.2
    proposals: float = 1.0
    contrastive: float = 0.0
    temperature: float = 0.1
    noise: Range = (0.1, 0.4)

    def __post_init__(self) -> None:
        for name in ("ce", "bbox", "giou", "label", "proposals", "contrastive"):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "0 or more")
        require(self.temperature > 0, "loss.temperature", self.temperature, "above 0")
        require(0 <= self.noise[0] <= self.noise[1] < 1, "loss.noise", self.noise, "a rising pair within 0 to 1")


@dataclass(frozen=True, slots=True)
class CellDETRRecipe(RunLength):
    """Everything a run depends on besides the files of the data sets.

    mode     parallel teaches classes on annotated boxes, sequential on the boxes that the detection decoder gives.
    boxes    parallel mode's boxes: given; noised (0.1 to 0.3 on three in five); denoising adds boxes noised slightly,
             of the same class, and beyond use, of none.
    min_box_px  a nucleus of which the crop's edge leaves less than this is not there.
    score_threshold, thresholds
             least score of a nucleus; validation picks it among `thresholds` where some are given, and the network
             itself keeps all from `score_threshold` on.
    nms_um   of two boxes whose centres lie no farther apart (µm) the surer one is kept, in validation and in the
             entry of the manifest; 0, as published, keeps all.
    """

    id: str = "celldetr"
    mpp: float = 0.25
    crop_px: int = 256
    batch_size: int = 16
    epochs: int = 100
    epoch_samples: int = 4000
    max_minutes: float | None = None
    nuclei_share: float = 0.8
    fold: str | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    channels_last: bool = True
    mode: Mode = "parallel"
    boxes: BoxInput = "given"
    min_box_px: float = 3.0
    score_threshold: float = 0.4
    thresholds: tuple[float, ...] = ()
    nms_um: float = 0.0
    tile_px: int = 512
    monitor: str = "val/f1"
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict)
    model: DetrModelConfig = field(default_factory=DetrModelConfig)
    optim: DetrOptimConfig = field(default_factory=DetrOptimConfig)
    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    loss: DetrLossConfig = field(default_factory=DetrLossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        self.check_length(1, self.fold)
        whole = self.crop_px % 32 == 0 and self.crop_px >= 64
        require(whole, "crop_px", self.crop_px, "a multiple of 32, at least 64")
        require(0 <= self.nuclei_share <= 1, "nuclei_share", self.nuclei_share, "0 to 1")
        require(0 < self.score_threshold < 1, "score_threshold", self.score_threshold, "between 0 and 1")
        within = all(self.score_threshold <= t < 1 for t in self.thresholds)
        require(within, "thresholds", self.thresholds, f"between score_threshold {self.score_threshold} and 1")
        require(0 <= self.nms_um <= 50, "nms_um", self.nms_um, "0 to 50 µm")

    def crops(self) -> Recipe:
        """Return what reading and drawing of crops asks of a recipe."""
        return Recipe(
            mpp=self.mpp,
            crop_px=self.crop_px,
            batch_size=self.batch_size,
            epochs=self.epochs,
            epoch_samples=self.epoch_samples,
            nuclei_share=self.nuclei_share,
            seed=self.seed,
            datasets=self.datasets,
            model=ModelConfig(classes=self.model.classes),
            augment=self.augment,
        )


def load_celldetr_recipe(
    path: Path | None, overrides: Mapping[str, Any] | None = None, encoder_weights: Path | None = None
) -> CellDETRRecipe:
    """Read a recipe from YAML (None: all defaults); `overrides` replace its top-level keys.

    encoder_weights  wins over `model.encoder_weights`.
    Raises UsageError that names an unknown key or a value of the wrong kind.
    """
    recipe = build(CellDETRRecipe, read_document(path, overrides))
    if encoder_weights is None:
        return recipe
    return replace(recipe, model=replace(recipe.model, encoder_weights=str(encoder_weights)))
