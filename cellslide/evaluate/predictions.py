"""Predictions that lie in a folder, one per image, found by the image's file stem: label images or points."""

from __future__ import annotations

from pathlib import Path

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import read_labels, read_points
from cellslide.evaluate.score import Nuclei
from cellslide.store.run_record import TABLE

LABEL_SUFFIXES = (".png", ".npy", ".tif", ".tiff")
POINT_SUFFIX = ".csv"


def find_prediction(folder: Path, stem: str) -> Path:
    """Return `folder/stem/cells.zarr`, a label image `folder/stem.*` or points `folder/stem.csv`.

    Raises UsageError if there is none, or more than one.
    """
    places = [folder / stem / TABLE, *(folder / (stem + suffix) for suffix in (*LABEL_SUFFIXES, POINT_SUFFIX))]
    found = [place for place in places if place.exists()]
    if not found:
        forms = f"{stem}/{TABLE}, {stem}.png|.npy|.tif or {stem}{POINT_SUFFIX}"
        raise UsageError(f"{folder}: no prediction for image {stem}; --predictions needs {forms}")
    if len(found) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in found)
        raise UsageError(f"{folder}: several predictions for image {stem} ({names}); keep one of them in --predictions")
    return found[0]


def read_prediction(path: Path) -> Nuclei:
    """Read a label image (PNG, TIFF, .npy) or points (CSV `x,y[,class][,score]`); raises UsageError where damaged."""
    if path.suffix == POINT_SUFFIX:
        points = read_points(path)
        class_name = points.class_name if all(points.class_name) else None
        return Nuclei(points.xy, class_name=class_name, score=points.score)
    return Nuclei.from_labels(read_labels(path))
