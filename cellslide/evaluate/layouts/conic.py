"""CoNIC (patches of Lizard): images.npy and labels.npy of 256 px at 20x, patch_info.csv (Graham et al. 2021)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Sample, Source
from cellslide.evaluate.layouts.layout import (
    Layout,
    array_image,
    files,
    load_array,
    read_csv,
    require_file,
    sample,
    typed_labels,
)
from cellslide.types import Int32, UInt8

# Values 1 to 6 of the second channel of the labels.
CLASSES = ("neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective")
MPP = 0.5
# CellVTA enlarges a patch to this edge and cuts it into 2 x 2 tiles that overlap.
ENLARGED_PX, TILE_PX = 480, 256


def read(root: Path) -> Iterator[Sample]:
    """Yield the patches; where patch_info.csv is there each has its name, and as patient the image it was cut from.

    No split is distributed: of those images a fifth, by their names, is of the split test.
    """
    path = next(files(root, "labels.npy"), root / "labels.npy")
    labels = load_array(require_file(path, "CoNIC's array of labels"), 4, 2)
    images = require_file(path.with_name("images.npy"), "CoNIC's array of images")
    if load_array(images, 4, 3).shape[:3] != labels.shape[:3]:
        raise UsageError(f"{images}: {load_array(images, 4, 3).shape} does not go with labels {labels.shape}")
    info = path.with_name("patch_info.csv")
    names = [row[0] for row in read_csv(info)[1:]] if info.is_file() else [f"conic_{i:05d}" for i in range(len(labels))]
    if len(names) != len(labels):
        raise UsageError(f"{info}: names {len(names)} patches, but there are {len(labels)}")
    for i, name in enumerate(names):
        of, _, number = name.rpartition("-")
        source = Source(partial(array_image, images, i), partial(nuclei, path, i), classes=CLASSES)
        patient = of if number.isdigit() else ""
        split = "test" if patient and zlib.crc32(patient.encode()) % 5 == 0 else "train"
        said = {"split": split, "organ": "colon", "patient": patient, "cohort": of.partition("_")[0]}
        size = (labels.shape[2], labels.shape[1])
        yield sample(root, root / f"{Path(name).name}.png", size, source, path, MPP, **said)


def nuclei(path: Path, row: int) -> tuple[Int32, Sequence[str]]:
    """Return the label map (H, W) of patch `row`, labels from 1 without gaps, and the class of each label."""
    instance, kind = np.moveaxis(np.asarray(load_array(path, 4, 2)[row]).astype(np.int32), -1, 0)
    return typed_labels(instance, kind, CLASSES, path)


def cut(whole: Sample) -> list[Sample]:
    """Return CellVTA's tiles of a patch: enlarged to 480 px, bilinear, four tiles of 256 px, 32 px of them shared.

    Labels are enlarged by the nearest pixel. What the edge of a tile cuts off counts in both tiles, as published.
    """
    source, step = whole.source, ENLARGED_PX - TILE_PX
    if source is None or source.nuclei is None or whole.mpp is None:
        raise UsageError(f"{whole.image_path}: --protocol conic-cellvta is for CoNIC's images.npy and labels.npy")
    mpp = whole.mpp * whole.width / ENLARGED_PX
    tiles = []
    for row in (0, step):
        for col in (0, step):
            part = replace(source, image=partial(_image, source, row, col), nuclei=partial(_nuclei, source, row, col))
            path = whole.image_path.with_stem(f"{whole.stem}_{row}_{col}")
            tiles.append(replace(whole, image_path=path, source=part, mpp=mpp, width=TILE_PX, height=TILE_PX))
    return tiles


def _image(source: Source, row: int, col: int) -> UInt8:
    large = Image.fromarray(source.image()).resize((ENLARGED_PX, ENLARGED_PX), Image.Resampling.BILINEAR)
    return np.asarray(large)[row : row + TILE_PX, col : col + TILE_PX]


def _nuclei(source: Source, row: int, col: int) -> tuple[Int32, Sequence[str]]:
    assert source.nuclei is not None
    labels, names = source.nuclei()
    down, right = (
        ((np.arange(TILE_PX) + at + 0.5) * n / ENLARGED_PX).astype(int)
        for at, n in zip((row, col), labels.shape, strict=True)
    )
    return labels[np.ix_(down, right)], names


LAYOUT = Layout("conic", ("labels.npy",), read, "CC BY-NC-SA 4.0")
