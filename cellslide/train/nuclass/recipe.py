"""The recipe of a NuClass training: one for its three stages, each of which reads what concerns it.

Defaults are the paper's table A2 (path local), A3 and A4 for what those stages alone read, but for the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cellslide.errors import UsageError
from cellslide.models.registry import IMAGENET_MEAN, IMAGENET_STD
from cellslide.train.recipe import (
    AdamConfig,
    AugmentConfig,
    LabelConfig,
    Recipe,
    ValConfig,
    build,
    class_specs,
    load_recipe,
    read_document,
    require,
)
from cellslide.types import CropSpec

Stage = Literal["local", "global", "gate"]


@dataclass(frozen=True, slots=True)
class CellSetConfig:
    """How one set of typed points is used.

    split, val        the rows of the manifest that train, and those that validate; "test" is never read.
    exclude_patients  patients that are left out altogether, because they stand in a set kept for evaluation.
    organ             one of the recipe's organs; None takes the manifest's where its first word is one, else unknown.
    mpp               µm/px of the images where the manifest states none.
    classes           names of the points' classes that the recipe calls otherwise; points of other classes are dropped.
    folds             whether its images validate in a cross-validation.
    """

    split: str | None = "train"
    val: ValConfig = field(default_factory=ValConfig)
    exclude_patients: tuple[str, ...] = ()
    organ: str | None = None
    mpp: float | None = None
    classes: Mapping[str, str] = field(default_factory=dict)
    folds: bool = True

    def __post_init__(self) -> None:
        require(self.split != "test", "datasets.split", self.split, "another split: test data never enters training")
        require(self.val.split != "test", "datasets.val.split", self.val.split, "another split than test")


@dataclass(frozen=True, slots=True)
class CellOptimConfig(AdamConfig):
    """AdamW with a rate of its own for heads, the local backbone and the context backbone.

    layer_decay  each earlier layer of a backbone learns at this share of the next one's rate.
    """

    backbone_lr: float = 3e-6
    context_lr: float = 1e-6
    layer_decay: float = 0.85
    weight_decay: float = 2e-5
    schedule: Literal["exponential", "cosine", "constant"] = "constant"
    warmup_steps: int = 1500

    def __post_init__(self) -> None:
        AdamConfig.__post_init__(self)
        for name in ("backbone_lr", "context_lr"):
            require(getattr(self, name) > 0, f"optim.{name}", getattr(self, name), "above 0")
        require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0, at most 1")


@dataclass(frozen=True, slots=True)
class PathLossConfig:
    """Loss of a path: label smoothing, effective-number weights, and for the global path eqs 11-14.

    gamma, lambda_stable  exponent of the local-aware weight, and share of the loss that does not weigh.
    """

    smoothing: float = 0.1
    effective_beta: float = 0.9999
    gamma: float = 2.0
    lambda_stable: float = 0.3

    def __post_init__(self) -> None:
        require(0 <= self.smoothing < 1, "loss.smoothing", self.smoothing, "0 up to, not including, 1")
        require(0 <= self.effective_beta < 1, "loss.effective_beta", self.effective_beta, "0 up to, not including, 1")


@dataclass(frozen=True, slots=True)
class ContextConfig:
    """Training of the global path.

    dropout       share of the cells whose projected context is set to 0.
    alpha_start, alpha_epochs
                  the projected context is scaled by alpha, which rises from the first to 1 within these epochs.
    shift_px      the context is centred off the nucleus by up to so many plane pixels, so that contexts may be shared.
    freeze        leave the context's backbone as it is, as published.
    start_from_local
                  the context's backbone begins with the local one's weights, where both are of one architecture.
    """

    dropout: float = 0.1
    alpha_start: float = 0.25
    alpha_epochs: float = 2.0
    shift_px: float = 0.0
    freeze: bool = True
    start_from_local: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, "context_training.dropout", self.dropout, "0 up to, not including, 1")
        require(self.shift_px >= 0, "context_training.shift_px", self.shift_px, "0 or more")


@dataclass(frozen=True, slots=True)
class GateLossConfig:
    """Eqs 19-24 and how the gate is trained (table A4; kappa and the Delta terms from the published code).

    views       augmented passes over the cells whose features are kept; 0 keeps the crops as they are, once.
    heads_lr    rate of both paths' heads once `gate_only_epochs` are over; 0 leaves them frozen.
    """

    kappa: float = 10.0
    conflict: float = 2.0
    lambda_delta: float = 1.0
    gamma_delta: float = 1.0
    lambda_align: float = 0.1
    lambda_entropy: float = 0.05
    lambda_aux: float = 0.05
    views: int = 1
    gate_only_epochs: float = 0.5
    heads_lr: float = 0.0

    def __post_init__(self) -> None:
        require(self.views >= 0, "gate.views", self.views, "0 or more")
        require(self.heads_lr >= 0, "gate.heads_lr", self.heads_lr, "0 or more")


@dataclass(frozen=True, slots=True)
class NuClassRecipe(Recipe):
    """Everything a stage depends on besides the files of the data sets.

    local, context    the crops, in pixels of the plane at `mpp`.
    model             configuration of the network without its classes and organs.
    unknown_organ_p   share of the cells whose organ is hidden, which trains the embedding of an unknown one.
    jitter_px         the local crop is centred off the point by up to so many plane pixels.
    freeze_epochs     epochs at the start in which the local backbone (and, in the global path, what came from the
                      local one) is frozen: probe warm-up, E_freeze.
    monitor           validation score whose best epoch is kept.
    labels            which labels of slides count; val_cells: at most so many cells of an image validate, drawn once.

    An epoch is `epoch_samples` cells; each cell comes once before any comes again. `max_minutes` also ends the run by
    the clock, and a cosine then follows whichever is further.
    """

    id: str = "nuclass"
    mpp: float = 0.25
    local: CropSpec = field(default_factory=lambda: CropSpec(224, 224))
    context: CropSpec = field(default_factory=lambda: CropSpec(1024, 1024))
    classes: tuple[str, ...] = ()
    organs: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    unknown_organ_p: float = 0.1
    jitter_px: float = 0.0
    batch_size: int = 64
    epochs: int = 50
    epoch_samples: int = 16384
    max_minutes: float | None = None
    freeze_epochs: float = 1.0
    monitor: str = "val/macro_f1"
    fold: str | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = True
    labels: LabelConfig = field(default_factory=LabelConfig)
    val_cells: int | None = None
    datasets: Mapping[str, CellSetConfig] = field(default_factory=dict)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: CellOptimConfig = field(default_factory=CellOptimConfig)
    loss: PathLossConfig = field(default_factory=PathLossConfig)
    context_training: ContextConfig = field(default_factory=ContextConfig)
    gate: GateLossConfig = field(default_factory=GateLossConfig)

    def __post_init__(self) -> None:
        self.check_length(2, self.fold)
        require(len(self.classes) >= 2, "classes", list(self.classes), "two names or more")
        require(self.val_cells is None or self.val_cells > 0, "val_cells", self.val_cells, "above 0")
        require(0 <= self.unknown_organ_p <= 1, "unknown_organ_p", self.unknown_organ_p, "0 to 1")

    def network(self) -> dict[str, Any]:
        """Return the manifest entry's keys of the network, but its sizes, which the stage decides."""
        found = {"arch": "nuclass", "mean": self.mean, "std": self.std}
        return found | {"classes": class_specs(self.classes), "organs": self.organs}

    def stage_config(self, stage: Stage) -> dict[str, Any]:
        """Return the network's sizes in a stage; classes and organs are counted by who lists them."""
        missing: dict[Stage, dict[str, Any]] = {"local": {"context": None}, "global": {"gate": False}, "gate": {}}
        return {**self.model, **missing[stage]}


