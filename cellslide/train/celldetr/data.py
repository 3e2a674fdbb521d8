"""Crops with the boxes of their nuclei, drawn as for every training of nuclei, and whole images that validate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Sample
from cellslide.evaluate.detection import centroids
from cellslide.train.celldetr.recipe import CellDETRRecipe
from cellslide.train.data import CropDataset, ImageSet, TrainImage, prepare, read_sets, supervision_of
from cellslide.train.loaders import draw_loader, whole_loader
from cellslide.train.recipe import DatasetConfig
from cellslide.train.slide_fields import VAL_FIELD_PX, SlideFields, slide_fields
from cellslide.train.slide_sets import AnySample, SlideSample
from cellslide.train.task import Run
from cellslide.types import Bool, Float32, Float64, Int32, Int64, UInt8


@dataclass(frozen=True, slots=True)
class MarkedImage:
    """A validation image at the recipe's pixel size and where its nuclei are.

    xy      float64 (N, 2), points as marked, or centroids of masks; pixels of `image`.
    label   int64 (N,), class 0..K-1, -1 where it is not known.
    known   bool (H, W), where the image is annotated.
    """

    name: str
    dataset: str
    image: UInt8
    xy: Float64
    label: Int64
    known: Bool

    @property
    def n_nuclei(self) -> int:
        """Nuclei of the image."""
        return len(self.xy)


BoxSet = ImageSet[TrainImage | SlideFields, MarkedImage]


def load_box_sets(paths: Sequence[Path], recipe: CellDETRRecipe) -> list[BoxSet]:
    """Read and resample the data sets; raises UsageError on an unknown patient, on points to train on, or on nothing.

    A patient that validates in one set trains in none.
    """

    def outlined(sample: AnySample, config: DatasetConfig) -> TrainImage | SlideFields:
        return (
            fields_of(sample, config, recipe) if isinstance(sample, SlideSample) else _outlined(sample, config, recipe)
        )

    def validating(sample: AnySample, config: DatasetConfig) -> Iterator[MarkedImage]:
        if isinstance(sample, SlideSample):
            yield from marked_squares(fields_of(sample, config, recipe), recipe)
        else:
            yield marked(sample, config, recipe)

    return read_sets(paths, recipe.datasets, outlined, validating, recipe.fold, recipe.labels)


def fields_of(sample: SlideSample, config: DatasetConfig, recipe: CellDETRRecipe) -> SlideFields:
    """Return a slide whose nuclei have outlines; raises UsageError where they have none."""
    names = recipe.model.classes, config.classes
    found = slide_fields(sample, recipe.mpp, recipe.crop_px, recipe.labels, *names, config.val, outlined=True)
    if found.outlines is None:
        raise UsageError(f"{sample.table}: boxes need outlines, and this table has points only; `segment` the slide")
    return found


def marked_squares(item: SlideFields, recipe: CellDETRRecipe) -> Iterator[MarkedImage]:
    """Yield squares of a slide that validate; where it has typed nuclei, those of no class are not known."""
    for box in item.squares(VAL_FIELD_PX, recipe.val_fields, recipe.seed):
        window = item.window(box)
        assert window.labels is not None
        height, width = window.labels.shape
        inside = ((window.xy >= 0) & (window.xy < (width, height))).all(axis=1)
        typed = (window.label >= 0) | (not item.typed)
        known = ~np.isin(window.labels, np.flatnonzero(~typed) + 1)
        rows = inside & typed
        yield MarkedImage(item.name, item.dataset, window.image, window.xy[rows], window.label[rows], known)


def _outlined(sample: Sample, config: DatasetConfig, recipe: CellDETRRecipe) -> TrainImage:
    if supervision_of(sample, config) == "points":
        mend = f"outline its nuclei first, or set datasets.{sample.dataset}.weight to 0 in --recipe to validate on it"
        raise UsageError(f"{sample.image_path}: boxes need masks, and this image has points only; {mend}")
    return prepare(sample, config, recipe.crops())


def marked(sample: Sample, config: DatasetConfig, recipe: CellDETRRecipe) -> MarkedImage:
    """Return one image that validates, by its points where it has some, else by its masks."""
    item = prepare(sample, config, recipe.crops())
    if item.points_xy is not None:
        names = [config.classes.get(name, name) for name in sample.load_points().class_name]
        known = recipe.model.classes
        label = np.array([known.index(name) if name in known else -1 for name in names], np.int64)
        everywhere = np.ones(item.labels.shape, np.bool_)
        return MarkedImage(item.name, item.dataset, item.image, item.points_xy, label, everywhere)
    _, xy = centroids(np.maximum(item.labels, 0))
    none = np.full(len(xy), -1, np.int64)
    return MarkedImage(item.name, item.dataset, item.image, xy, none, item.labels >= 0)


class BoxCrop(NamedTuple):
    """One crop: image uint8 (3, H, W); boxes float32 (n, 4) as (cx, cy, w, h), shares of the crop; label int64 (n,),
    -1 where a nucleus's class is not known; known bool (H, W), where the crop is annotated."""

    image: Tensor
    boxes: Tensor
    label: Tensor
    known: Tensor


