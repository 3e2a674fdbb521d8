"""NuClass's training cells: annotations.json and patches_1024x1024.h5, a crop a cell, the nucleus in its middle."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Points, Sample, Source
from cellslide.evaluate.layouts.layout import Layout, files, require_file, sample
from cellslide.store.foreign_files import read_json
from cellslide.types import UInt8

CROPS, CROP_PX = "patches_1024x1024.h5", 1024
# In the order of their numbers.
CLASSES = (
    "Acinar", "B_Cell", "Cardiomyocyte", "Ductal", "Endocrine", "Endothelial", "Endothelial_TumorAssociated",
    "Epithelial_Airway", "Epithelial_Alveolar", "Epithelial_Malignant", "Fibroblast", "Macrophage", "Mast_Cell",
    "Smooth_Muscle", "T_Cell", "Tumor_Associated_Fibroblast",
)  # fmt: skip


def read(root: Path) -> Iterator[Sample]:
    """Yield a sample for each cell, of the split that its folder is called; crops of 224 px are in those of 1024."""
    for crops in files(root, CROPS):
        path = require_file(crops.with_name("annotations.json"), "the cells' annotations")
        cells, rows = read_json(path, UsageError), _rows(crops)
        for key, cell in cells.items() if isinstance(cells, dict) else ():
            source = Source(partial(crop, crops, key, rows.get(key)), points=partial(middle, _name(cell, path, key)),
                            classes=CLASSES)  # fmt: skip
            said = {"split": crops.parent.name, "organ": str(cell.get("tissue_type", ""))}
            yield sample(root, root / f"{Path(key).name}.png", (CROP_PX, CROP_PX), source, path, 0.25, **said)


def _name(cell: Any, path: Path, key: str) -> str:
    kind = cell.get("class_id") if isinstance(cell, dict) else None
    if kind in CLASSES:
        return str(kind)
    if not isinstance(kind, int) or not 0 <= kind < len(CLASSES):
        raise UsageError(f"{path}: cell {key} has class_id {kind!r}, not a name or 0 to {len(CLASSES) - 1}")
    return CLASSES[kind]


def _open(path: Path) -> Any:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read as HDF5 ({error})") from error


def _rows(path: Path) -> dict[str, int]:
    """Return the row of each cell in a file with `images` and `keys`; none where each cell has an array of its own."""
    with _open(path) as file:
        keys = file["keys"].asstr()[:] if "keys" in file else ()
        return {str(key): row for row, key in enumerate(keys)}


def crop(path: Path, key: str, row: int | None) -> UInt8:
    """Return the crop of a cell, uint8 (1024, 1024, 3)."""
    with _open(path) as file:
        if row is None and key not in file:
            raise UsageError(f"{path}: has no crop of cell {key}")
        return np.asarray(file[key] if row is None else file["images"][row], np.uint8)


def middle(name: str) -> Points:
    """Return the one point of a crop."""
    return Points(np.full((1, 2), CROP_PX / 2), (name,))


LAYOUT = Layout("nuclass", (CROPS,), read)
