"""Typed cells of labelled images, which are held, and of slides, which are read; the crops drawn around them.

Without augmentation a crop is the one that `classify` cuts: the same plane, corner, border and resampling. With it, one
affine map takes plane pixels straight to the input. Every crop is a function of (seed, draw number) alone.

Frames: points are (x, y) in pixels of the plane at the recipe's `mpp`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cellslide.errors import UsageError
from cellslide.inference.crops import CropCutter, RegionRead, crop_corners, inside_span, plan_regions, shown_box
from cellslide.slides.slide import slide_from_array
from cellslide.train.augment import crop_matrix, recolor
from cellslide.train.data import ImageSet, card_of, choose_samples
from cellslide.train.loaders import start_worker
from cellslide.train.nuclass.recipe import CellSetConfig, NuClassRecipe
from cellslide.train.pixels import InMemory, OnSlide, Pixels
from cellslide.train.recipe import AugmentConfig
from cellslide.train.slide_sets import AnySample, SlideSample, check_labels, read_nuclei, rows_of_part, set_name
from cellslide.types import CropSpec, Float64, Int64, Plane, UInt8

UNKNOWN_ORGAN = -1
# Cells that validate are read by squares of this edge, so that one read serves a batch.
BATCH_REGION_PX = 2048
BORDERS = {"reflect": cv2.BORDER_REFLECT_101, "zero": cv2.BORDER_CONSTANT}


@dataclass(frozen=True, slots=True)
class CellImage:
    """One image and its typed cells.

    pixels   of the whole plane.
    xy       float64 (N, 2), plane pixels.
    label    int64 (N,), index into the recipe's classes.
    organ    index into the recipe's organs, UNKNOWN_ORGAN where it is none of them.
    """

    name: str
    pixels: Pixels
    plane: Plane
    xy: Float64
    label: Int64
    organ: int

    def __len__(self) -> int:
        return len(self.label)


CellSet = ImageSet[CellImage, CellImage]


class CellCrops(NamedTuple):
    """A batch: local and context (B, 3, h, w), 0..255, uint8 or float32; organ and label int64 (B,).

    `context` has no pixels, (B, 3, 0, 0), where the stage needs none.
    """

    local: Tensor
    context: Tensor
    organ: Tensor
    label: Tensor


def load_cell_sets(paths: Sequence[Path], recipe: NuClassRecipe) -> list[CellSet]:
    """Read the typed points of data sets and the typed nuclei of slides; images without points are left out.

    Raises UsageError on an unknown patient, organ or pixel size, or if no cell is left to train.
    """
    chosen = choose_samples(paths, recipe.datasets, CellSetConfig(), recipe.fold)
    check_labels([s for part in chosen for s in (*part.train, *part.val)], recipe.labels)
    sets = []
    for path, part in zip(paths, chosen, strict=True):
        name = set_name(path)
        config = recipe.datasets.get(name, CellSetConfig())
        train = (prepare_cells(s, config, recipe) for s in part.train if _has_cells(s))
        val = (few_cells(prepare_cells(s, config, recipe), recipe) for s in part.val if _has_cells(s))
        sets.append(ImageSet(name, path, 1.0, tuple(train), tuple(val)))
    if not sum(len(image) for s in sets for image in s.train):
        raise UsageError(f"DATASET: no cell of the classes {', '.join(recipe.classes)} is left to train on")
    return sets


def _has_cells(sample: AnySample) -> bool:
    return isinstance(sample, SlideSample) or sample.points_path is not None


def prepare_cells(sample: AnySample, config: CellSetConfig, recipe: NuClassRecipe) -> CellImage:
    """Read one image, bring it to the recipe's plane and keep the points whose class the recipe knows.

    Of a slide the nuclei are read, and no pixel yet.
    """
    if isinstance(sample, SlideSample):
        return _of_slide(sample, config, recipe)
    mpp = sample.mpp or config.mpp
    if mpp is None:
        mend = f"set datasets.{sample.dataset}.mpp in --recipe"
        raise UsageError(f"{sample.image_path}: mpp is empty in the manifest; {mend}")
    with slide_from_array(sample.load_image(), mpp) as slide:
        plane = Plane.of(slide.info, recipe.mpp)
        pixels = slide.read_plane(plane, (0, 0, plane.width_px, plane.height_px))
    points = sample.load_points()
    names = [config.classes.get(name, name) for name in points.class_name]
    label = np.array([recipe.classes.index(n) if n in recipe.classes else -1 for n in names], np.int64)
    known = label >= 0
    xy = plane.from_level0(points.xy)[known]
    return CellImage(sample.stem, InMemory(pixels), plane, xy, label[known], organ_of(sample, config, recipe.organs))


def _of_slide(sample: SlideSample, config: CellSetConfig, recipe: NuClassRecipe) -> CellImage:
    nuclei = read_nuclei(sample, recipe.labels, recipe.classes, config.classes)
    sight_um = max(recipe.local.field_px, recipe.context.field_px) * recipe.mpp
    rows = rows_of_part(sample, nuclei.xy, config.val, sight_um) & (nuclei.label >= 0)
    plane = Plane.of(sample.info, recipe.mpp)
    xy, organ = plane.from_level0(nuclei.xy[rows]), organ_of(sample, config, recipe.organs)
    return CellImage(sample.stem, OnSlide(sample.info, plane), plane, xy, nuclei.label[rows], organ)


def few_cells(image: CellImage, recipe: NuClassRecipe) -> CellImage:
    """Return at most `recipe.val_cells` cells of an image, drawn by seed and name."""
    if recipe.val_cells is None or len(image) <= recipe.val_cells:
        return image
    rng = np.random.default_rng([recipe.seed, 4, zlib.crc32(image.name.encode())])
    rows = np.sort(rng.choice(len(image), recipe.val_cells, replace=False))
    return replace(image, xy=image.xy[rows], label=image.label[rows])


def organ_of(sample: AnySample, config: CellSetConfig, organs: Sequence[str]) -> int:
    """Return the index of a sample's organ, UNKNOWN_ORGAN if the recipe has none such; UsageError for a wrong key."""
    if config.organ is not None and config.organ not in organs:
        raise UsageError(f"recipe datasets.organ: {config.organ} is none of the organs {', '.join(organs)}")
    name = config.organ or (sample.organ.casefold().split() or [""])[0]
    return organs.index(name) if name in organs else UNKNOWN_ORGAN


