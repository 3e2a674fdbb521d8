"""Names of tensors: renamed by tables, cut out by prefix, counted by pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

State = Mapping[str, Tensor]

# Residual networks of timm by their blocks a stage; those with bottlenecks have a third convolution.
RESNETS = {
    (False, 1, 1, 1, 1): "resnet10t", (False, 2, 2, 2, 2): "resnet18", (False, 3, 4, 6, 3): "resnet34",
    (True, 2, 2, 2, 2): "resnet26", (True, 3, 4, 6, 3): "resnet50", (True, 3, 4, 23, 3): "resnet101",
}  # fmt: skip


def count(state: State, pattern: str) -> int:
    """Return how many different first groups a pattern finds at the beginning of the names."""
    return len({m[1] for name in state if (m := re.match(pattern, name))})


def below(state: State, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def rename(state: State, table: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Return `state` with the first rule of `table` that fits applied to each name; other names stay."""
    return {_renamed(name, table): tensor for name, tensor in state.items()}


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        new, found = re.subn(pattern, replacement, name)
        if found:
            return new
    return name


def resnet_of(state: State, least_stages: int = 1) -> str | None:
    """Return timm's name of the residual network whose tensors these are, its last stages cut off or not, or None."""
    deep = "layer1.0.conv3.weight" in state
    stages = [n for i in (1, 2, 3, 4) if (n := count(state, rf"layer{i}\.(\d+)\."))]
    names = (name for (has, *blocks), name in RESNETS.items() if has == deep and blocks[: len(stages)] == stages)
    return next(names, None) if len(stages) >= least_stages else None
