"""The recipe of a fusion training; defaults are the paper's (Martinelli et al. 2026, A.2) where it states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cellslide.models.fusion_config import TilePool, Variant
from cellslide.models.registry import HALVES, Triple
from cellslide.train.recipe import AdamConfig, Fold, Recipe, require


@dataclass(frozen=True, slots=True)
class FusionChoice:
    """The network (see `models.fusion_config.FusionConfig`), what of it stays as it is, and the norm of its images."""

    variant: Variant = "early_add"
    vit: str = "vit_small_patch16_224"
    vit_args: Mapping[str, Any] = field(default_factory=dict)
    expr_dim: int = 32
    expr_layers: int = 1
    gate: bool = False
    token_head: bool = False
    freeze_vit: bool = False
    mean: Triple = HALVES
    std: Triple = HALVES
    encoder_weights: str | None = None
    encoder_licence: str | None = None


@dataclass(frozen=True, slots=True)
class FusionOptim(AdamConfig):
    """AdamW: the head learns at `lr`, the ViT at `backbone_lr`, MLP and what joins at `expr_lr`, the gate at its own.

    The published code has MLP, projection and norms at the ViT's rate: `expr_lr` None means that.
    """

    lr: float = 1e-4
    backbone_lr: float = 1e-5
    expr_lr: float | None = None
    gate_lr: float = 1e-3
    weight_decay: float = 1e-3
    warmup_steps: int = 3760

    def __post_init__(self) -> None:
        AdamConfig.__post_init__(self)
        for name in ("backbone_lr", "expr_lr", "gate_lr"):
            rate = getattr(self, name)
            require(rate is None or rate > 0, f"optim.{name}", rate, "above 0")


@dataclass(frozen=True, slots=True)
class FusionRecipe(Recipe):
    """Everything a fusion training depends on besides its samples.

    mpp, stride       pixel size of the tiles (256 µm on 224 px), and patches from one to the next.
    min_transcripts   fewer of all genes leave a tile out; least_qv: those of lower quality do not count.
    source_panel, target_panel
                      genes that are read and predicted; no sources: all genes of the training slides that are no
                      targets; targets "hvg:N": the N most variable ones of the training slides alone.
    tile_pool         how a tile's vector is made of its patches where a variant reads one; the target is the sum.
    missing_genes     what a gene that a bundle lacks is: an error, or zero.
    flips             mirror and turn tiles with their patches.
    patience          end after so many epochs without a better validation error; 0 never does.
    """

    id: str = "morpho-fusion"
    mpp: float = 256 / 224
    stride: int = 7
    min_transcripts: int = 1000
    least_qv: float = 20.0
    source_panel: tuple[str, ...] = ()
    target_panel: tuple[str, ...] | str = ()
    tile_pool: TilePool = "mean"
    missing_genes: Literal["error", "zero"] = "error"
    loss: Literal["mse", "huber"] = "mse"
    flips: bool = False
    patience: int = 10
    fold: str | None = None
    batch_size: int = 256
    epochs: int = 35
    epoch_samples: int = 192_512
    max_minutes: float | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    monitor: str = "val/negative_mse"
    model: FusionChoice = field(default_factory=FusionChoice)
    optim: FusionOptim = field(default_factory=FusionOptim)

    def __post_init__(self) -> None:
        self.check_length(least_batch=1, fold=self.fold)
        require(self.stride >= 1, "stride", self.stride, "1 or more patches")
        require(self.min_transcripts >= 0, "min_transcripts", self.min_transcripts, "0 or more")
        require(self.patience >= 0, "patience", self.patience, "0 or more")

    contrast = False

    def network(self) -> dict[str, Any]:
        """Return the manifest entry's keys of the network."""
        model = self.model
        names = ("variant", "vit", "vit_args", "expr_dim", "expr_layers", "gate", "token_head")
        config = {name: getattr(model, name) for name in names}
        config["vit_args"] = dict(model.vit_args)
        config |= {
            "genes_in": list(self.source_panel) if model.variant != "morph_only" else [],
            "contrast": self.contrast,
        }
        config["genes_out"] = [] if self.contrast else list(self.target_panel)
        config["tiles"] = {"stride": self.stride, "pool": self.tile_pool, "least_qv": self.least_qv}
        return {"arch": "morpho_fusion", "config": config, "mean": model.mean, "std": model.std}

    @property
    def parts(self) -> Fold | None:
        """The fold, or None."""
        return Fold.of(self.fold)


@dataclass(frozen=True, slots=True)
class ClipRecipe(FusionRecipe):
    """A contrastive pretraining of both encoders; genes are those of `source_panel`, a batch is the pool of each."""

    id: str = "morpho-clip"
    monitor: str = "val/recall@1"
    model: FusionChoice = field(default_factory=lambda: FusionChoice(variant="late_add_token"))

    contrast = True
