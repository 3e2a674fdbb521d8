"""The losses of NuClass: class-balanced cross entropy, local-aware weighting (eqs 11-14) and the gate's (eqs 19-24)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cellslide.train.nuclass.recipe import GateLossConfig
from cellslide.types import Float32, Int64

TINY = 1e-7


def effective_number_weights(counts: Int64, beta: float) -> Float32:
    """Return a weight for each class, (1 - beta) / (1 - beta^n), scaled to a mean of 1 over the classes that occur.

    A class without a cell has weight 0 (Cui et al. 2019; the published code's scale).
    """
    n = np.maximum(counts, 1).astype(np.float64)
    weight = np.where(counts > 0, (1 - beta) / (1 - beta**n), 0.0)
    return np.asarray(weight / weight[counts > 0].mean(), np.float32)


def balanced_cross_entropy(logits: Tensor, label: Tensor, class_weight: Tensor, smoothing: float) -> Tensor:
    """Return the loss of each cell (B,): -sum_c w_c q_c log softmax(logits)_c, q smoothed by smoothing / K.

    The paper's eq. 4 smooths by smoothing / (K - 1); its code, which is followed, is torch's form.
    """
    return F.cross_entropy(logits.float(), label, class_weight, reduction="none", label_smoothing=smoothing)


def local_aware_weight(p_local_true: Tensor, gamma: float) -> Tensor:
    """Return (1 - p_local(y))^gamma for the local path's probabilities (B,) of the true class (eq. 11), no gradient."""
    return (1 - p_local_true.detach().float()) ** gamma


class GlobalLoss(NamedTuple):
    """Eqs 12 and 13: what the local path finds hard, and everything, the latter already times lambda."""

    main: Tensor
    stable: Tensor

    @property
    def total(self) -> Tensor:
        """Eq. 14."""
        return self.main + self.stable


def global_loss(per_cell: Tensor, p_local_true: Tensor, gamma: float, lambda_stable: float) -> GlobalLoss:
    """Return the global path's loss from that of each cell (B,) and the local path's p(y) (B,) (eqs 11-14)."""
    weight = local_aware_weight(p_local_true, gamma)
    return GlobalLoss((weight * per_cell).mean(), lambda_stable * per_cell.mean())


class GateTargets(NamedTuple):
    """What the labels say of the gate, (B,) each: soft target, weight (eq. 19), and Delta, p_global(y) - p_local(y)."""

    target: Tensor
    weight: Tensor
    delta: Tensor


@torch.no_grad()
def gate_targets(local: Tensor, global_: Tensor, label: Tensor, config: GateLossConfig) -> GateTargets:
    """Return the gate's supervision from both paths' probabilities (B, K) and the labels (B,).

    The target is 1 or 0 where one path alone is right, else sigmoid(kappa Delta); cells on which one path alone is
    right weigh more, and so do those with a large Delta.
    """
    rows = torch.arange(len(label), device=label.device)
    delta = global_[rows, label] - local[rows, label]
    right_local, right_global = local.argmax(1) == label, global_.argmax(1) == label
    alone = right_local ^ right_global
    target = torch.where(alone, right_global.to(delta.dtype), torch.sigmoid(config.kappa * delta))
    weight = 1 + config.conflict * alone.to(delta.dtype) + config.lambda_delta * delta.abs() ** config.gamma_delta
    return GateTargets(target, weight, delta)


class GateLoss(NamedTuple):
    """The terms of eq. 24, each already times its lambda; `aux` is 0 while the paths' heads are frozen."""

    mix: Tensor
    gate: Tensor
    align: Tensor
    entropy: Tensor
    aux: Tensor

    @property
    def total(self) -> Tensor:
        """Eq. 24."""
        return torch.stack(list(self)).sum()


def gate_loss(
    local: Tensor, global_: Tensor, gate: Tensor, label: Tensor, config: GateLossConfig, heads_train: bool = False
) -> GateLoss:
    """Return the gate's loss from both paths' probabilities (B, K), g (B,) and the labels (B,) (eqs 19-24)."""
    target, weight, delta = gate_targets(local, global_, label, config)
    mixed = (1 - gate)[:, None] * local + gate[:, None] * global_
    rows = torch.arange(len(label), device=label.device)
    chosen = torch.where((target > 0.5)[:, None], global_, local)
    kl = (chosen * (chosen.clamp_min(TINY).log() - mixed.clamp_min(TINY).log())).sum(1)
    aux = -(local[rows, label].clamp_min(TINY).log() + global_[rows, label].clamp_min(TINY).log()).mean() / 2
    return GateLoss(
        (weight * -mixed[rows, label].clamp_min(TINY).log()).mean(),
        (weight * weighted_bce(gate, target)).mean(),
        config.lambda_align * (weight * kl).mean(),
        config.lambda_entropy * (delta.abs() * bernoulli_entropy(gate)).mean(),
        config.lambda_aux * aux if heads_train else aux.detach() * 0,
    )


def weighted_bce(gate: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross entropy (B,) of g against soft targets, the positive part times (1 - m) / m, where m is
    the batch's mean target (eq. 21)."""
    mean = target.mean().clamp(0.01, 0.99)
    positive = target * gate.clamp_min(TINY).log() * (1 - mean) / mean
    return -(positive + (1 - target) * (1 - gate).clamp_min(TINY).log())


def bernoulli_entropy(gate: Tensor) -> Tensor:
    """Return the entropy (B,) of a coin that shows 1 with probability g."""
    p = gate.clamp(TINY, 1 - TINY)
    return -(p * p.log() + (1 - p) * (1 - p).log())
