"""What happens beside the steps: averaged weights, progress lines, checkpoints, and the weights to ship."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellslide.errors import Interrupted
from cellslide.train.export import ModelWriter
from cellslide.train.framework import L
from cellslide.train.module import Training


class AveragedWeights(L.Callback):
    """Exponential moving average of weights and norm statistics; validation runs on it, and it is saved and resumed.

    The decay grows with the step, min(decay, (1 + t) / (10 + t)), so that the random start is soon forgotten.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    @staticmethod
    def _live(module: Training) -> dict[str, Tensor]:
        return {name: value for name, value in module.model.state_dict().items() if value.is_floating_point()}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from the weights as they are, or go on with those of the checkpoint."""
        live = self._live(pl_module)  # type: ignore[arg-type]
        stored = self.average or live
        self.average = {
            name: stored[name].detach().to(value.device, torch.float32, copy=True) for name, value in live.items()
        }

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move the average towards the weights after a step."""
        step = trainer.global_step
        decay = min(self.decay, (1 + step) / (10 + step))
        live = self._live(pl_module)  # type: ignore[arg-type]
        torch._foreach_lerp_(list(self.average.values()), [live[name].float() for name in self.average], 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate with the average."""
        self.swap(pl_module)  # type: ignore[arg-type]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train on with the live weights."""
        self.swap(pl_module)  # type: ignore[arg-type]

    @torch.no_grad()
    def swap(self, module: Training) -> None:
        """Exchange average and live weights in place."""
        for name, value in self._live(module).items():
            kept = value.clone()
            value.copy_(self.average[name])
            self.average[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return the average for the checkpoint."""
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the average of a checkpoint."""
        self.average = dict(state_dict["average"])


class Progress(L.Callback):
    """Prints lines that a log file can be followed by: every `every` steps and at each end of an epoch."""

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self._started = self._epoch_started = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the epoch's clock."""
        self._epoch_started = time.monotonic()
        self._first = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Print loss, learning rate and seconds per step."""
        step = trainer.global_step
        if step % self.every == 0 and trainer.is_global_zero:
            pace = (time.monotonic() - self._epoch_started) / max(step - self._first, 1)
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            loss = float(outputs["loss"])
            total = pl_module.recipe.total_steps  # type: ignore[union-attr]
            print(f"step {step}/{total} loss {loss:.4f} lr {rate:.2e} {pace:.2f} s/step", flush=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the epoch's mean losses and validation scores."""
        numbers = {k: float(v) for k, v in sorted(trainer.callback_metrics.items())}
        text = " ".join(f"{name} {value:.4f}" for name, value in numbers.items() if value)
        minutes = pl_module.minutes  # type: ignore[union-attr]
        if trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch} at {minutes:.1f} min: {text}", flush=True)


class CheckpointCallback(L.Callback):
    """Writes `last.ckpt` at each end of an epoch, and the averaged weights as the best and the last model."""

    def __init__(self, folder: Path, write: ModelWriter, average: AveragedWeights | None, monitor: str) -> None:
        self.folder, self.write, self.average, self.monitor = folder, write, average, monitor
        self.best: float | None = None

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint, which earlier ones have too."""
        return "Keeper"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save; a present file is a complete file. The last epoch is the best where nothing is validated."""
        assert isinstance(pl_module, Training)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        score = metrics.get(self.monitor)
        better = score is None or self.best is None or score > self.best
        self.best = score if better else self.best
        state = pl_module.model.state_dict()
        if self.average is not None:
            state = {name: self.average.average.get(name, value) for name, value in state.items()}
        for wanted, folder in ((True, self.folder / "last"), (better, self.folder)):
            if wanted and trainer.is_global_zero:
                self.write(folder, state, metrics, trainer.global_step)
        if trainer.global_step % pl_module.recipe.epoch_steps:
            return  # Stopped inside an epoch: only whole epochs resume to the same numbers.
        temporary = self.folder / "last.ckpt.part"
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            os.replace(temporary, self.folder / "last.ckpt")

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best score so far."""
        self.best = state_dict["best"]


class StopRequest(L.Callback):
    """Ends training after the step in which Ctrl-C or SIGTERM came, by Interrupted, or after `max_steps`, as planned.

    What a run resumes from is its last whole epoch.
    """

    def __init__(self, max_steps: int | None = None) -> None:
        self.max_steps = max_steps
        self.exit_code: int | None = None

    def ask(self, signal_number: int, _: Any = None) -> None:
        """Note a signal; usable as a handler."""
        self.exit_code = 128 + signal_number

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Raise Interrupted if a signal came; ask for the end if the steps are done."""
        if self.exit_code is not None:
            raise Interrupted(self.exit_code)
        # Lightning's own max_steps makes it take a checkpoint from the end of an epoch for one from its middle.
        if self.max_steps is not None and trainer.global_step >= self.max_steps:
            trainer.should_stop = True
