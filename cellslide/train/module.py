"""What every training shares: clock, chance and learning rate as functions of the step, and what a checkpoint keeps.

A model adds its data, its loss and its validation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cellslide.train.framework import L
from cellslide.train.recipe import AdamConfig, Recipe


class Training(L.LightningModule):
    """A training of `model`, whose weights are averaged, written and resumed.

    All chance is a function of (seed, step): the data by draw number, dropout by reseeding before each step. The
    learning rate is a function of the step too (and of the clock if the recipe sets `max_minutes`), so a checkpoint
    holds no scheduler. Parameter groups carry `lr_scale`, their share of the rate.
    """

    recipe: Any

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        super().__init__()
        self.recipe = recipe
        self.model = model
        self.elapsed_s = 0.0
        self._clock_s: float | None = None

    def on_train_start(self) -> None:
        """Start the clock."""
        self._clock_s = time.monotonic()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this step and set its learning rate."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.global_step)
        rate = self.recipe.optim.lr * learning_rate_factor(self.recipe, self.global_step, self.minutes)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate * group["lr_scale"]

    @property
    def minutes(self) -> float:
        """Training time so far, over all resumed parts."""
        running = 0.0 if self._clock_s is None else time.monotonic() - self._clock_s
        return (self.elapsed_s + running) / 60

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ask for a clean end when the time is up; Lightning validates once more and stops."""
        limit = self.recipe.max_minutes
        if limit is not None and self.minutes >= limit:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the recipe and the time used."""
        checkpoint["cellslide"] = {"recipe": self.recipe.as_dict(), "elapsed_s": self.minutes * 60}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the time used before."""
        self.elapsed_s = float(checkpoint["cellslide"]["elapsed_s"])

    def check_finite(self, loss: Tensor) -> Tensor:
        """Return `loss`; raises FloatingPointError if it is not finite."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.global_step}: lower optim.lr in the recipe")
        return loss

    def log_losses(self, total: Tensor, parts: Mapping[str, Tensor], n: int) -> Tensor:
        """Log the mean over the epoch of a loss and its parts, over `n` samples; returns the loss as `check_finite`."""
        total = self.check_finite(total)
        shown = {f"train/{name}": value.detach() for name, value in {**parts, "loss": total}.items()}
        self.log_dict(shown, on_step=False, on_epoch=True, batch_size=n)
        return total


class ImageTraining(Training):
    """A training on crops of images, uint8 (B, 3, H, W), that validates on whole images, which stay on the host.

    whole  type of a validation image.
    """

    whole: type[Any]
    mean: Tensor
    std: Tensor

    def __init__(self, recipe: Any, model: nn.Module) -> None:
        super().__init__(recipe, model.to(memory_format=torch.channels_last) if recipe.channels_last else model)
        for name, value in (("mean", recipe.model.mean), ("std", recipe.model.std)):
            self.register_buffer(name, 255 * torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """Return uint8 images (B, 3, H, W) as the network takes them."""
        x = (image.float() - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else x

    def rate_share(self, name: str) -> float:
        """Return the share of the learning rate of a parameter by its name."""
        return 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW; biases, norms and other vectors have no weight decay, parameters their share of the rate."""
        return adamw(groups_of(self.model, self.rate_share), self.recipe.optim)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move crops; a whole image stays where it is."""
        if isinstance(batch, self.whole):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class Group(NamedTuple):
    """Parameters that learn at one share of the rate, with weight decay or without."""

    parameters: Sequence[nn.Parameter]
    lr_scale: float
    decays: bool


def groups_of(model: nn.Module, share: Callable[[str], float]) -> list[Group]:
    """Return the parameters of a model that learn, by their share of the rate; vectors, of one axis, do not decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((share(name), parameter.ndim > 1), []).append(parameter)
    return [Group(parameters, *key) for key, parameters in groups.items()]


def adamw(groups: Iterable[Group], optim: AdamConfig) -> torch.optim.AdamW:
    """Return AdamW over groups of parameters, each with its `lr_scale`."""
    made = [
        {"params": g.parameters, "lr_scale": g.lr_scale, "weight_decay": optim.weight_decay if g.decays else 0.0}
        for g in groups
    ]
    return torch.optim.AdamW(made, lr=optim.lr, betas=optim.betas)


def learning_rate_factor(recipe: Recipe, step: int, minutes: float = 0.0) -> float:
    """Return the share of the full learning rate for a step counted from 0: warm-up, then the schedule."""
    optim = recipe.optim
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "exponential":
        return float(optim.gamma ** (step // recipe.epoch_steps))
    progress = (step - optim.warmup_steps) / max(recipe.total_steps - optim.warmup_steps, 1)
    if recipe.max_minutes is not None:
        progress = max(progress, minutes / recipe.max_minutes)
    return optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
