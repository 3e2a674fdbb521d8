"""Training of NuClass: each path with its own loss, freezing and rates; the gate on kept features of frozen paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cellslide.errors import UsageError
from cellslide.models import build_model
from cellslide.models.backbones import to_timm
from cellslide.models.nuclass import NuClass, ParameterGroup, Part
from cellslide.models.state_dict import below
from cellslide.train.export import WEIGHTS, load_fitting, read_state
from cellslide.train.framework import accelerator_of
from cellslide.train.loaders import draw_loader
from cellslide.train.module import Group, Training, adamw
from cellslide.train.nuclass.cells import CellCrops, CellDataset, class_counts, exact_loader, images_of, normalise
from cellslide.train.nuclass.features import FeatureBatch, feature_loaders, kept_features
from cellslide.train.nuclass.losses import balanced_cross_entropy, effective_number_weights, gate_loss, global_loss
from cellslide.train.nuclass.recipe import CellOptimConfig, NuClassRecipe, Stage
from cellslide.train.task import FitOptions, Run
from cellslide.types import Float32, Int64

PathStage = Literal["local", "global"]
PARTS: dict[PathStage, tuple[Part, ...]] = {
    "local": ("local_backbone", "local_head"),
    "global": ("global_backbone", "context_backbone", "global_head"),
}


class PathTraining(Training):
    """Trains the local path, or the global path beside a frozen local one.

    `class_weight` is float32 (K,). What is frozen for the time being has no gradient and stays in evaluation mode.
    """

    def __init__(self, recipe: NuClassRecipe, model: NuClass, stage: PathStage, class_weight: Float32) -> None:
        super().__init__(recipe, model.to(memory_format=torch.channels_last) if recipe.channels_last else model)
        self.recipe, self.stage = recipe, stage
        self.register_buffer("class_weight", torch.from_numpy(class_weight), persistent=False)
        self._seen = Scores()

    @property
    def net(self) -> NuClass:
        """The network."""
        assert isinstance(self.model, NuClass)
        return self.model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over what the stage ever trains; each part has its rate, earlier layers a share of it."""
        learning = [g for g in self.net.parameter_groups() if g.part in PARTS[self.stage] and not self._never(g.part)]
        return make_optimizer(learning, self.recipe.optim)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this step, set its rate, and freeze what is frozen at this point of the run."""
        super().on_train_batch_start(batch, batch_idx)
        self.freeze_parts()

    @property
    def epochs_done(self) -> float:
        """Epochs so far, as a fraction."""
        return self.global_step / self.recipe.epoch_steps

    def _never(self, part: Part) -> bool:
        return part == "context_backbone" and self.recipe.context_training.freeze

    def freeze_parts(self) -> None:
        """Leave alone the other path, the crop's backbone in the probe warm-up, and the context's if so wished."""
        warm = self.epochs_done >= self.recipe.freeze_epochs
        for part, module in self.net.parts():
            learns = part in PARTS[self.stage] and not self._never(part)
            learns = learns and (warm or part not in ("local_backbone", "global_backbone"))
            module.requires_grad_(learns)
            module.train(learns)

    def training_step(self, batch: CellCrops, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its parts; raises FloatingPointError if it is not finite."""
        parts = self._local_step(batch) if self.stage == "local" else self._global_step(batch)
        return self.log_losses(torch.stack(list(parts.values())).sum(), parts, len(batch.label))

    def _per_cell(self, logits: Tensor, label: Tensor) -> Tensor:
        return balanced_cross_entropy(logits, label, self.class_weight, self.recipe.loss.smoothing)

    def _local_step(self, batch: CellCrops) -> dict[str, Tensor]:
        logits = self.net.local_path(normalise(batch.local, self.recipe), batch.organ).logits
        return {"cross_entropy": self._per_cell(logits, batch.label).mean()}

    def _global_step(self, batch: CellCrops) -> dict[str, Tensor]:
        local_image = normalise(batch.local, self.recipe)
        with torch.no_grad():
            local = self.net.local_path(local_image, batch.organ)
            p_true = local.logits.float().softmax(1).gather(1, batch.label[:, None])[:, 0]
        v = self.net.context_vector(normalise(batch.context, self.recipe))
        u = local.raw if self.net.shares_backbone else None
        logits = self.net.global_path(local_image, v, u, self.context_scale(v)).logits
        config = self.recipe.loss
        parts = global_loss(self._per_cell(logits, batch.label), p_true, config.gamma, config.lambda_stable)
        return {"main": parts.main, "stable": parts.stable}

    def context_scale(self, v: Tensor) -> Tensor:
        """Return the factor (B,) of each cell's projected context: the warm-up's alpha, 0 where it is dropped."""
        config = self.recipe.context_training
        share = min(self.epochs_done / config.alpha_epochs, 1.0) if config.alpha_epochs > 0 else 1.0
        alpha = config.alpha_start + (1 - config.alpha_start) * share
        kept = torch.rand(len(v)) >= config.dropout
        return (alpha * kept).to(v.device)

    def validation_step(self, batch: CellCrops, batch_idx: int) -> None:
        """Collect the probabilities of one batch of cells as they are."""
        local = self.net.local_path(normalise(batch.local, self.recipe), batch.organ)
        logits = local.logits
        if self.stage == "global":
            v = self.net.context_vector(normalise(batch.context, self.recipe))
            u = local.raw if self.net.shares_backbone else None
            logits = self.net.global_path(normalise(batch.local, self.recipe), v, u).logits
        self._seen.add(logits.float().softmax(1), batch.label)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy, macro F1 and negative log likelihood over all validation cells."""
        for name, value in self._seen.take().items():
            self.log(f"val/{name}", value)


def make_optimizer(groups: Sequence[ParameterGroup], optim: CellOptimConfig) -> torch.optim.Optimizer:
    """Return AdamW; a part has its own rate, a layer `layer_decay` of the next one's, and vectors no weight decay."""
    rates = {"local_backbone": optim.backbone_lr, "global_backbone": optim.backbone_lr}
    rates |= {"context_backbone": optim.context_lr}
    made = []
    for group in groups:
        scale = rates.get(group.part, optim.lr) / optim.lr * optim.layer_decay**group.depth
        for decays in (True, False):
            chosen = [p for p in group.parameters if (p.ndim > 1) == decays]
            if chosen:
                made.append(Group(chosen, scale, decays))
    return adamw(made, optim)


