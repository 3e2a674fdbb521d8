"""The recipes of both pretrainings: one frozen dataclass a topic, read from YAML, every key checked.

Defaults are the papers' where they state them, else DINO's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cellslide.models.registry import CELLDETR_MEAN, CELLDETR_STD, IMAGENET_MEAN, IMAGENET_STD, architecture_of
from cellslide.train.celldetr.recipe import MatcherConfig
from cellslide.train.recipe import AdamConfig, AugmentConfig, DatasetConfig, Range, Recipe, require
from cellslide.weights.manifest import Triple


@dataclass(frozen=True, slots=True)
class ViewConfig:
    """The views of a sample from an epoch on: two global ones and `n_local` local ones (MUSE, multi-crop).

    global_px, local_px  edges in pixels, 224 and 96 as published, 512 and 208 with a large field of view.
    global_mpp, local_mpp
                         µm/px of the views, drawn uniformly (eq. 4 leaves the law open; 0.25..0.5 is 40x..20x).
    reach                the views of a sample lie in a window of so many edges of its larger global view.
    """

    from_epoch: int = 0
    global_px: int = 224
    local_px: int = 96
    n_local: int = 8
    global_mpp: Range = (0.25, 0.5)
    local_mpp: Range = (0.25, 0.5)
    reach: float = 1.5

    def __post_init__(self) -> None:
        require(self.from_epoch >= 0, "views.from_epoch", self.from_epoch, "0 or more")
        for name in ("global_px", "local_px"):
            px = getattr(self, name)
            require(px >= 32 and px % 16 == 0, f"views.{name}", px, "a multiple of 16, at least 32")
        for name in ("global_mpp", "local_mpp"):
            low, high = getattr(self, name)
            require(0.05 <= low <= high <= 2, f"views.{name}", (low, high), "a rising pair of 0.05 to 2 µm/px")
        require(self.n_local >= 0, "views.n_local", self.n_local, "0 or more")
        require(self.reach >= 1, "views.reach", self.reach, "1 or more")


@dataclass(frozen=True, slots=True)
class BackboneChoice:
    """The network by its registry name and configuration, and the mean and deviation of its images."""

    arch: str = "muse_vit_s"
    config: Mapping[str, Any] = field(default_factory=dict)
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD


@dataclass(frozen=True, slots=True)
class DetrChoice(BackboneChoice):
    """The same for CellDETR, with its published image norm."""

    arch: str = "celldetr"
    mean: Triple = CELLDETR_MEAN
    std: Triple = CELLDETR_STD


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """DINO's projection head, one for images and one for nuclei; its sizes are DINO's, MUSE states none."""

    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3

    def __post_init__(self) -> None:
        for name in ("hidden", "bottleneck", "layers"):
            require(getattr(self, name) >= 1, f"head.{name}", getattr(self, name), "1 or more")
        require(self.prototypes >= 2, "head.prototypes", self.prototypes, "2 or more")


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """Self-distillation: weights of both losses (eq. 7), temperatures, the teacher's momentum and its centre.

    teacher_temp, final_teacher_temp, temp_epochs
                     the teacher's temperature rises between them within these epochs.
    momentum         the teacher follows the student with this at the start, and with 1 at the end (cosine).
    center_momentum  of the running mean that is subtracted from the teacher's logits.
    frozen_epochs    epochs at the start in which the heads' last layers stay as they are.
    """

    image: float = 1.0
    nucleus: float = 1.0
    student_temp: float = 0.1
    teacher_temp: float = 0.04
    final_teacher_temp: float = 0.05
    temp_epochs: float = 30.0
    momentum: float = 0.996
    center_momentum: float = 0.9
    frozen_epochs: float = 1.0

    def __post_init__(self) -> None:
        require(self.image > 0 or self.nucleus > 0, "distill.image", self.image, "above 0 where distill.nucleus is 0")
        for name in ("student_temp", "teacher_temp", "final_teacher_temp"):
            require(getattr(self, name) > 0, f"distill.{name}", getattr(self, name), "above 0")
        for name in ("momentum", "center_momentum"):
            require(0 <= getattr(self, name) <= 1, f"distill.{name}", getattr(self, name), "0 to 1")


@dataclass(frozen=True, slots=True)
class PretrainOptim(AdamConfig):
    """AdamW with warm-up and cosine; the weight decay goes from `weight_decay` to `final_weight_decay` by a cosine.

    backbone_lr_scale  share of the rate that the backbone learns at.
    """

    lr: float = 1e-3
    backbone_lr_scale: float = 1.0
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    warmup_steps: int = 9400
    final_lr: float = 0.001
    grad_clip: float = 3.0

    def __post_init__(self) -> None:
        AdamConfig.__post_init__(self)
        scale = self.backbone_lr_scale
        require(0 < scale <= 1, "optim.backbone_lr_scale", scale, "above 0, at most 1")


@dataclass(frozen=True, slots=True)
class ContrastOptim(PretrainOptim):
    """The same with CellDETR's published values."""

    lr: float = 8e-5
    backbone_lr_scale: float = 0.1
    weight_decay: float = 1e-4
    final_weight_decay: float = 1e-4
    warmup_steps: int = 600
    final_lr: float = 0.0
    grad_clip: float = 0.1


@dataclass(frozen=True, slots=True)
class WatchConfig:
    """When a run counts as collapsed; each limit is a share between 0 and 1 (see `pretrain.watch`).

    patience  epochs in a row that must show it before the run is stopped, if it is asked to stop.
    """

    least_spread: float = 0.05
    least_variety: float = 0.02
    patience: int = 2

    def __post_init__(self) -> None:
        for name in ("least_spread", "least_variety"):
            require(0 <= getattr(self, name) <= 1, f"watch.{name}", getattr(self, name), "0 to 1")
        require(self.patience >= 1, "watch.patience", self.patience, "1 or more")


