"""The losses of CellDETR: matching, detection, labels of the representation decoder, and the contrastive loss.

Boxes are (cx, cy, w, h), shares of the image's width and height, one tensor (n, 4) for each image of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ALPHA, GAMMA = 0.25, 2.0
# What the published code multiplies the label loss with, since it is a mean over classes.
PARALLEL_FACTOR, SEQUENTIAL_FACTOR = 16.0, 8.0


class SetWeights(Protocol):
    """Weights of the three terms that compare a query with a nucleus."""

    @property
    def ce(self) -> float: ...
    @property
    def bbox(self) -> float: ...
    @property
    def giou(self) -> float: ...


class Pairs(NamedTuple):
    """Query `query` (M,) found nucleus `target` (M,), int64, one to one unless targets were repeated."""

    query: Tensor
    target: Tensor


class SetParts(NamedTuple):
    """Terms of one layer's predictions, not weighted."""

    ce: Tensor
    bbox: Tensor
    giou: Tensor

    def weighted(self, weights: SetWeights) -> Tensor:
        """Return their weighted sum."""
        return weights.ce * self.ce + weights.bbox * self.bbox + weights.giou * self.giou


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Return the sigmoid focal loss of each element (Lin et al. 2017, eq. 5; alpha 0.25, gamma 2); `target` is 0..1."""
    logits = logits.float()
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = probability + target - 2 * probability * target
    return (ALPHA * target + (1 - ALPHA) * (1 - target)) * wrong**GAMMA * cross_entropy


def corners(boxes: Tensor) -> Tensor:
    """Turn (cx, cy, w, h) in the last dimension into (x0, y0, x1, y1)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def centred(boxes: Tensor) -> Tensor:
    """Turn (x0, y0, x1, y1) in the last dimension into (cx, cy, w, h)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU (Rezatofighi et al. 2019) of boxes (..., 4) as corners, shapes broadcast together.

    -1 to 1, and 0 where both boxes are empty.
    """
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    outer = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = outer.prod(-1)
    tiny = torch.finfo(hull.dtype).tiny
    return inter / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


@torch.no_grad()
def match_cost(logits: Tensor, boxes: Tensor, targets: Tensor, weights: SetWeights) -> Tensor:
    """Return the cost (Q, n) of pairing queries, logits (Q,) and boxes (Q, 4), with nuclei `targets` (n, 4).

    2 * focal class cost + 5 * L1 - 2 * GIoU with the published weights (Deformable DETR's matcher, one class).
    """
    logits, boxes = logits.float(), boxes.float()
    found, none = focal(logits, torch.ones_like(logits)), focal(logits, torch.zeros_like(logits))
    distance = torch.cdist(boxes, targets.float(), p=1)
    overlap = giou(corners(boxes)[:, None], corners(targets.float())[None])
    return weights.ce * (found - none)[:, None] + weights.bbox * distance - weights.giou * overlap


