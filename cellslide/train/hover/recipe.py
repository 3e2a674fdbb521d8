"""The recipe of a network with HoVer-Net's maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cellslide.train.recipe import AugmentConfig, DatasetConfig, ModelConfig, OptimConfig, Range, Recipe, require


@dataclass(frozen=True, slots=True)
class LossConfig:
    """Weights of the loss terms (CellViT's by default) and the shape of the focal Tversky loss."""

    np_dice: float = 1.0
    np_tversky: float = 1.0
    np_ce: float = 0.0
    hv_mse: float = 2.5
    hv_msge: float = 8.0
    nt_ce: float = 0.5
    nt_dice: float = 0.2
    nt_tversky: float = 0.5
    tversky_alpha: float = 0.7
    tversky_beta: float = 0.3
    tversky_gamma: float = 4 / 3


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """HoVer decode of the trained model, used for validation and written to its card."""

    mode: Literal["published", "fixed"] = "fixed"
    kernel_px: int = 11
    min_marker_px: int = 3
    min_object_px: int = 10
    energy_threshold: float = 0.4
    foreground_threshold: float = 0.5
    hv_gradient_range: Range | None = None


@dataclass(frozen=True, slots=True)
class HoverRecipe(Recipe):
    """Everything a run depends on besides the files of the data sets.

    An epoch is `epoch_samples` drawn crops of `crop_px`; `max_minutes` also ends the run by the clock, and the learning
    rate then follows whichever is further, steps or time (so such a run repeats only as far as the clock does).
    """

    id: str = "cellvta-small"
    mpp: float = 0.5
    crop_px: int = 256
    batch_size: int = 8
    epochs: int = 50
    epoch_samples: int = 800
    max_minutes: float | None = None
    nuclei_share: float = 0.8
    fold: str | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = True
    monitor: str = "val/bpq"
    tile_px: int | None = None
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        self.check_length(1, self.fold)
        whole = self.crop_px % 16 == 0 and self.crop_px >= 32
        require(whole, "crop_px", self.crop_px, "a multiple of 16, at least 32")
        require(0 <= self.nuclei_share <= 1, "nuclei_share", self.nuclei_share, "0 to 1")
