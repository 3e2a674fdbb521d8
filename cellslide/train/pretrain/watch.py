"""Whether a pretraining learns or collapses: what is measured in each epoch, and what it means in words.

Each reading but the centre's norm is a share between 0 and 1, whatever the sizes:
spread    standard deviation of the unit-length features over the samples, 0 where all point the same way.
variety   what the teacher's probabilities tell of a sample: entropy of their mean less their mean entropy, over the
          most it could be; 0 where all samples have the same, be it one prototype or all of them alike.
flatness  mean entropy of the teacher's probabilities: 0 for one prototype, 1 for all of them alike.
center    norm of the centre; it grows without end where one prototype takes over faster than the centre follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from cellslide.errors import CellslideError
from cellslide.train.pretrain.recipe import WatchConfig


class CollapseError(CellslideError):
    """A pretraining whose features or targets became all alike, stopped because it was asked to."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was measured of one kind of feature; NaN where it does not apply or nothing was there to measure."""

    spread: float
    variety: float = math.nan
    flatness: float = math.nan
    center: float = math.nan

    def as_dict(self, name: str) -> dict[str, float]:
        """Return the values, named for a log."""
        return {f"watch/{name}_{key}": value for key, value in asdict(self).items()}

    @classmethod
    def of(cls, metrics: Mapping[str, float], name: str) -> Reading:
        """Read back what `as_dict` gave."""
        keys = ("spread", "variety", "flatness", "center")
        return cls(**{key: metrics.get(f"watch/{name}_{key}", math.nan) for key in keys})


@torch.no_grad()
def spread_of(features: Tensor) -> float:
    """Return the spread of features (N, D); NaN for fewer than two."""
    if len(features) < 2:
        return math.nan
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    # The variances of unit vectors sum to 1 - |mean|^2, which is 1 for directions that cancel out.
    return float(unit.var(dim=0, correction=0).sum().clamp(min=0).sqrt())


@torch.no_grad()
def read(features: Tensor, targets: Tensor, center: Tensor) -> Reading:
    """Measure a teacher's features (N, D), its probabilities (N, K) and its centre (K,)."""
    if len(targets) < 2:
        return Reading(math.nan, center=float(center.norm()))
    most = math.log(targets.shape[1])
    each = float(_entropy(targets.float()).mean())
    variety = float(_entropy(targets.float().mean(dim=0))) - each
    # n samples cannot be told apart better than by log n.
    return Reading(spread_of(features), variety / math.log(min(targets.shape)), each / most, float(center.norm()))


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(dim=-1)


def collapse_of(reading: Reading, config: WatchConfig) -> str | None:
    """Say how features collapsed, or None while they did not; a NaN says nothing."""
    if reading.spread < config.least_spread:
        return f"all features point the same way (spread {reading.spread:.3f})"
    if reading.variety < config.least_variety:
        kind = "all prototypes are alike" if reading.flatness > 0.5 else "one prototype takes all samples"
        return f"{kind} (variety {reading.variety:.3f}, flatness {reading.flatness:.3f})"
    return None


REMEDY = "lower optim.lr or distill.teacher_temp, lengthen optim.warmup_steps, or take larger batches in --recipe"


class Watch:
    """Follows the readings of a run from epoch to epoch and says what they mean."""

    def __init__(self, config: WatchConfig, stop: bool) -> None:
        self.config, self.stop = config, stop
        self.streak = 0

    def judge(self, metrics: Mapping[str, float], names: tuple[str, ...]) -> list[str]:
        """Return a line for each kind of feature; raises CollapseError after `patience` bad epochs, if asked."""
        lines, bad = [], []
        for name in names:
            reading = Reading.of(metrics, name)
            found = collapse_of(reading, self.config)
            shown = ", ".join(f"{key} {value:.3f}" for key, value in asdict(reading).items() if not math.isnan(value))
            if shown:
                lines.append(f"watch {name}: {'COLLAPSED, ' + found if found else 'healthy'} ({shown})")
            bad += [f"{name}: {found}"] if found else []
        self.streak = self.streak + 1 if bad else 0
        if self.stop and self.streak >= self.config.patience:
            raise CollapseError(
                f"collapsed for {self.streak} epochs ({'; '.join(bad)}): {REMEDY}; the last epoch is kept"
            )
        return lines
