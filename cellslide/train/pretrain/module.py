"""What both pretrainings share: optimiser, schedules of rate, decay and clock, the watch, and their loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cellslide.train.loaders import batch_loader
from cellslide.train.module import Training, adamw, groups_of
from cellslide.train.pretrain.data import ShardedDraws
from cellslide.train.pretrain.distill import cosine_between, mean_of_devices
from cellslide.train.pretrain.watch import Watch
from cellslide.train.task import Run


class Pretraining(Training):
    """A pretraining of `student` that writes `model`; several devices go on as one would with the same batch.

    watched  names of the features that the watch follows.
    """

    watched: tuple[str, ...] = ()
    mean: Tensor
    std: Tensor

    def __init__(self, run: Run, model: nn.Module, student: nn.Module, data: Dataset[Any]) -> None:
        super().__init__(run.recipe, model)
        self.run, self.data = run, data
        # A plain list hides the student where it is the written model itself, which would be stored twice.
        self._student = [student]
        self.watch = Watch(self.recipe.watch, bool(run.options.extra.get("stop_on_collapse")))
        self._minutes = 0.0
        mean, std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (self.recipe.model.mean, self.recipe.model.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def normalized(self, image: Tensor) -> Tensor:
        """Return uint8 images (N, 3, H, W) as the network takes them."""
        return (image.float() - self.mean) / self.std

    def train_dataloader(self) -> Any:
        """Return the loader of this device's part; Lightning asks once the devices know of each other."""
        steps, batch = self.recipe.epoch_steps, self.recipe.batch_size
        sampler = ShardedDraws(steps, batch, self.trainer.global_rank, self.trainer.world_size)
        sampler.set_epoch(self.run.first_epoch)
        return batch_loader(self.data, sampler, batch // sampler.world, self.run.options.workers)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW; biases, norms and other vectors have no weight decay, the backbone its own rate."""
        scale = self.recipe.optim.backbone_lr_scale
        groups = groups_of(self._student[0], lambda name: scale if self.is_backbone(name) else 1.0)
        optimizer = adamw(groups, self.recipe.optim)
        for group, made in zip(groups, optimizer.param_groups, strict=True):
            made["decays"] = group.decays
        return optimizer

    def is_backbone(self, name: str) -> bool:
        """Whether a parameter of the student belongs to its backbone."""
        return name.startswith("backbone.")

    @property
    def minutes(self) -> float:
        """Training time that all devices agreed on at the start of the step; with their own, rates would differ."""
        return self._minutes

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps, or by the clock where that is further."""
        done = self.global_step / self.recipe.total_steps
        limit = self.recipe.max_minutes
        return min(1.0, done if limit is None else max(done, self.minutes / limit))

    @property
    def epochs_done(self) -> float:
        """Epochs so far, with their part."""
        return self.global_step / self.recipe.epoch_steps

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Agree on the time, then set seed, rate and decay of this step."""
        clock = torch.tensor(super().minutes, dtype=torch.float32, device=self.device)
        self._minutes = float(mean_of_devices(clock))
        super().on_train_batch_start(batch, batch_idx)
        optim = self.recipe.optim
        decay = cosine_between(optim.weight_decay, optim.final_weight_decay, self.progress)
        for group in self.trainer.optimizers[0].param_groups:
            group["weight_decay"] = decay * group["decays"]

    def log_means(self, values: Mapping[str, Tensor | float]) -> None:
        """Log the epoch's means, each step's over the devices that have a value; NaN is none."""
        numbers = [torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in values.values()]
        stacked = torch.stack(numbers).detach()
        known = mean_of_devices((~stacked.isnan()).float())
        mean = mean_of_devices(stacked.nan_to_num()) / known
        shown = {name: value for name, value, share in zip(values, mean, known.tolist(), strict=True) if share > 0}
        self.log_dict(shown, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Print whether it learns; raises CollapseError where it does not and was asked to stop then."""
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        lines = self.watch.judge(metrics, self.watched)
        if self.trainer.is_global_zero:
            print(*lines, sep="\n", flush=True)