@torch.no_grad()
def match(
    logits: Tensor, boxes: Tensor, targets: Sequence[Tensor], weights: SetWeights, repeats: int = 1
) -> list[Pairs]:
    """Pair queries with nuclei so that the summed cost is least; logits (B, Q, 1), boxes (B, Q, 4).

    repeats  how many queries may find the same nucleus (1 published; more as in H-DETR, Jia et al. 2023), lowered where
             there are fewer queries than that takes.
    Raises FloatingPointError if a cost is not finite.
    """
    pairs = []
    for image_logits, image_boxes, target in zip(logits[..., 0], boxes, targets, strict=True):
        times = max(min(repeats, len(image_boxes) // max(len(target), 1)), 1)
        cost = match_cost(image_logits, image_boxes, target, weights)
        if not torch.isfinite(cost).all():
            raise FloatingPointError("the matching cost is not finite: lower optim.lr in the recipe")
        query, column = linear_sum_assignment(cost.repeat(1, times).cpu().numpy())
        index = [torch.from_numpy(found).to(boxes.device) for found in (query, column)]
        pairs.append(Pairs(index[0], index[1] % max(len(target), 1)))
    return pairs


def set_losses(
    logits: Tensor, boxes: Tensor, targets: Sequence[Tensor], pairs: Sequence[Pairs], known: Tensor
) -> SetParts:
    """Return the terms of predictions, logits (B, Q, 1) and boxes (B, Q, 4), each divided by the number of pairs.

    known  bool (B, Q): a query that found nothing there is wrong only where the place is annotated.
    Deformable DETR's criterion: focal over all queries, L1 and 1 - GIoU over the matched ones.
    """
    target = torch.zeros_like(logits[..., 0], dtype=torch.float32)
    for image, pair in enumerate(pairs):
        target[image, pair.query] = 1
    count = max(sum(len(pair.query) for pair in pairs), 1)
    counted = known | (target > 0)
    ce = (focal(logits[..., 0], target) * counted).sum() / count
    found = torch.cat([b[pair.query] for b, pair in zip(boxes, pairs, strict=True)]).float()
    true = torch.cat([t[pair.target] for t, pair in zip(targets, pairs, strict=True)]).float()
    bbox = (found - true).abs().sum() / count
    return SetParts(ce, bbox, (1 - giou(corners(found), corners(true))).sum() / count)


def label_loss(logits: Tensor, label: Tensor, factor: float) -> Tensor:
    """Return the focal loss of class logits (M, C) for labels int64 (M,), -1 not known and left out.

    Mean over classes and over the nuclei that are known, times `factor`; 0 where none is.
    """
    known = label >= 0
    target = F.one_hot(label.clamp(min=0), logits.shape[1]).float()
    per_nucleus = focal(logits, target).mean(1) * known
    return factor * per_nucleus.sum() / known.sum().clamp(min=1)


def empty_loss(logits: Tensor, factor: float) -> Tensor:
    """Return the focal loss of class logits (M, C) of boxes that hold no nucleus, else as `label_loss`."""
    return factor * focal(logits, torch.zeros_like(logits)).mean(1).sum() / max(len(logits), 1)


def noise_boxes(
    boxes: Tensor,
    low: float,
    high: float,
    grow: float = 0.5,
    share: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return boxes (..., 4) with noise on their size and centre, cut at the image's edges (CellDETR, eqs 5 and 6).

    Width and height grow with probability `grow`, else shrink, by a part drawn from [low, high]; the centre moves by
    such a part of half the size either way. `share` of the boxes are noised. `generator` is one of the boxes' device.
    """

    def draw(shape: torch.Size) -> Tensor:
        return torch.rand(shape, device=boxes.device, dtype=boxes.dtype, generator=generator)

    centre, size = boxes[..., :2], boxes[..., 2:]
    part = low + (high - low) * draw(size.shape)
    new_size = size * (1 + torch.where(draw(size.shape) < grow, part, -part))
    shift = low + (high - low) * draw(size.shape)
    new_centre = centre + torch.where(draw(size.shape) < 0.5, shift, -shift) * size / 2
    noised = centred(corners(torch.cat([new_centre, new_size], -1)).clamp(0, 1))
    return torch.where(draw(boxes.shape[:-1])[..., None] < share, noised, boxes)


def info_nce(projected: Tensor, counts: Sequence[int], temperature: float = 0.1) -> Tensor:
    """Return the InfoNCE loss of contrastive slots: each noised copy finds its nucleus among those of its image.

    projected  (B, 2 * M + 1, D): own boxes of image b (counts[b]), then noised copies, then the global box; copy k is
               one of nucleus k modulo counts[b].
    Cosine similarity; mean over the copies of an image, then over the images that have nuclei (van den Oord 2018).
    """
    unit = F.normalize(projected.float(), dim=-1)
    losses = []
    for rows, n in zip(unit, counts, strict=True):
        if n:
            copies = rows[n:-1]
            label = torch.arange(len(copies), device=rows.device) % n
            losses.append(F.cross_entropy(copies @ rows[:n].T / temperature, label))
    return torch.stack(losses).mean() if losses else projected.sum() * 0
