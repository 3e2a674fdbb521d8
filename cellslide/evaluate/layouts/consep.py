"""CoNSeP: Train and Test with Images/NAME.png and Labels/NAME.mat of 1000 px at 40x (Graham et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Sample, Source
from cellslide.evaluate.layouts.layout import (
    Layout,
    file_image,
    files,
    image_size,
    require_file,
    sample,
    typed_labels,
)
from cellslide.types import Int32

# Values 1 to 7 of type_map.
CLASSES = ("other", "inflammatory", "healthy epithelial", "malignant epithelial", "fibroblast", "muscle", "endothelial")


def read(root: Path) -> Iterator[Sample]:
    """Yield the images; their splits are train and test."""
    for path in files(root, "Labels/*.mat"):
        image = require_file(path.parent.with_name("Images") / f"{path.stem}.png", "CoNSeP's image")
        source = Source(partial(file_image, image), partial(nuclei, path), classes=CLASSES)
        split = path.parent.parent.name.casefold()
        yield sample(root, image, image_size(image), source, path, 0.25, split=split, organ="colon")


def nuclei(path: Path) -> tuple[Int32, Sequence[str]]:
    """Return the label map (H, W) of a file and the class of each label."""
    try:
        found = loadmat(path, variable_names=("inst_map", "type_map"))
        instance, kind = (np.asarray(found[name]).astype(np.int32) for name in ("inst_map", "type_map"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MatReadError) as error:
        raise UsageError(f"{path}: inst_map and type_map cannot be read ({error})") from error
    return typed_labels(instance, kind, CLASSES, path)


LAYOUT = Layout("consep", ("Labels/*.mat",), read)
