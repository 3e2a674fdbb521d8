"""What every training shares: clock, chance and learning rate as functions of the step, and what a checkpoint keeps.

A model adds its data, its loss and its validation.
"""

from __future__ import annotations

import math
import time
from typing import Any, Literal, Protocol

import torch
from torch import nn

from cellslide.train.framework import L


class Schedule(Protocol):
    """Settings of the learning rate."""

    @property
    def lr(self) -> float: ...
    @property
    def schedule(self) -> Literal["exponential", "cosine", "constant"]: ...
    @property
    def gamma(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def final_lr(self) -> float: ...


class Course(Protocol):
    """What a recipe says of the course of a run, whatever it trains."""

    @property
    def seed(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    @property
    def max_minutes(self) -> float | None: ...
    @property
    def epoch_steps(self) -> int: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def optim(self) -> Schedule: ...

    def as_dict(self) -> dict[str, Any]: ...


class Training(L.LightningModule):
    """A training of `model`, whose weights are averaged, written and resumed.

    All chance is a function of (seed, step): the data by draw number, dropout by reseeding before each step. The
    learning rate is a function of the step too (and of the clock if the recipe sets `max_minutes`), so a checkpoint
    holds no scheduler. Parameter groups carry `lr_scale`, their share of the rate.
    """

    def __init__(self, course: Course, model: nn.Module) -> None:
        super().__init__()
        self.course = course
        self.model = model
        self.elapsed_s = 0.0
        self._clock_s: float | None = None

    def on_train_start(self) -> None:
        """Start the clock."""
        self._clock_s = time.monotonic()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this step and set its learning rate."""
        torch.manual_seed(self.course.seed * 1_000_003 + self.global_step)
        rate = self.course.optim.lr * learning_rate_factor(self.course, self.global_step, self.minutes)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate * group["lr_scale"]

    @property
    def minutes(self) -> float:
        """Training time so far, over all resumed parts."""
        running = 0.0 if self._clock_s is None else time.monotonic() - self._clock_s
        return (self.elapsed_s + running) / 60

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ask for a clean end when the time is up; Lightning validates once more and stops."""
        limit = self.course.max_minutes
        if limit is not None and self.minutes >= limit:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the recipe and the time used."""
        checkpoint["cellslide"] = {"recipe": self.course.as_dict(), "elapsed_s": self.minutes * 60}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the time used before."""
        self.elapsed_s = float(checkpoint["cellslide"]["elapsed_s"])

    def check_finite(self, loss: torch.Tensor) -> torch.Tensor:
        """Return `loss`; raises FloatingPointError if it is not finite."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.global_step}: lower optim.lr in the recipe")
        return loss


def learning_rate_factor(course: Course, step: int, minutes: float = 0.0) -> float:
    """Return the share of the full learning rate for a step counted from 0: warm-up, then the schedule."""
    optim = course.optim
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "exponential":
        return float(optim.gamma ** (step // course.epoch_steps))
    progress = (step - optim.warmup_steps) / max(course.total_steps - optim.warmup_steps, 1)
    if course.max_minutes is not None:
        progress = max(progress, minutes / course.max_minutes)
    return optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
