"""PUMA: regions NAME.tif of 1024 px at 0.23 µm/px and outlines NAME_nuclei.geojson (Schuiveling et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Sample, Source
from cellslide.evaluate.layouts.layout import Layout, file_image, files, fill, image_size, sample
from cellslide.store.foreign_files import read_json
from cellslide.types import Int32

SUFFIX = "_nuclei"
CLASSES = ("tumor", "lymphocyte", "plasma_cell", "histiocyte", "melanophage", "neutrophil", "stroma", "epithelium",
           "endothelium", "apoptosis")  # fmt: skip


def read(root: Path) -> Iterator[Sample]:
    """Yield the regions, all of the split train; primary and metastatic melanomas are cohorts."""
    images = {path.stem: path for path in files(root, "*.tif")}
    for path in files(root, f"*{SUFFIX}.geojson"):
        stem = path.stem.removesuffix(SUFFIX)
        if stem not in images:
            raise UsageError(f"{path}: its image {stem}.tif is missing")
        size = image_size(images[stem])
        source = Source(partial(file_image, images[stem]), partial(nuclei, path, size), classes=CLASSES)
        cohort = next((name for name in ("primary", "metastatic") if name in stem), "")
        yield sample(root, images[stem], size, source, path, 0.23, split="train", organ="skin", cohort=cohort)


def nuclei(path: Path, size: tuple[int, int]) -> tuple[Int32, Sequence[str]]:
    """Return the label map of a region of `size` (width, height) and the class of each label; of overlaps the last."""
    rings, owner, names = [], [0], list[str]()
    try:
        for feature in read_json(path, UsageError)["features"]:
            shape, kind = feature["geometry"], feature["properties"]["classification"]["name"]
            name = kind.removeprefix("nuclei_")
            if name not in CLASSES:
                raise ValueError(f"class {kind}")
            names.append(name)
            for part in [shape["coordinates"]] if shape["type"] == "Polygon" else shape["coordinates"]:
                ring = np.array(part[0], np.float64)[:, :2]
                rings.append(ring)
                owner.append(len(names))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UsageError(f"{path}: its outlines cannot be read ({error!r})") from error
    return np.array(owner, np.int32)[fill(rings, size)], names


LAYOUT = Layout("puma", (f"*{SUFFIX}.geojson",), read)
