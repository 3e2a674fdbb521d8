"""OCELOT: images/SPLIT/cell/ID.jpg, annotations/SPLIT/cell/ID.csv and metadata.json (Ryu et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Points, Sample, Source
from cellslide.evaluate.layouts.layout import Layout, file_image, files, image_size, read_csv, require_file, sample
from cellslide.store.foreign_files import read_json

# Values 1 and 2: a background cell, which is any other, and a tumour cell.
CLASSES = ("other", "tumor")


def read(root: Path) -> Iterator[Sample]:
    """Yield the cell patches of the splits train, val and test; tissue patches are not read."""
    for path in files(root, "cell/*.csv"):
        top, split = path.parents[3], path.parents[1].name
        image = require_file(top / "images" / split / "cell" / f"{path.stem}.jpg", "OCELOT's image")
        about = _pairs(require_file(top / "metadata.json", "OCELOT's metadata")).get(path.stem)
        if not isinstance(about, dict):
            raise UsageError(f"{top / 'metadata.json'}: says nothing of image {path.stem}")
        source = Source(partial(file_image, image), points=partial(points, path), classes=CLASSES)
        mpp = float(about.get("cell", {}).get("resized_mpp_x", 0.2))
        said = {"split": split, "patient": str(about.get("slide_name", ""))[:12], "organ": str(about.get("organ", ""))}
        yield sample(root, image, image_size(image), source, path, mpp, **said)


def _pairs(path: Path) -> dict[str, object]:
    found = read_json(path, UsageError)
    pairs = found.get("sample_pairs") if isinstance(found, dict) else None
    if not isinstance(pairs, dict):
        raise UsageError(f"{path}: has no sample_pairs")
    return pairs


def points(path: Path) -> Points:
    """Return the cells of a file without a header: x, y, class."""
    try:
        rows = [(float(x), float(y), int(kind)) for x, y, kind in read_csv(path)]
        return Points(np.array([row[:2] for row in rows]).reshape(-1, 2), tuple(_name(row[2]) for row in rows))
    except ValueError as error:
        raise UsageError(f"{path}: rows must be x,y,class with class 1 or 2 ({error})") from error


def _name(kind: int) -> str:
    if not 1 <= kind <= len(CLASSES):
        raise ValueError(f"class {kind}")
    return CLASSES[kind - 1]


LAYOUT = Layout("ocelot", ("cell/*.csv",), read)
