"""Twins of distributed data sets: their files and names, with a few small discs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellslide.evaluate.layouts import conic, pannuke
from tests.support.labelled import discs, paint

SHAPE = (64, 64)
PLACES = [(14.0, 14.0), (46.0, 40.0)]
# Classes of the two discs of each image; "" draws none there.
Kinds = Sequence[tuple[str, str]]


def drawn(kinds: tuple[str, str]) -> tuple[NDArray[np.int32], dict[int, str]]:
    """Return the label map of an image, and the class of each label."""
    labels = discs(SHAPE, PLACES, 8)
    for k, kind in enumerate(kinds, 1):
        if not kind:
            labels[labels == k] = 0
    return labels, {k: kind for k, kind in enumerate(kinds, 1) if kind}


def write_pannuke(root: Path, fold: int, tissues: Sequence[str], images: Kinds) -> None:
    """Write one fold in its folders."""
    masks = np.zeros((len(images), *SHAPE, 6))
    for i, kinds in enumerate(images):
        labels, names = drawn(kinds)
        for k, name in names.items():
            # Numbers run over the fold, with gaps, as in the real one.
            masks[i, ..., pannuke.CLASSES.index(name)][labels == k] = 10 * i + 3 * k
        masks[i, ..., 5] = labels == 0
    pixels = np.stack([paint(drawn(kinds)[0]) for kinds in images]).astype(np.float64)
    for part, name, array in (
        ("images", "images", pixels), ("masks", "masks", masks), ("images", "types", np.array(tissues)),
    ):  # fmt: skip
        folder = root / f"Fold {fold}" / part / f"fold{fold}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", array)


def write_conic(root: Path, names: Sequence[str], images: Kinds) -> None:
    """Write the arrays and the names of the patches."""
    labels = np.zeros((len(images), *SHAPE, 2), np.uint16)
    for i, kinds in enumerate(images):
        instance, kind_of = drawn(kinds)
        labels[i, ..., 0] = instance * 7
        for k, name in kind_of.items():
            labels[i, ..., 1][instance == k] = conic.CLASSES.index(name) + 1
    np.save(root / "labels.npy", labels)
    np.save(root / "images.npy", np.stack([paint(drawn(kinds)[0]) for kinds in images]))
    (root / "patch_info.csv").write_text("\n".join(["patch_info", *names]) + "\n")