class GateTraining(Training):
    """Trains the gate, and later the paths' heads where the recipe says so, on kept features of frozen paths."""

    def __init__(self, recipe: NuClassRecipe, model: NuClass) -> None:
        super().__init__(recipe, model)
        self.recipe = recipe
        self._seen = {name: Scores() for name in ("mix", "local", "global")}

    @property
    def net(self) -> NuClass:
        """The network."""
        assert isinstance(self.model, NuClass)
        return self.model

    def heads(self) -> list[nn.Module]:
        """Return the last layers of both paths, which kept features lead to."""
        assert self.net.modelB is not None
        return [self.net.modelA.head, self.net.modelB.head]

    def freeze_parts(self) -> bool:
        """Leave alone all but the gate, and the heads until their time comes; return whether they learn."""
        config = self.recipe.gate
        heads_train = config.heads_lr > 0 and self.global_step / self.recipe.epoch_steps >= config.gate_only_epochs
        for part, module in self.net.parts():
            module.requires_grad_(part == "gate")
            module.train(part == "gate")
        for head in self.heads():
            head.requires_grad_(heads_train)
            head.train(heads_train)
        return heads_train

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the gate, and over the heads at their own rate."""
        optim, heads_lr = self.recipe.optim, self.recipe.gate.heads_lr
        optimizer = make_optimizer([g for g in self.net.parameter_groups() if g.part == "gate"], optim)
        if heads_lr > 0:
            parameters = [p for head in self.heads() for p in head.parameters()]
            optimizer.add_param_group({"params": parameters, "lr_scale": heads_lr / optim.lr, "weight_decay": 0.0})
        return optimizer

    def forward(self, batch: FeatureBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return both paths' probabilities (B, K) and g (B,)."""
        logits = (*(head(x) for head, x in zip(self.heads(), (batch.local, batch.fused), strict=True)),)
        gate = self.net.gate(batch.local, batch.fused, *logits)
        return logits[0].float().softmax(1), logits[1].float().softmax(1), gate.float()

    def training_step(self, batch: FeatureBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its parts; raises FloatingPointError if it is not finite."""
        heads_train = self.freeze_parts()
        local, global_, gate = self(batch)
        parts = gate_loss(local, global_, gate, batch.label, self.recipe.gate, heads_train)
        return self.log_losses(parts.total, parts._asdict(), len(batch.label))

    def validation_step(self, batch: FeatureBatch, batch_idx: int) -> None:
        """Collect the mix and both paths."""
        local, global_, gate = self(batch)
        mixed = (1 - gate)[:, None] * local + gate[:, None] * global_
        for name, prob in (("mix", mixed), ("local", local), ("global", global_)):
            self._seen[name].add(prob, batch.label)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the mix, and those of the paths with their names before them."""
        for name, seen in self._seen.items():
            for score, value in seen.take().items():
                self.log(f"val/{score}" if name == "mix" else f"val/{name}_{score}", value)


class Scores:
    """Probabilities and labels of the cells seen so far."""

    def __init__(self) -> None:
        self.prob: list[Float32] = []
        self.label: list[Int64] = []

    def add(self, prob: Tensor, label: Tensor) -> None:
        """Add a batch, (B, K) and (B,)."""
        self.prob.append(prob.detach().cpu().numpy())
        self.label.append(label.cpu().numpy())

    def take(self) -> dict[str, float]:
        """Return the scores of all cells so far, and forget them."""
        prob, label = np.concatenate(self.prob), np.concatenate(self.label)
        self.prob.clear()
        self.label.clear()
        return score_cells(prob, label)


def score_cells(prob: Float32, label: Int64) -> dict[str, float]:
    """Return accuracy, macro F1 over the classes that occur, and negative log likelihood of (N, K) against (N,)."""
    found = prob.argmax(1)
    f1 = []
    for k in np.unique(label):
        both = int(((found == k) & (label == k)).sum())
        f1.append(2 * both / int((found == k).sum() + (label == k).sum()))
    nll = -np.log(np.maximum(prob[np.arange(len(label)), label], 1e-12)).mean()
    return {"accuracy": float((found == label).mean()), "macro_f1": float(np.mean(f1)), "nll": float(nll)}


def build(stage: Stage, recipe: NuClassRecipe, options: FitOptions) -> NuClass:
    """Return the network as far as a stage needs it, with the paths of earlier runs in it."""
    sizes = {"num_classes": len(recipe.classes), "num_organs": len(recipe.organs)}
    model = build_model("nuclass", {**recipe.stage_config(stage), **sizes})
    assert isinstance(model, NuClass)
    extra = options.extra
    if stage == "global":
        begin_with_local(model, extra["local_run"], recipe)
    if extra.get("context_init") is not None:
        context = model.context_backbone
        load_fitting(context, to_timm(read_state(extra["context_init"]), context), extra["context_init"])
    if stage == "gate":
        load_paths(model, extra["local_run"], extra["global_run"])
    return model


def begin_with_local(model: NuClass, run: Path, recipe: NuClassRecipe) -> None:
    """Fill the local path from its run, and what the global path takes over from it (section 3.2)."""
    load_fitting(model.modelA, below(read_state(run / WEIGHTS), "modelA."), run / WEIGHTS)
    theirs = model.local_backbone.state_dict()
    if not model.shares_backbone:
        model.global_backbone.load_state_dict(theirs)
    if recipe.context_training.start_from_local:
        load_fitting(model.context_backbone, theirs, run / WEIGHTS)


def load_path(model: NuClass, path: Path) -> None:
    """Fill a network from one of the same stage (a file or a run's folder), or its crop backbone from a file of one."""
    state = read_state(path)
    if any(name.startswith("modelA.") for name in state):
        load_fitting(model, state, path)
    else:
        load_fitting(model.local_backbone, to_timm(state, model.local_backbone), path)


def load_paths(model: NuClass, local: Path, global_: Path) -> None:
    """Fill both paths; raises UsageError where the global path was trained beside another local one."""
    state, beside = read_state(local / WEIGHTS), read_state(global_ / WEIGHTS)
    own, other = below(state, "modelA."), below(beside, "modelA.")
    if own.keys() != other.keys() or any(not torch.equal(own[name], other[name]) for name in own):
        raise UsageError(f"--global {global_}: was trained beside another local path than --local {local}")
    assert model.modelB is not None
    load_fitting(model.modelA, own, local / WEIGHTS)
    load_fitting(model.modelB, below(beside, "modelB."), global_ / WEIGHTS)


def module(stage: Stage, run: Run, model: NuClass) -> PathTraining | GateTraining:
    """Return what trains a stage of a network."""
    if stage == "gate":
        return GateTraining(run.recipe, model)
    counts = class_counts([image for s in run.sets for image in s.train], len(run.recipe.classes))
    return PathTraining(run.recipe, model, stage, effective_number_weights(counts, run.recipe.loss.effective_beta))


def loaders(stage: Stage, run: Run, model: NuClass) -> tuple[Any, Any]:
    """Return the loaders of cells, augmented to train and as they are to validate; the gate's hold their features.

    These are kept in the run's folder.
    """
    recipe, options, (train, val) = run.recipe, run.options, images_of(run.sets)
    if stage != "gate":
        wide = stage == "global"
        return draw_loader(CellDataset(train, recipe, wide), run), exact_loader(val, recipe, wide, options.workers)
    name, device = accelerator_of(options.device)
    model.to(torch.device(f"{name}:{device[0]}" if isinstance(device, list) else name))
    folder = options.folder / "features"
    kept = [kept_features(folder, n, model, i, recipe, options.workers) for n, i in (("train", train), ("val", val))]
    return feature_loaders(kept[0], kept[1], recipe, run.first_epoch)
