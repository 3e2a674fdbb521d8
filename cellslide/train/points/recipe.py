"""The recipe of a point detector's training.

Defaults are MUSE's where its paper states them, and DPA-P2PNet's, whose head it follows, where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cellslide.models.registry import IMAGENET_MEAN, IMAGENET_STD
from cellslide.train.recipe import AugmentConfig, DatasetConfig, LabelConfig, ModelConfig, OptimConfig, Recipe, require

FIELD_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class PointLossConfig:
    """Costs of the matching, weights of the loss terms, and what a proposal without a nucleus weighs.

    cost_distance, cost_class  Hungarian matching: the first times the distance in px, minus the second times p(class).
    classification, background, class_weight
                   cross entropy over classes and background; a weight for each class (none: all 1).
    regression     on the squared distance in px², summed over the matched points and divided by their number.
    mask, mask_alpha, mask_gamma
                   focal loss of the auxiliary mask, the mean over the pixels that are known.
    """

    cost_distance: float = 0.1
    cost_class: float = 1.0
    classification: float = 1.0
    background: float = 0.4
    class_weight: tuple[float, ...] = ()
    regression: float = 5e-3
    mask: float = 1.0
    mask_alpha: float = 0.25
    mask_gamma: float = 2.0

    def __post_init__(self) -> None:
        for name in ("cost_distance", "cost_class", "classification", "regression", "mask"):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "0 or more")
        require(self.background > 0, "loss.background", self.background, "above 0")
        require(0 <= self.mask_alpha <= 1, "loss.mask_alpha", self.mask_alpha, "0 to 1")


@dataclass(frozen=True, slots=True)
class ConsistencyConfig:
    """Learning outside the annotated window from the points that an averaged teacher finds there.

    weight     reached at the end of the run, as weight * (1 - cos(pi i / N)) / 2 at step i of N; 0 turns it off.
    threshold  least confidence of a teacher's point that counts.
    ema        decay of the teacher's weights.
    """

    weight: float = 0.0
    threshold: float = 0.7
    ema: float = 0.999

    def __post_init__(self) -> None:
        require(self.weight >= 0, "consistency.weight", self.weight, "0 or more (0.1 as published)")
        require(0 < self.threshold < 1, "consistency.threshold", self.threshold, "between 0 and 1")
        require(0 <= self.ema < 1, "consistency.ema", self.ema, "0 up to, not including, 1")


@dataclass(frozen=True, slots=True)
class PointDetectConfig:
    """How the trained model's points are read, in validation and in its entry of the manifest.

    score_threshold  least 1 - p(background) of a point whose best class is not background.
    nms_um           of two points at most so far apart the surer one is kept.
    """

    score_threshold: float = 0.4
    nms_um: float = 3.0

    def __post_init__(self) -> None:
        require(0 <= self.score_threshold < 1, "detect.score_threshold", self.score_threshold, "0 up to 1")
        require(self.nms_um >= 0, "detect.nms_um", self.nms_um, "0 or more")


@dataclass(frozen=True, slots=True)
class PointModelConfig(ModelConfig):
    """The same for a point detector: MUSE takes ImageNet's mean and standard deviation."""

    arch: str = "muse_points"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True, slots=True)
class PointsRecipe(Recipe):
    """Everything a run depends on besides the files of the data sets.

    field_px      edge of the fields that the network sees; larger than the annotated windows for large-field training
                  (1024 published): a window then lies anywhere in its field.
    centred       share of the fields centred near a nucleus, where a field is smaller than its window.
    balance       share of those whose nucleus is drawn after its class, each class alike.
    mask_radius_um  the auxiliary mask of points: nucleus within this, background beyond twice of it.
    labels        which labels of slides count; of each slide `val_fields` squares of VAL_FIELD_PX validate.
    """

    id: str = "muse-points"
    mpp: float = 0.5
    field_px: int = 1024
    batch_size: int = 4
    epochs: int = 150
    epoch_samples: int = 80
    max_minutes: float | None = None
    centred: float = 0.5
    balance: float = 0.0
    mask_radius_um: float = 2.0
    fold: str | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = True
    monitor: str = "val/mean_f1"
    labels: LabelConfig = field(default_factory=LabelConfig)
    val_fields: int = 16
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict)
    tile_px: int | None = None
    model: PointModelConfig = field(default_factory=PointModelConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-4, betas=(0.9, 0.999), schedule="cosine", final_lr=0.1)
    )
    loss: PointLossConfig = field(default_factory=PointLossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    detect: PointDetectConfig = field(default_factory=PointDetectConfig)

    def __post_init__(self) -> None:
        self.check_length(1, self.fold)
        require(self.val_fields >= 0, "val_fields", self.val_fields, "0 or more")
        whole = self.field_px % FIELD_MULTIPLE == 0 and self.field_px >= FIELD_MULTIPLE
        require(whole, "field_px", self.field_px, f"a multiple of {FIELD_MULTIPLE}")
        for name in ("centred", "balance"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        require(self.mask_radius_um > 0, "mask_radius_um", self.mask_radius_um, "above 0")
        require(bool(self.model.classes), "model.classes", "empty", "the names of the classes, in the output's order")
        n, given = len(self.model.classes), len(self.loss.class_weight)
        require(given in (0, n), "loss.class_weight", list(self.loss.class_weight), f"empty or {n} numbers")

    def network(self) -> dict[str, Any]:
        """Return the manifest entry's keys of the network; its classes are those that the recipe names."""
        head = dict(self.model.config.get("head") or {})
        n = len(self.model.classes)
        given = head.setdefault("n_classes", n)
        require(given == n, "model.config.head.n_classes", given, f"{n}, as model.classes names")
        return {**Recipe.network(self), "config": {**self.model.config, "head": head}}