def level_factor(spec: CropSpec) -> int:
    """Return by how much the plane is reduced before the affine map, so that the map reduces by two at most.

    At exactly two, unturned, a bilinear sample lies in the middle of four pixels and is their mean.
    """
    if spec.resample == "bilinear":
        return 1  # As published, without antialias.
    return 2 ** max(0, int(np.ceil(np.log2(spec.field_px / spec.input_px))) - 1)


def read_reduced(image: CellImage, factor: int, box: Float64, border: str) -> tuple[UInt8, Int64]:
    """Return what a box shows of the plane, reduced by a whole factor, and where its first pixel (x, y) lies.

    box  (2, 2), first and last reduced pixels, (x, y); with two more around it, which interpolation may touch.
    """
    size = [max(n // factor, 1) for n in (image.plane.width_px, image.plane.height_px)]
    low, high = np.floor(box[0]).astype(int) - 2, np.ceil(box[1]).astype(int) + 3
    (x0, x1), (y0, y1) = (inside_span(*span, border) for span in zip(low, high, size, strict=True))
    pixels = image.pixels.read((x0 * factor, y0 * factor, x1 * factor, y1 * factor))
    if factor > 1:
        pixels = np.asarray(cv2.resize(pixels, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA), np.uint8)
    return pixels, np.array([x0, y0], np.int64)


def cut_exact(image: CellImage, xy: Float64, spec: CropSpec) -> Tensor:
    """Return float32 (N, 3, input, input), 0..255, of the crops about points (N, 2) as `classify` cuts them."""
    corners = crop_corners(xy, spec.field_px)
    if not len(corners):
        return torch.empty(0, 3, spec.input_px, spec.input_px)
    low, high = corners.min(axis=0), corners.max(axis=0) + spec.field_px
    box = (int(low[0]), int(low[1]), int(high[0]), int(high[1]))
    shown = shown_box(image.plane, box, [spec.border])
    cutter = CropCutter(RegionRead(image.pixels.read(shown), shown[:2], box), image.plane, torch.device("cpu"))
    return cutter.cut(corners, spec)


def draw_crop(
    rng: np.random.Generator, augment: AugmentConfig, image: CellImage, centre_xy: Float64, spec: CropSpec
) -> UInt8:
    """Cut one crop uint8 (input, input, 3) about a point by a drawn affine map; colours stay.

    An unturned, unscaled crop equals that of `cut_exact` up to rounding; where the plane is reduced first, only as far
    as the slide's edge and corners on odd pixels leave it.
    """
    factor, size = level_factor(spec), spec.input_px
    middle = (crop_corners(centre_xy[None], spec.field_px)[0] + spec.field_px / 2) / factor
    matrix = crop_matrix(rng, augment, middle, size)
    linear = matrix[:, :2] * (spec.field_px / (size * factor))
    begin = middle - 0.5 - linear @ np.full(2, (size - 1) / 2)
    ends = begin + np.array([[0, 0], [0, size - 1], [size - 1, 0], [size - 1, size - 1]]) @ linear.T
    pixels, corner = read_reduced(image, factor, np.stack([ends.min(axis=0), ends.max(axis=0)]), spec.border)
    matrix = np.column_stack([linear, begin - corner])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    crop = cv2.warpAffine(pixels, matrix, (size, size), flags=how, borderMode=BORDERS[spec.border])
    return np.asarray(crop, np.uint8)


class CellDataset(Dataset[CellCrops]):
    """Augmented crops by draw number; every cell comes once before any comes again, in an order drawn anew."""

    def __init__(self, images: Sequence[CellImage], recipe: NuClassRecipe, context: bool) -> None:
        self.images, self.recipe, self.context = images, recipe, context
        counts = [len(image) for image in images]
        self.image_of = np.repeat(np.arange(len(images)), counts)
        self.row_of = np.concatenate([np.arange(n) for n in counts])
        self._pass, self._order = -1, np.empty(0, np.int64)

    def cell(self, draw: int) -> tuple[int, int]:
        """Return image and row of the cell of a draw."""
        turn, place = divmod(draw, len(self.row_of))
        if turn != self._pass:
            self._order = np.random.default_rng([self.recipe.seed, 1, turn]).permutation(len(self.row_of))
            self._pass = turn
        index = self._order[place]
        return int(self.image_of[index]), int(self.row_of[index])

    def __getitem__(self, draw: int) -> CellCrops:
        """Return draw `draw`, unbatched: crops uint8 (3, h, w)."""
        recipe, (chosen, row) = self.recipe, self.cell(draw)
        rng = np.random.default_rng([recipe.seed, 0, draw])
        image = self.images[chosen]
        xy = image.xy[row]
        local = draw_crop(rng, recipe.augment, image, xy + _shift(rng, recipe.jitter_px), recipe.local)
        # Both crops show one slide, so their colours change alike: the same generator once for each.
        crops = [recolor(np.random.default_rng([recipe.seed, 2, draw]), recipe.augment, local)]
        if self.context:
            far = xy + _shift(rng, recipe.context_training.shift_px)
            wide = draw_crop(rng, recipe.augment, image, far, recipe.context)
            crops.append(recolor(np.random.default_rng([recipe.seed, 2, draw]), recipe.augment, wide))
        organ = UNKNOWN_ORGAN if rng.random() < recipe.unknown_organ_p else image.organ
        tensors = [torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))) for crop in crops]
        empty = torch.empty(3, 0, 0, dtype=torch.uint8)
        return CellCrops(
            tensors[0], tensors[1] if self.context else empty, torch.tensor(organ), torch.tensor(int(image.label[row]))
        )


