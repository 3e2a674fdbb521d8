"""Painted data sets for the training tests: dark discs on a pale ground, in the layout of `manifest.csv`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cellslide.evaluate.dataset import write_manifest


def painted(seed: int, size: int = 64, n: int = 8, radius: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image uint8 (H, W, 3), labels uint16 (H, W) and centres (n, 2) of discs that do not touch."""
    rng = np.random.default_rng(seed)
    image = np.full((size, size, 3), (230, 200, 220), np.uint8)
    labels = np.zeros((size, size), np.uint16)
    cells = rng.permutation((size // 16) ** 2)[:n]
    centres = np.stack([cells % (size // 16), cells // (size // 16)], 1) * 16 + 8.0
    ys, xs = np.mgrid[0:size, 0:size] + 0.5
    for k, (x, y) in enumerate(centres, 1):
        disc = (xs - x) ** 2 + (ys - y) ** 2 <= radius**2
        image[disc], labels[disc] = (90, 60, 140), k
    noise = rng.integers(-8, 9, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), labels, centres


def write_set(root: Path, rows: list[dict[str, str]], masks: bool = True, points: bool = False) -> Path:
    """Write a data set with one painted image for each row; rows give manifest columns."""
    for name in ("images", "masks", "points"):
        (root / name).mkdir(parents=True, exist_ok=True)
    written = []
    for i, row in enumerate(rows):
        image, labels, centres = painted(i)
        Image.fromarray(image).save(root / f"images/{i}.png")
        given = {"file": f"images/{i}.png", "split": "train", "mpp": "0.5", "licence": "CC0 1.0", **row}
        if masks:
            Image.fromarray(labels).save(root / f"masks/{i}.png")
            given["mask"] = f"masks/{i}.png"
        if points:
            text = "x,y,class\n" + "".join(f"{x},{y},{'ab'[k % 2]}\n" for k, (x, y) in enumerate(centres))
            (root / f"points/{i}.csv").write_text(text)
            given["points"] = f"points/{i}.csv"
        written.append(given | {"width": "64", "height": "64"})
    return write_manifest(root, written)
