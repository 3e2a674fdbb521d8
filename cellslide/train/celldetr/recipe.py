"""The recipe of a CellDETR training; defaults are the published code's where it has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cellslide.models.registry import CELLDETR_MEAN, CELLDETR_STD
from cellslide.train.hover.recipe import HoverRecipe
from cellslide.train.recipe import (
    AdamConfig,
    AugmentConfig,
    DatasetConfig,
    LabelConfig,
    ModelConfig,
    Range,
    Recipe,
    class_specs,
    require,
)

Mode = Literal["parallel", "sequential"]
BoxInput = Literal["given", "noised", "denoising"]


@dataclass(frozen=True, slots=True)
class DetrModelConfig:
    """The network's configuration, how its images are normalised, its classes, and weights to begin with.

    classes          names of the points' classes, in order; empty finds nuclei without typing them.
    probe            only the layer of the classes learns, on the frozen features of the weights of --init.
    encoder_weights  file with the backbone's weights, under any prefix; encoder_licence: theirs, where the file does
                     not say it.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = CELLDETR_MEAN
    std: tuple[float, float, float] = CELLDETR_STD
    classes: tuple[str, ...] = ()
    probe: bool = False
    encoder_weights: str | None = None
    encoder_licence: str | None = None


@dataclass(frozen=True, slots=True)
class DetrOptimConfig(AdamConfig):
    """AdamW; the backbone learns at `encoder_lr_scale` of the rate, sampling offsets at `point_lr_scale` of it."""

    lr: float = 8e-5
    encoder_lr_scale: float = 0.1
    point_lr_scale: float = 1.0
    warmup_steps: int = 600
    final_lr: float = 0.0
    grad_clip: float = 0.1

    def __post_init__(self) -> None:
        AdamConfig.__post_init__(self)
        require(0 <= self.encoder_lr_scale <= 1, "optim.encoder_lr_scale", self.encoder_lr_scale, "0 to 1")


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
class CellDETRRecipe(Recipe):
    """Everything a run depends on besides the files of the data sets.

    mode     parallel teaches classes on annotated boxes, sequential on the boxes that the detection decoder gives.
    boxes    parallel mode's boxes: given; noised (0.1 to 0.3 on three in five); denoising adds boxes noised slightly,
             of the same class, and beyond use, of none.
    min_box_px  a nucleus of which the crop's edge leaves less than this is not there.
    score_threshold, thresholds
             least score of a nucleus; validation picks it among `thresholds` where some are given, and the network
             itself keeps all from `score_threshold` on.
    labels   which labels of slides count; of each slide `val_fields` squares of VAL_FIELD_PX validate.
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
    labels: LabelConfig = field(default_factory=LabelConfig)
    val_fields: int = 16
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict)
    model: DetrModelConfig = field(default_factory=DetrModelConfig)
    optim: DetrOptimConfig = field(default_factory=DetrOptimConfig)
    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    loss: DetrLossConfig = field(default_factory=DetrLossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        self.check_length(1, self.fold)
        require(self.val_fields >= 0, "val_fields", self.val_fields, "0 or more")
        whole = self.crop_px % 32 == 0 and self.crop_px >= 64
        require(whole, "crop_px", self.crop_px, "a multiple of 32, at least 64")
        require(0 <= self.nuclei_share <= 1, "nuclei_share", self.nuclei_share, "0 to 1")
        require(0 < self.score_threshold < 1, "score_threshold", self.score_threshold, "between 0 and 1")
        within = all(self.score_threshold <= t < 1 for t in self.thresholds)
        require(within, "thresholds", self.thresholds, f"between score_threshold {self.score_threshold} and 1")
        require(0 <= self.nms_um <= 50, "nms_um", self.nms_um, "0 to 50 µm")

    def network(self) -> dict[str, Any]:
        """Return the manifest entry's keys of the network: classes counted by who lists them, the training's mode.

        Raises UsageError for a network that cannot learn what the recipe asks.
        """
        model, n_classes, contrast = self.model, len(self.model.classes), self.loss.contrastive > 0
        own = {"num_classes": n_classes, "projection": contrast, "placed": n_classes > 0 or not contrast}
        config = {**own, "mode": self.mode, "score_threshold": self.score_threshold, **model.config}
        det_classes, layers = config.get("det_classes", 1), config.get("repr_layers", 1)
        require(det_classes == 1, "model.config.det_classes", det_classes, "1; the representation decoder types nuclei")
        require(not model.probe or n_classes > 0, "model.probe", model.probe, "false without model.classes")
        require(layers > 0 or n_classes == 0, "model.config.repr_layers", layers, "1 or more with model.classes")
        classes = class_specs(model.classes)
        return {"arch": "celldetr", "config": config, "mean": model.mean, "std": model.std, "classes": classes}

    def crops(self) -> HoverRecipe:
        """Return what reading and drawing of crops asks of a recipe."""
        names = (
            "mpp",
            "crop_px",
            "batch_size",
            "epochs",
            "epoch_samples",
            "nuclei_share",
            "seed",
            "datasets",
            "augment",
        )
        return HoverRecipe(
            **{name: getattr(self, name) for name in names}, model=ModelConfig(classes=self.model.classes)
        )