# What a later stage takes from the run before it where its own recipe is silent, and what must then be the same.
INHERITED = ("mpp", "local", "context", "classes", "organs", "model", "mean", "std", "datasets", "augment",
             "labels", "val_cells", "unknown_organ_p", "jitter_px", "channels_last", "precision")  # fmt: skip
SAME = ("mpp", "local", "classes", "organs", "model", "mean", "std")


def load_nuclass_recipe(path: Path | None, overrides: Mapping[str, Any], before: Path | None = None) -> NuClassRecipe:
    """Read a recipe from YAML, its keys replaced by `overrides`; `before` is the folder of the stage before.

    Raises UsageError on unknown keys, wrong kinds, and where the network or its crops differ from those of `before`.
    """
    if before is None:
        return load_recipe(NuClassRecipe, path, overrides)
    if not (before / "recipe.yaml").is_file():
        raise UsageError(f"{before}: not the folder of a training run, recipe.yaml is missing")
    known = load_recipe(NuClassRecipe, before / "recipe.yaml").as_dict()
    document = read_document(path, overrides)
    recipe = build(NuClassRecipe, {**{key: known[key] for key in INHERITED}, **document})
    now = recipe.as_dict()
    other = [key for key in SAME if now[key] != known[key]]
    if other:
        raise UsageError(f"--recipe: {', '.join(other)} must be as in the stage before ({before}); leave them out")
    return recipe