class BoxCrops(NamedTuple):
    """A batch of crops: images uint8 (B, 3, H, W), known bool (B, H, W), and boxes and labels of each image."""

    image: Tensor
    boxes: list[Tensor]
    label: list[Tensor]
    known: Tensor


class BoxDataset(Dataset[BoxCrop]):
    """Crops by draw number: item d is a function of (seed, d) alone."""

    def __init__(self, sets: Sequence[BoxSet], recipe: CellDETRRecipe) -> None:
        self.crops = CropDataset(sets, recipe.crops())
        self.min_box_px = recipe.min_box_px

    def __getitem__(self, draw: int) -> BoxCrop:
        """Return draw `draw`, unbatched."""
        image, labels, item = self.crops.draw(draw)
        return boxed(image, labels, item.label_class, self.min_box_px)


def boxed(image: UInt8, labels: Int32, label_class: Int32, min_box_px: float) -> BoxCrop:
    """Return a crop and the boxes of its nuclei from labels (H, W); classes 1..K become 0..K-1."""
    ids, boxes = label_boxes(labels)
    height, width = labels.shape
    kept = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) >= min_box_px
    shares = boxes[kept] / np.array([width, height, width, height], np.float32)
    centred = np.concatenate([(shares[:, :2] + shares[:, 2:]) / 2, shares[:, 2:] - shares[:, :2]], 1)
    # Background is class 0 of a segmentation and -1 is not known; here both are not a class.
    label = np.maximum(label_class[ids[kept]].astype(np.int64) - 1, -1)
    known = annotated(labels, ids[~kept])
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return BoxCrop(planes, torch.from_numpy(centred), torch.from_numpy(label), torch.from_numpy(known))


def label_boxes(labels: Int32) -> tuple[Int64, Float32]:
    """Return the labels (n,) above 0 of a map, ascending, and their boxes float32 (n, 4) xyxy, half-open, in pixels.

    A box is as wide as its nucleus: from the first column to the one after the last.
    """
    rows, cols = np.nonzero(labels > 0)
    ids, inverse = np.unique(labels[rows, cols], return_inverse=True)
    low = np.full((len(ids), 2), np.iinfo(np.int64).max)
    high = np.full((len(ids), 2), -1)
    for axis, index in enumerate((cols, rows)):
        np.minimum.at(low[:, axis], inverse, index)
        np.maximum.at(high[:, axis], inverse, index)
    return ids.astype(np.int64), np.concatenate([low, high + 1], 1).astype(np.float32).reshape(-1, 4)


def annotated(labels: Int32, left_out: Int64) -> Bool:
    """Return where a crop is annotated: neither beyond the image, nor ignored, nor a nucleus that is left out."""
    return (labels >= 0) & ~np.isin(labels, left_out)


def collate(items: Sequence[BoxCrop]) -> BoxCrops:
    """Return the batch of some crops; boxes stay apart, since images have as many as they have."""
    return BoxCrops(
        torch.stack([item.image for item in items]),
        [item.boxes for item in items],
        [item.label for item in items],
        torch.stack([item.known for item in items]),
    )


def loaders(run: Run, model: Any) -> tuple[DataLoader[BoxCrops], DataLoader[MarkedImage]]:
    """Return the loaders of training batches and of the whole images that validate; see `draw_loader`."""
    return draw_loader(BoxDataset(run.sets, run.recipe), run, collate), whole_loader(run.sets)
