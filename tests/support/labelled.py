"""Small labelled data sets written to a folder, with discs at known places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PAPER = (240, 230, 238)
NUCLEUS = (90, 60, 140)


def discs(shape: tuple[int, int], centres_xy: Sequence[tuple[float, float]], radius_px: float) -> NDArray[np.int32]:
    """Return a label map (H, W) with one disc per centre, labelled 1.. in that order; later discs win."""
    rows, cols = np.indices(shape) + 0.5
    labels = np.zeros(shape, np.int32)
    for label, (x, y) in enumerate(centres_xy, 1):
        labels[(cols - x) ** 2 + (rows - y) ** 2 <= radius_px**2] = label
    return labels


def paint(labels: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return an RGB image of a label map: violet nuclei on pale pink."""
    image = np.empty((*labels.shape, 3), np.uint8)
    image[:] = PAPER
    image[labels > 0] = NUCLEUS
    return image


def add_image(
    root: Path,
    stem: str,
    labels: NDArray[np.int32],
    *,
    mask: bool = True,
    points: Sequence[tuple[float, float, str]] | None = None,
    **columns: str,
) -> dict[str, str]:
    """Write one image with its mask and points, and return its manifest row."""
    row = {"file": f"images/{stem}.png", "split": "train", "mpp": "0.25", "organ": "breast"}
    row |= {"width": str(labels.shape[1]), "height": str(labels.shape[0])}
    for folder in ("images", "masks", "points"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(paint(labels)).save(root / row["file"])
    if mask:
        row["mask"] = f"masks/{stem}.png"
        Image.fromarray(labels.astype(np.uint16)).save(root / row["mask"])
    if points is not None:
        row["points"] = f"points/{stem}.csv"
        lines = ["x,y,class", *(f"{x},{y},{name}" for x, y, name in points)]
        (root / row["points"]).write_text("\n".join(lines) + "\n")
    return row | columns
