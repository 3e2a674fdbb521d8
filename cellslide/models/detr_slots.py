"""Boxes of several images in one tensor, and who sees whom among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GLOBAL_BOX = (0.5, 0.5, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Slots:
    """Boxes of several images in one tensor: each image's own, then the global ones, then fill.

    boxes   (B, N, 4).
    mask    bool (B, N, N), True where a row may not see a column.
    counts  how many own boxes each image has.
    """

    boxes: Tensor
    mask: Tensor
    counts: tuple[int, ...]


def parallel_slots(boxes: Sequence[Tensor], n_global: int) -> Slots:
    """Stand the boxes (N_i, 4) of each image beside `n_global` boxes of the whole image; fill is the same box.

    Every slot sees an image's own boxes and its global ones (CellDETR, A.1).
    """
    counts = tuple(len(b) for b in boxes)
    width = max(counts, default=0) + n_global
    filled = boxes[0].new_tensor(GLOBAL_BOX).expand(len(boxes), width, 4).clone()
    mask = torch.ones(len(boxes), width, width, dtype=torch.bool, device=filled.device)
    for i, own in enumerate(boxes):
        filled[i, : len(own)] = own
        mask[i, :, : len(own) + n_global] = False
    return Slots(filled, mask, counts)


def contrastive_slots(boxes: Sequence[Tensor], noised: Sequence[Tensor]) -> Slots:
    """Stand the boxes (N_i, 4) of each image before noised copies of them and one box of the whole image.

    There are twice as many slots as the most boxes, plus one; `noised` (M_i, 4) of each image fills the rest and must
    be long enough. A noised box sees the image's own boxes only, not its like (CellDETR, 3.3).
    """
    counts = tuple(len(b) for b in boxes)
    n = 2 * max(counts) + 1
    last = boxes[0].new_tensor([GLOBAL_BOX])
    filled = torch.stack(
        [torch.cat([own, more[: n - 1 - len(own)], last]) for own, more in zip(boxes, noised, strict=True)]
    )
    mask = torch.ones(len(boxes), n, n, dtype=torch.bool, device=filled.device)
    for i, count in enumerate(counts):
        mask[i, :, :count] = False
        mask[i, -1, -1] = False
    return Slots(filled, mask, counts)
