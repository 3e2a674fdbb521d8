"""PanNuke: three folds of images.npy, masks.npy and types.npy (Gamper et al. 2020); its splits are fold1 to fold3."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Sample, Source
from cellslide.evaluate.layouts.layout import Layout, array_image, files, load_array, sample
from cellslide.types import Int32

# Channels of the masks in their order; a sixth holds the background.
CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
PARTS = ("images", "masks", "types")


def read(root: Path) -> Iterator[Sample]:
    """Yield the images of all folds that are there."""
    folds: dict[str, dict[str, Path]] = {}
    for part in PARTS:
        for path in files(root, f"{part}.npy"):
            folds.setdefault(_fold(root, path), {})[part] = path
    for fold, found in sorted(folds.items()):
        for part in PARTS:
            if part not in found:
                raise UsageError(f"{root}: PanNuke's {fold} lacks {part}.npy")
        yield from _read_fold(root, fold, found)


def _fold(root: Path, path: Path) -> str:
    name = f"{root.resolve().name}/{path.relative_to(root).as_posix()}"
    numbers = re.findall(r"fold[ _-]?(\d+)", name, re.IGNORECASE)
    return f"fold{numbers[-1]}" if numbers else "fold"


def _read_fold(root: Path, fold: str, found: dict[str, Path]) -> Iterator[Sample]:
    images, masks = load_array(found["images"], 4, 3), load_array(found["masks"], 4, len(CLASSES) + 1)
    tissues = load_array(found["types"], 1)
    if not images.shape[:3] == masks.shape[:3] == (len(tissues), *masks.shape[1:3]):
        raise UsageError(
            f"{found['masks']}: masks {masks.shape}, images {images.shape} and {len(tissues)} types do not go together"
        )
    for i, tissue in enumerate(tissues.tolist()):
        source = Source(partial(array_image, found["images"], i), partial(nuclei, found["masks"], i), classes=CLASSES)
        size = (images.shape[2], images.shape[1])
        name = root / f"{fold}_{i:05d}.png"
        yield sample(root, name, size, source, found["masks"], 0.25, split=fold, organ=str(tissue))


def nuclei(path: Path, row: int) -> tuple[Int32, Sequence[str]]:
    """Return the label map (H, W) of image `row` and each label's class; of channels that overlap the last counts."""
    channels = np.asarray(load_array(path, 4, len(CLASSES) + 1)[row])
    labels, names = np.zeros(channels.shape[:2], np.int32), list[str]()
    for k, name in enumerate(CLASSES):
        ids, rank = np.unique(channels[..., k], return_inverse=True)
        rank = rank.reshape(labels.shape)
        # Rank 0 is the background, unless nuclei fill the whole channel.
        rank = rank if ids[0] == 0 else rank + 1
        labels = np.where(rank > 0, rank + len(names), labels)
        names += [name] * int(rank.max())
    return labels.astype(np.int32), names


LAYOUT = Layout("pannuke", ("masks.npy", "types.npy"), read, "CC BY-NC-SA 4.0")
