"""Matching of proposals to nuclei, and the loss of a point detector (DPA-P2PNet's, Shui et al. 2022).

Points are (x, y) in pixels of the network's input; classes 0..C-1, with background as class C of the logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cellslide.train.points.recipe import PointLossConfig

UNKNOWN = -1


class Truth(NamedTuple):
    """What is known of one field.

    points      float32 (T, 2).
    label       int64 (T,), UNKNOWN where only the place is known.
    supervised  bool (Q,): proposals that lie where every nucleus is known, so that an unmatched one is background.
    """

    points: Tensor
    label: Tensor
    supervised: Tensor


class PointLosses(NamedTuple):
    """Loss terms, each with its weight in it."""

    classification: Tensor
    regression: Tensor
    mask: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.classification + self.regression + self.mask


def log_foreground(log_prob: Tensor) -> Tensor:
    """Return log(1 - p(background)) of log probabilities (..., C + 1)."""
    return log_prob[..., :-1].logsumexp(-1)


@torch.no_grad()
def match(points: Tensor, logits: Tensor, truth: Truth, config: PointLossConfig) -> tuple[Tensor, Tensor]:
    """Return which proposal (int64 (M,)) stands for which nucleus (int64 (M,)), one to one, M = min(Q, T).

    points (Q, 2) and logits (Q, C + 1) of one field. The cost is cost_distance * distance - cost_class * p(class), with
    1 - p(background) as the probability of a nucleus of unknown class. Only supervised proposals are candidates.
    """
    rows = truth.supervised.nonzero()[:, 0]
    if not len(truth.points) or not len(rows):
        none = torch.zeros(0, dtype=torch.int64, device=points.device)
        return none, none
    log_prob = logits[rows].float().log_softmax(1)
    unknown = truth.label == UNKNOWN
    prob = log_prob[:, truth.label.clamp(min=0)].exp()
    prob[:, unknown] = log_foreground(log_prob).exp()[:, None]
    cost = config.cost_distance * torch.cdist(points[rows].float(), truth.points) - config.cost_class * prob
    proposal, nucleus = linear_sum_assignment(cost.cpu().numpy())
    return rows[torch.from_numpy(proposal).to(rows)], torch.from_numpy(nucleus).to(rows)


class _Sums(NamedTuple):
    """Sums over one field: weighted cross entropy and its weights, squared distances and matched points."""

    entropy: Tensor
    weight: Tensor
    square: Tensor
    matched: int


def _field_sums(points: Tensor, logits: Tensor, truth: Truth, config: PointLossConfig) -> _Sums:
    proposal, nucleus = match(points, logits, truth, config)
    log_prob = logits.float().log_softmax(1)
    n_classes = logits.shape[1] - 1
    label = torch.full((len(logits),), n_classes, dtype=torch.int64, device=logits.device)
    label[proposal] = truth.label[nucleus]
    named = torch.tensor(config.class_weight or (1.0,) * n_classes, device=logits.device)
    by_label = torch.cat([named, named.new_tensor([config.background])])
    known = label != UNKNOWN
    index = label.clamp(min=0)
    loss = -torch.where(known, log_prob.gather(1, index[:, None])[:, 0], log_foreground(log_prob))
    # Padding and unannotated tissue say nothing about proposals there.
    weight = torch.where(known, by_label[index], named.mean()) * truth.supervised
    square = (points[proposal].float() - truth.points[nucleus]).square().sum()
    return _Sums((loss * weight).sum(), weight.sum(), square, len(proposal))


def point_losses(points: Tensor, logits: Tensor, truths: list[Truth], config: PointLossConfig) -> tuple[Tensor, Tensor]:
    """Return cross entropy and regression of a batch: points (B, Q, 2), logits (B, Q, C + 1), a Truth for each field.

    Cross entropy is the weighted mean over supervised proposals, regression the mean over matched points, both over the
    whole batch. A point of unknown class counts as its chance to be any.
    """
    sums = [_field_sums(*field, config) for field in zip(points, logits, truths, strict=True)]
    entropy, weight = (torch.stack([getattr(s, name) for s in sums]).sum() for name in ("entropy", "weight"))
    square = torch.stack([s.square for s in sums]).sum()
    matched = max(sum(s.matched for s in sums), 1)
    return config.classification * entropy / weight.clamp(min=1e-6), config.regression * square / matched


def mask_loss(logits: Tensor, target: Tensor, config: PointLossConfig) -> Tensor:
    """Return the focal loss (Lin et al. 2017) of mask logits (B, 1, h, w) against int8 (B, H, W): 1, 0 or -1 = unknown.

    The logits are enlarged to the target's size; the mean is over known pixels.
    """
    logits = F.interpolate(logits.float(), target.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    known = (target >= 0).float()
    wanted = (target > 0).float()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    missing = 1 - torch.exp(-entropy)
    alpha = config.mask_alpha * wanted + (1 - config.mask_alpha) * (1 - wanted)
    loss = alpha * missing**config.mask_gamma * entropy
    return config.mask * (loss * known).sum() / known.sum().clamp(min=1)


def consistency_weight(weight: float, step: int, total: int) -> float:
    """Return the consistency loss's weight at a step: a half cosine from 0 up to `weight` at the end."""
    return weight * (1 - math.cos(math.pi * min(step / max(total, 1), 1.0))) / 2


def inside(points: Tensor, region: Tensor) -> Tensor:
    """Return bool (Q,): whether points (Q, 2) lie in pixels where `region`, bool (H, W), holds."""
    height, width = region.shape
    col, row = points.detach().floor().long().unbind(-1)
    there = (col >= 0) & (col < width) & (row >= 0) & (row < height)
    return region[row.clamp(0, height - 1), col.clamp(0, width - 1)] & there
