"""Tiles that a file leaves out: where glass would be that is how scanners save room, inside tissue it is damage."""

from __future__ import annotations

from typing import Protocol

import cv2
import numpy as np

from cellslide.slides.readers.base import TileGaps
from cellslide.slides.slide import Slide
from cellslide.types import Bool, Float64

Box = tuple[float, float, float, float]
# Of a tile that another level shows: the share that is tissue; of the tiles around a gap that no level shows.
TISSUE_SHARE, RING_SHARE = 0.02, 0.85


class Tissue(Protocol):
    """What is searched of a slide."""

    def share(self, xyxy: Box) -> float:
        """Return how much of a level-0 box is tissue, 0..1."""


def missing_tissue(slide: Slide, level: int, tissue: Tissue) -> list[Box]:
    """Return the level-0 boxes of tiles that a level leaves out inside the tissue, row by row.

    tissue  what was found on the slide itself. Where a smaller level holds the place, that tells whether it is tissue;
    where none does, it is where the tiles around it are full of tissue.
    """
    gaps = slide.reader.header.missing
    if not gaps or not gaps[level].is_gap.any():
        return []
    here, others = gaps[level], [g for k, g in enumerate(gaps) if k != level]
    rows, cols = np.nonzero(here.is_gap)
    enclosed = _enclosed(here, tissue)
    found = []
    for row, col in zip(rows.tolist(), cols.tolist(), strict=True):
        box = here.box(row, col)
        shown = any(not other.covers(box) for other in others)
        if tissue.share(box) >= TISSUE_SHARE if shown else enclosed[row, col]:
            found.append(box)
    return found


def _enclosed(gaps: TileGaps, tissue: Tissue) -> Bool:
    """Return which tiles belong to a gap with nothing but tissue around it."""
    out = np.zeros(gaps.is_gap.shape, np.bool_)
    count, labels = cv2.connectedComponents(gaps.is_gap.astype(np.uint8), connectivity=8)
    for k in range(1, count):
        part = labels == k
        if part[[0, -1]].any() or part[:, [0, -1]].any():
            continue  # at the edge of the slide, where scanners leave glass out
        ring = cv2.dilate(part.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(np.bool_) & ~part
        shares: Float64 = np.array([tissue.share(gaps.box(int(r), int(c))) for r, c in np.argwhere(ring)])
        if len(shares) and shares.mean() >= RING_SHARE:
            out |= part
    return out
