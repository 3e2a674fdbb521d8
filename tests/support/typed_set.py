"""A labelled data set for the fake classifier of two paths: blue and pink discs on pinkish paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cellslide.evaluate.dataset import write_manifest
from tests.support.labelled import add_image, discs

COLORS = {"blue": (90, 60, 140), "pink": (180, 60, 120)}
# Pink enough that a whole context is pink, whatever the disc in its middle.
PAPER = (250, 225, 225)
SIZE = 160
CENTRES = [(x + 0.5, y + 0.5) for y in (30, 80, 130) for x in (30, 80, 130)]
# Class by class; the network sees the colour of the disc, so a wrong word makes a wrong answer.
NAMES = ("blue", "pink", "blue", "pink", "pink", "blue", "blue", "pink", "blue")


def write_typed_set(
    root: Path, images: int = 2, wrong: int = 0, organ: str = "breast (TCGA)", mpp: str = "0.5"
) -> Path:
    """Write images of nine discs, the first half of them in the split val; `wrong` discs of each have a false label."""
    rows = []
    for i in range(images):
        labels = discs((SIZE, SIZE), CENTRES, 12)
        names = tuple(np.roll(NAMES, i))
        said = [("pink" if n == "blue" else "blue") if k < wrong else n for k, n in enumerate(names)]
        points = [(x, y, name) for (x, y), name in zip(CENTRES, said, strict=True)]
        split = "val" if 2 * i < images else "train"
        rows.append(add_image(root, f"i{i}", labels, mask=False, points=points, split=split, organ=organ, mpp="0.5"))
        paint(root / rows[-1]["file"], labels, names)
    return write_manifest(root, rows)


def paint(path: Path, labels: np.ndarray, names: tuple[str, ...]) -> None:
    """Colour the discs of a label map by class and save the picture."""
    image = np.full((*labels.shape, 3), PAPER, np.uint8)
    for label, name in enumerate(names, 1):
        image[labels == label] = COLORS[name]
    Image.fromarray(image).save(path)
