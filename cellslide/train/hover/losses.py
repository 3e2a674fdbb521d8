"""The losses of CellVTA and CellViT, with pixels that are not known left out of every sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cellslide.train.data import Crops
from cellslide.train.hover.recipe import LossConfig


class LossParts(NamedTuple):
    """The weighted terms of one batch; their sum is what is minimised."""

    np_dice: Tensor
    np_tversky: Tensor
    np_ce: Tensor
    hv_mse: Tensor
    hv_msge: Tensor
    nt_ce: Tensor
    nt_dice: Tensor
    nt_tversky: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of all terms."""
        return torch.stack(list(self)).sum()


def hover_losses(outputs: Mapping[str, Tensor], crops: Crops, config: LossConfig) -> LossParts:
    """Return the weighted loss terms of raw logits by published name against the targets of `crops`.

    Terms: Dice + focal Tversky (+ cross entropy) on foreground, MSE + MSGE on HoVer maps, cross entropy + Dice + focal
    Tversky on types; a branch for which the batch knows nothing contributes 0 (CellVTA, section "Optimization").
    """
    foreground = outputs["nuclei_binary_map"].float()
    zero = foreground.sum() * 0
    np_dice, np_tversky, np_ce = _region_terms(foreground, crops.foreground, config)
    predicted = outputs["hv_map"].float()
    nuclei = crops.hover_valid & (crops.foreground > 0)
    nt_dice = nt_tversky = nt_ce = zero
    if "nuclei_type_map" in outputs:
        nt_dice, nt_tversky, nt_ce = _region_terms(outputs["nuclei_type_map"].float(), crops.types, config)
    return LossParts(
        config.np_dice * np_dice,
        config.np_tversky * np_tversky,
        config.np_ce * np_ce,
        config.hv_mse * mse(predicted, crops.hover, crops.hover_valid),
        config.hv_msge * msge(predicted, crops.hover, nuclei),
        config.nt_ce * nt_ce,
        config.nt_dice * nt_dice,
        config.nt_tversky * nt_tversky,
    )


def _region_terms(logits: Tensor, target: Tensor, config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return Dice, focal Tversky and cross entropy of logits (B, K, H, W) on the pixels with target >= 0."""
    known = target >= 0
    wanted = F.one_hot(target.clamp(min=0), logits.shape[1]).permute(0, 3, 1, 2).to(logits.dtype)
    log_prob = F.log_softmax(logits, 1)
    weight = known.unsqueeze(1).to(logits.dtype)
    prob, wanted = log_prob.exp() * weight, wanted * weight
    cross_entropy = -(log_prob * wanted).sum() / known.sum().clamp(min=1)
    tversky = focal_tversky(prob, wanted, config.tversky_alpha, config.tversky_beta, config.tversky_gamma)
    return dice(prob, wanted), tversky, cross_entropy


def dice(prob: Tensor, wanted: Tensor, smooth: float = 1e-3) -> Tensor:
    """Return 1 - Dice of probabilities against one-hot targets, (B, K, H, W), over the batch, summed over classes."""
    both = (prob * wanted).sum((0, 2, 3))
    return (1 - (2 * both + smooth) / ((prob + wanted).sum((0, 2, 3)) + smooth)).sum()


def focal_tversky(
    prob: Tensor, wanted: Tensor, alpha: float, beta: float, gamma: float, smooth: float = 1e-3
) -> Tensor:
    """Return (1 - Tversky index) ** gamma over the batch, summed over classes; alpha weighs what was missed, beta what
    was added (Abraham & Khan 2019, with CellViT's exponent)."""
    both = (prob * wanted).sum((0, 2, 3))
    missed, added = wanted.sum((0, 2, 3)) - both, prob.sum((0, 2, 3)) - both
    index = (both + smooth) / (both + alpha * missed + beta * added + smooth)
    return ((1 - index).clamp(min=1e-7) ** gamma).sum()


def mse(predicted: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Return the mean squared error of (B, 2, H, W) maps over the valid (B, H, W) pixels, 0 if there is none."""
    weight = valid.unsqueeze(1).to(predicted.dtype)
    return ((predicted - wanted) ** 2 * weight).sum() / (2 * weight.sum()).clamp(min=1)


def msge(predicted: Tensor, wanted: Tensor, nuclei: Tensor) -> Tensor:
    """Return the mean squared error of the maps' gradients inside nuclei: x of the horizontal, y of the vertical map
    (HoVer-Net, eq. 3; kernel 5 x 5)."""
    error = gradients(predicted - wanted) ** 2
    weight = nuclei.unsqueeze(1).to(predicted.dtype)
    return (error * weight).sum() / (2 * weight.sum()).clamp(min=1)


def gradients(maps: Tensor) -> Tensor:
    """Return d/dx of channel 0 and d/dy of channel 1 of maps (B, 2, H, W), by HoVer-Net's distance-weighted kernel."""
    axis = torch.arange(-2, 3, dtype=maps.dtype, device=maps.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = x**2 + y**2 + 1e-15
    kernel = torch.stack([x / distance, y / distance]).unsqueeze(1)
    return F.conv2d(maps, kernel, padding=2, groups=2)
