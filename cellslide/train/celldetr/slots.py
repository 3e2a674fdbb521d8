"""Which boxes the representation decoder sees in training beyond the annotated ones, and which see each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cellslide.models.celldetr import GLOBAL_BOX, Slots, contrastive_slots
from cellslide.train.celldetr.losses import noise_boxes

# The published noise of copies that keep their class, and of those that lose it.
NEAR, FAR = (0.1, 0.3), (0.6, 0.9)


def denoising_slots(own: Sequence[Tensor], n_global: int) -> Slots:
    """Return slots [own | slightly noised | noised beyond use | global | fill] of n, n, n, n_global boxes.

    Own and global boxes see each other; each noised group sees itself. The published code's third box mode, which
    noises four in five of the first copies, and all of the second.
    """
    counts = tuple(len(boxes) for boxes in own)
    length = 3 * max(counts, default=0) + n_global
    filled = own[0].new_tensor(GLOBAL_BOX).repeat(len(own), length, 1)
    mask = torch.ones(len(own), length, length, dtype=torch.bool, device=filled.device)
    for i, (boxes, n) in enumerate(zip(own, counts, strict=True)):
        copies = [boxes, noise_boxes(boxes, *NEAR, share=0.8), noise_boxes(boxes, *FAR)]
        filled[i, : 3 * n] = torch.cat(copies)
        for first in (0, n, 2 * n):
            mask[i, first : first + n, first : first + n] = False
        mask[i, :n, 3 * n : 3 * n + n_global] = False
        mask[i, 3 * n :, :n] = mask[i, 3 * n :, 3 * n :] = False
    return Slots(filled, mask, counts)


def noised_slots(own: Sequence[Tensor], low: float = 0.1, high: float = 0.4, grow: float = 0.5) -> Slots:
    """Return slots [own n | noised copies | global] of twice the most boxes, plus one (CellDETR, 3.3; its noise).

    Copy k is one of box k modulo n. An image without boxes has global ones only, which see the last.
    """
    most = max((len(boxes) for boxes in own), default=0)
    noised = []
    for boxes in own:
        n = len(boxes)
        times = -(-(2 * most - n) // n) if n else 0
        whole = boxes.new_tensor(GLOBAL_BOX).expand(2 * most, 4)
        noised.append(noise_boxes(boxes.repeat(times, 1), low, high, grow) if n else whole)
    slots = contrastive_slots(own, noised)
    for i, n in enumerate(slots.counts):
        if n == 0:
            slots.mask[i, :, -1] = False
    return slots