def _shift(rng: np.random.Generator, most_px: float) -> Float64:
    return rng.uniform(-most_px, most_px, 2)


class ExactCells(Dataset[CellCrops]):
    """The cells of images as they are, in batches of at most `batch_size` that lie together."""

    def __init__(self, images: Sequence[CellImage], recipe: NuClassRecipe, context: bool, batch_size: int = 64) -> None:
        self.images, self.recipe, self.context = images, recipe, context
        specs = (recipe.local, recipe.context) if context else (recipe.local,)
        self.parts = [(k, rows) for k, image in enumerate(images) for rows in _together(image, specs, batch_size)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> CellCrops:
        """Return batch `index`: crops float32 (B, 3, h, w)."""
        chosen, rows = self.parts[index]
        image = self.images[chosen]
        xy, label = image.xy[rows], torch.from_numpy(image.label[rows])
        empty = torch.empty(len(label), 3, 0, 0)
        context = cut_exact(image, xy, self.recipe.context) if self.context else empty
        organ = torch.full((len(label),), image.organ)
        return CellCrops(cut_exact(image, xy, self.recipe.local), context, organ, label)


def _together(image: CellImage, specs: Sequence[CropSpec], batch_size: int) -> Iterator[Int64]:
    corners = [(crop_corners(image.xy, spec.field_px), spec.field_px) for spec in specs]
    for region in plan_regions(image.xy, corners, BATCH_REGION_PX):
        for first in range(0, len(region.rows), batch_size):
            yield region.rows[first : first + batch_size]


def exact_loader(
    images: Sequence[CellImage], recipe: NuClassRecipe, context: bool, workers: int = 0
) -> DataLoader[CellCrops]:
    """Return the loader of the cells as they are, in a fixed order; `workers` processes stay for all epochs."""
    cells = ExactCells(images, recipe, context)
    return DataLoader(  # type: ignore[return-value]
        cells, batch_size=None, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=start_worker
    )


def images_of(sets: Sequence[CellSet]) -> tuple[list[CellImage], list[CellImage]]:
    """Return the images of all sets that train and those that validate, without those that show no cell."""
    train, val = (
        [image for part in parts for image in part if len(image)]
        for parts in zip(*((s.train, s.val) for s in sets), strict=True)
    )
    return train, val


def cell_set_card(images: CellSet, recipe: NuClassRecipe) -> dict[str, Any]:
    """Return the card's entry of a data set, its cells counted by class."""

    def count(items: Sequence[CellImage]) -> dict[str, Any]:
        cells = class_counts(items, len(recipe.classes)).tolist()
        unknown = sum(image.organ < 0 for image in items)
        return {"images": len(items), "organ_unknown": unknown, "cells": dict(zip(recipe.classes, cells, strict=True))}

    return card_of(images, count)


def class_counts(images: Sequence[CellImage], n_classes: int) -> Int64:
    """Return the cells of each class, int64 (K,)."""
    labels = np.concatenate([np.empty(0, np.int64), *(image.label for image in images)])
    return np.bincount(labels, minlength=n_classes).astype(np.int64)


def normalise(crops: Tensor, recipe: NuClassRecipe) -> Tensor:
    """Return crops (B, 3, h, w), 0..255, as the network reads them."""
    mean, std = (255 * torch.tensor(v, device=crops.device).view(1, 3, 1, 1) for v in (recipe.mean, recipe.std))
    x = (crops.float() - mean) / std
    return x.contiguous(memory_format=torch.channels_last) if recipe.channels_last else x
