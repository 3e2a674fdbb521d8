"""NuInsSeg: a folder an organ, with `tissue images/NAME.png` and `label masks modify/NAME.tif` (Mahbod et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cellslide.evaluate.dataset import Sample, Source, read_labels
from cellslide.evaluate.layouts.layout import Layout, file_image, files, image_size, require_file, sample, typed_labels
from cellslide.types import Int32

IMAGES = "tissue images/*.png"


def read(root: Path) -> Iterator[Sample]:
    """Yield the images, without a split and without a pixel size; areas that are marked as vague are kept."""
    for image in files(root, IMAGES):
        folder = image.parent.parent
        path = require_file(folder / "label masks modify" / f"{image.stem}.tif", "NuInsSeg's label mask")
        source = Source(partial(file_image, image), partial(nuclei, path))
        yield sample(root, image, image_size(image), source, path, None, split="train", organ=folder.name)


def nuclei(path: Path) -> tuple[Int32, Sequence[str]]:
    """Return the label map of a file, without classes."""
    labels = read_labels(path)
    return typed_labels(labels, np.zeros_like(labels), (), path)


LAYOUT = Layout("nuinsseg", (IMAGES,), read, "CC BY 4.0")