@dataclass(frozen=True, slots=True)
class PretrainRecipe(Recipe):
    """Everything a pretraining depends on besides its images and nuclei.

    mpp               µm/px at which slides are read.
    field_px          edge of the regions that slides are cut into, at `mpp`.
    min_nuclei        fields with fewer nuclei are left out.
    max_nuclei        nuclei of a sample that take part at most, drawn by chance.
    batch_size        samples in a step over all devices.
    slides_weight     share of samples drawn from slides, relative to the weights of the data sets.
    augment           flips, colour and degradation; scale and place come from the samples.

    An epoch is `epoch_samples` drawn samples; `max_minutes` also ends the run by the clock.
    """

    id: str
    mpp: float = 0.25
    field_px: int = 2048
    min_nuclei: int = 20
    max_nuclei: int = 64
    batch_size: int = 256
    epochs: int = 70
    epoch_samples: int = 483_584
    max_minutes: float | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    slides_weight: float = 1.0
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict)
    model: BackboneChoice = field(default_factory=BackboneChoice)
    optim: PretrainOptim = field(default_factory=PretrainOptim)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        self.check_length(least_batch=1)
        require(self.field_px >= 32, "field_px", self.field_px, "32 or more")
        require(self.max_nuclei >= 1, "max_nuclei", self.max_nuclei, "1 or more")


@dataclass(frozen=True, slots=True)
class MuseRecipe(PretrainRecipe):
    """A MUSE pretraining, at the published sizes.

    views  what is cut, by the epoch from which it holds: the field of view may grow.
    """

    id: str = "muse"
    views: tuple[ViewConfig, ...] = (ViewConfig(),)
    head: HeadConfig = field(default_factory=HeadConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        PretrainRecipe.__post_init__(self)
        require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more")
        starts = [view.from_epoch for view in self.views]
        rising = bool(starts) and starts[0] == 0 and starts == sorted(set(starts))
        require(rising, "views.from_epoch", starts, "0 for the first, and rising")

    def network(self) -> dict[str, Any]:
        """Return the manifest entry's keys of the network; raises UsageError if it is no MUSE."""
        arch = self.model.arch
        require(architecture_of(arch).family == "muse", "model.arch", arch, "muse, muse_vit_s, muse_vit_b or muse_r50")
        return PretrainRecipe.network(self)

    def views_at(self, epoch: int) -> ViewConfig:
        """Return the views of an epoch."""
        return [view for view in self.views if view.from_epoch <= epoch][-1]


@dataclass(frozen=True, slots=True)
class NoiseConfig:
    """Box noise (CellDETR, eqs 5-6) and InfoNCE.

    low, high     bounds of the relative change of size and centre: 0.1 and 0.4 in the paper, 0.3 and 0.7 in its code.
    enlarge_p     chance that a side grows rather than shrinks.
    temperature   of InfoNCE: 0.1 in the paper, 0.5 in its code.
    """

    low: float = 0.1
    high: float = 0.4
    enlarge_p: float = 0.5
    temperature: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.low <= self.high < 1, "noise.low", (self.low, self.high), "a rising pair of 0 to below 1")
        require(0 <= self.enlarge_p <= 1, "noise.enlarge_p", self.enlarge_p, "0 to 1")
        require(self.temperature > 0, "noise.temperature", self.temperature, "above 0")


@dataclass(frozen=True, slots=True)
class CellDETRPretrainRecipe(PretrainRecipe):
    """A cell-level contrastive pretraining.

    crop_px     edge of the crops at `mpp` (256 as published), a multiple of 32.
    detection   weight of the detector's own terms, whose boxes are known too; 0 leaves it as it is.
    matcher     weights of these terms, and of the matching.
    box_um      edge of the box put around a nucleus of which only the centre is known.
    """

    id: str = "celldetr-contrastive"
    crop_px: int = 256
    field_px: int = 1024
    min_nuclei: int = 4
    max_nuclei: int = 100
    box_um: float = 8.0
    batch_size: int = 16
    epochs: int = 30
    epoch_samples: int = 64_000
    model: DetrChoice = field(default_factory=DetrChoice)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    detection: float = 1.0
    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    optim: ContrastOptim = field(default_factory=ContrastOptim)

    def __post_init__(self) -> None:
        PretrainRecipe.__post_init__(self)
        require(self.crop_px >= 32 and self.crop_px % 32 == 0, "crop_px", self.crop_px, "a multiple of 32")
        require(self.min_nuclei >= 2, "min_nuclei", self.min_nuclei, "2 or more: a nucleus is told from others")
        require(self.max_nuclei >= 2, "max_nuclei", self.max_nuclei, "2 or more")
        require(self.detection >= 0, "detection", self.detection, "0 or more")
        require(self.box_um > 0, "box_um", self.box_um, "above 0")

    def network(self) -> dict[str, Any]:
        """Return the manifest entry's keys of the network: no classes, and the head of the contrast.

        Raises UsageError for one that has no representation to contrast.
        """
        model = self.model
        ok = model.arch == "celldetr" and model.config.get("repr_layers", 1) > 0
        require(ok, "model", model.arch, "celldetr with config.repr_layers 1 or more")
        config = {**model.config, "num_classes": 0, "projection": True}
        return {**PretrainRecipe.network(self), "config": config, "task": "backbone"}
