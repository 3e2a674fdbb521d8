"""Labelled samples as points, kept in memory at one pixel size, and the fields that are drawn from them.

A field may be larger than the annotated window: what lies around the window is the tissue that the data set gives with
it, and its mirror image beyond that. Every field is a function of (seed, draw number) alone.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import MANIFEST, Sample
from cellslide.evaluate.detection import RADIUS_UM, centroids
from cellslide.train.augment import crop_matrix, recolor
from cellslide.train.data import IGNORE_LABEL, ImageSet, card_of, pixel_size, read_sets, resample_image, resample_labels
from cellslide.train.loaders import Draws, draw_loader, whole_loader
from cellslide.train.points.losses import UNKNOWN
from cellslide.train.points.recipe import PointsRecipe
from cellslide.train.recipe import DatasetConfig
from cellslide.train.slide_fields import VAL_FIELD_PX, SlideFields, Window, slide_fields
from cellslide.train.slide_sets import AnySample, SlideSample
from cellslide.train.task import Run
from cellslide.types import Bool, Float64, Int32, Int64, UInt8

Int8 = NDArray[np.int8]

# Values of PointImage.region.
IGNORED, UNLABELLED, SUPERVISED = -1, 0, 1


@dataclass(frozen=True, slots=True)
class PointImage:
    """One image at the recipe's pixel size and its nuclei.

    image    uint8 (H, W, 3), with the surroundings of the annotated window where the data set gives them.
    window   the annotated window (x0, y0, x1, y1), px of `image`.
    mask     int8 (H, W): 1 nucleus, 0 background, -1 not known.
    region   int8 (H, W): SUPERVISED where every nucleus is known, IGNORED in the window where not, else UNLABELLED.
    xy       float64 (N, 2), px of `image`.
    label    int64 (N,), index into the recipe's classes, UNKNOWN for another class or none.
    typed    whether all its nuclei are of known class, so that it can score types.
    mpp      pixel size of the source file, as given or estimated.
    """

    name: str
    dataset: str
    image: UInt8
    window: tuple[int, int, int, int]
    mask: Int8
    region: Int8
    xy: Float64
    label: Int64
    typed: bool
    mpp: float


PointSet = ImageSet[PointImage | SlideFields, PointImage]


class Fields(NamedTuple):
    """A batch of B fields.

    image   uint8 (B, 3, H, W), in the colours that the network learns from; `plain` the same in its own colours, for
            the teacher, with 0 rows where there is none.
    mask    int8 (B, H, W) and region int8 (B, H, W) as in PointImage.
    points  float32 (T, 2), px of the field, label int64 (T,), of all fields; count int64 (B,) how many each has.
    """

    image: Tensor
    plain: Tensor
    mask: Tensor
    region: Tensor
    points: Tensor
    label: Tensor
    count: Tensor


def load_point_sets(paths: Sequence[Path], recipe: PointsRecipe) -> list[PointSet]:
    """Read and resample the data sets; raises UsageError for data that do not fit or if nothing is left to train.

    A patient that validates in one set trains in none.
    """

    @cache
    def around() -> dict[Path, Surroundings]:
        return {image: wide for path in paths for image, wide in surroundings(path).items()}

    def prepared(sample: AnySample, config: DatasetConfig) -> PointImage | SlideFields:
        if not isinstance(sample, SlideSample):
            return prepare(sample, config, recipe, around())
        names = recipe.model.classes, config.classes
        return slide_fields(sample, recipe.mpp, recipe.field_px, recipe.labels, *names, config.val, outlined=False)

    def validating(sample: AnySample, config: DatasetConfig) -> Iterator[PointImage]:
        item = prepared(sample, config)
        if isinstance(item, PointImage):
            yield item
        else:
            for box in item.squares(VAL_FIELD_PX, recipe.val_fields, recipe.seed):
                image = point_image(item, item.window(box), recipe)
                yield typed_only(image, recipe) if item.typed else image

    return read_sets(paths, recipe.datasets, prepared, validating, recipe.fold, recipe.labels)


def point_image(item: SlideFields, window: Window, recipe: PointsRecipe) -> PointImage:
    """Return a window of a slide as an image; all its nuclei are known."""
    height, width = shape = window.image.shape[:2]
    mask = point_mask(window.xy, shape, recipe.mask_radius_um / recipe.mpp)
    return PointImage(
        item.name, item.dataset, window.image, (0, 0, width, height), mask, np.full(shape, SUPERVISED, np.int8),
        window.xy, window.label, False, item.plane.mpp,
    )  # fmt: skip


def typed_only(item: PointImage, recipe: PointsRecipe) -> PointImage:
    """Return a part of a slide of typed nuclei as it scores types: about those of no class it is not annotated."""
    typed = item.label != UNKNOWN
    around = point_mask(item.xy[~typed], item.mask.shape, RADIUS_UM / recipe.mpp) == 1
    region = np.where(around, IGNORED, item.region).astype(np.int8)
    return replace(item, region=region, xy=item.xy[typed], label=item.label[typed], typed=bool(typed.any()))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """An image that holds an annotated one: its file, and where the annotated one's corner lies in it, px."""

    path: Path
    x: int
    y: int


def surroundings(path: Path) -> dict[Path, Surroundings]:
    """Return the wider image of each annotated one that has any: columns `field`, `field_x`, `field_y` of the manifest.

    The wider image has the annotated one's pixel size. Raises UsageError for a place that is no number.
    """
    found: dict[Path, Surroundings] = {}
    if not (path / MANIFEST).is_file():
        return found
    with (path / MANIFEST).open(newline="", encoding="utf-8-sig") as file:
        for line, row in enumerate(csv.DictReader(file, restval=""), 2):
            if row.get("field"):
                try:
                    at = int(row.get("field_x", "")), int(row.get("field_y", ""))
                except ValueError:
                    raise UsageError(f"{path / MANIFEST} line {line}: field needs whole field_x and field_y") from None
                found[path / row["file"]] = Surroundings(path / row["field"], *at)
    return found


def prepare(
    sample: Sample, config: DatasetConfig, recipe: PointsRecipe, around: Mapping[Path, Surroundings]
) -> PointImage:
    """Load one sample and resample it to the recipe's pixel size; raises UsageError if its pixel size is not known."""
    image = sample.load_image()
    labels = _mask_of(sample)
    mpp = pixel_size(sample, config, labels)
    scale = mpp / recipe.mpp
    shape = resample_image(image, scale).shape[:2]
    xy, label = _nuclei(sample, labels, recipe.model.classes, config.classes)
    if labels is None:
        radius = recipe.mask_radius_um / recipe.mpp
        mask, region = point_mask(xy * scale, shape, radius), np.full(shape, SUPERVISED, np.int8)
    else:
        labels = resample_labels(labels, shape)
        mask = np.sign(labels).astype(np.int8)
        region = np.where(labels < 0, IGNORED, SUPERVISED).astype(np.int8)
    place = around.get(sample.image_path)
    wide, (x, y) = _widen(image, place, scale)
    height, width = shape
    rest = wide.shape[0] - height - y, wide.shape[1] - width - x
    if min(x, y, *rest) < 0:
        raise UsageError(f"{sample.image_path}: does not lie inside its field {place.path if place else ''}")
    edges = (y, rest[0]), (x, rest[1])
    return PointImage(
        name=sample.stem,
        dataset=sample.dataset,
        image=wide,
        window=(x, y, x + width, y + height),
        mask=np.pad(mask, edges, constant_values=-1),
        region=np.pad(region, edges, constant_values=UNLABELLED),
        xy=xy * scale + (x, y),
        label=label,
        typed=sample.points_path is not None and bool((label != UNKNOWN).all()),
        mpp=mpp,
    )


def _mask_of(sample: Sample) -> Int32 | None:
    if sample.mask_path is None:
        return None
    mask = sample.load_mask()
    return np.where(mask == IGNORE_LABEL, -1, mask).astype(np.int32)


def _nuclei(
    sample: Sample, labels: Int32 | None, classes: Sequence[str], renamed: Mapping[str, str]
) -> tuple[Float64, Int64]:
    """Return places and classes: the points where the sample has any, else its outlines' centroids without class."""
    if sample.points_path is None:
        if labels is None:
            raise UsageError(f"{sample.image_path}: the data set has neither points nor a mask for this image")
        _, xy = centroids(np.maximum(labels, 0))
        return xy, np.full(len(xy), UNKNOWN, np.int64)
    points = sample.load_points()
    names = [renamed.get(name, name) for name in points.class_name]
    return points.xy, np.array([classes.index(n) if n in classes else UNKNOWN for n in names], np.int64)


def _widen(image: UInt8, place: Surroundings | None, scale: float) -> tuple[UInt8, tuple[int, int]]:
    """Return an image at the recipe's pixel size with what surrounds it, and where its corner is in that, px."""
    if place is None:
        return resample_image(image, scale), (0, 0)
    bgr = cv2.imread(str(place.path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise UsageError(f"{place.path}: cannot be read as an image")
    return resample_image(np.asarray(bgr[..., ::-1], np.uint8), scale), (round(place.x * scale), round(place.y * scale))


def point_mask(xy: Float64, shape: tuple[int, ...], radius_px: float) -> Int8:
    """Return int8 `shape`: 1 within `radius_px` of a point, 0 beyond twice that of all, -1 between."""
    seeds = np.ones(shape[:2], np.uint8)
    at = np.floor(xy).astype(int)
    at = at[((at >= 0) & (at < (shape[1], shape[0]))).all(1)]
    seeds[at[:, 1], at[:, 0]] = 0
    # The transform of an image without any zero is not defined.
    distance = cv2.distanceTransform(seeds, cv2.DIST_L2, 5) if len(at) else np.full(shape[:2], np.inf, np.float32)
    return np.select([distance <= radius_px, distance > 2 * radius_px], [1, 0], -1).astype(np.int8)


class FieldDataset(Dataset[Fields]):
    """Fields by draw number: number d is drawn with the generator of (seed, d) from a set by weight and an image in it.

    `plain` asks for the fields in their own colours too.
    """

    def __init__(self, sets: Sequence[PointSet], recipe: PointsRecipe) -> None:
        self.images = Draws((s.weight, s.train) for s in sets if s.trains)
        self.recipe = recipe
        self.plain = recipe.consistency.weight > 0

    def __getitem__(self, draw: int) -> Fields:
        """Return draw `draw` as a batch of one."""
        rng = np.random.default_rng([self.recipe.seed, draw])
        item, size = self.images.draw(rng), self.recipe.field_px
        if isinstance(item, SlideFields):
            centre = item.draw_centre(rng, size, self.recipe.balance)
            window, matrix = item.under(crop_matrix(rng, self.recipe.augment, centre, size), size)
            item = point_image(item, window, self.recipe)
        else:
            matrix = crop_matrix(rng, self.recipe.augment, draw_centre(rng, item, self.recipe), size)
        return cut_field(rng, item, matrix, self.recipe, self.plain)


def draw_centre(rng: np.random.Generator, item: PointImage, recipe: PointsRecipe) -> Float64:
    """Return the centre of a field, px of the image: where it and the annotated window overlap as far as they can.

    So a larger field holds the window at any place, and a smaller one lies in it, often near a nucleus.
    """
    half = recipe.field_px / 2
    corner, end = np.array(item.window[:2], np.float64), np.array(item.window[2:], np.float64)
    bounds = np.sort(np.stack([corner + half, end - half]), axis=0)
    wanted = rng.uniform(*bounds)
    if len(item.xy) and rng.random() < recipe.centred and (end - corner > recipe.field_px).all():
        wanted = item.xy[_draw_nucleus(rng, item, recipe.balance)] + rng.uniform(-half / 2, half / 2, 2)
    return np.clip(wanted, *bounds)


def _draw_nucleus(rng: np.random.Generator, item: PointImage, balance: float) -> int:
    if rng.random() < balance:
        wanted = rng.choice(np.unique(item.label))
        return int(rng.choice(np.flatnonzero(item.label == wanted)))
    return int(rng.integers(len(item.xy)))


def cut_field(rng: np.random.Generator, item: PointImage, matrix: Float64, recipe: PointsRecipe, plain: bool) -> Fields:
    """Return the field that an affine map (2, 3) from its pixels to the image's cuts out, as a batch of one."""
    size, how = recipe.field_px, cv2.WARP_INVERSE_MAP
    image = cv2.warpAffine(
        item.image, matrix, (size, size), flags=how | cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    # Shifted by one, so that what lies outside, 0, comes out as mask -1, and then as region UNLABELLED.
    known = np.stack([item.mask + 1, item.region], axis=-1).astype(np.int16)
    mask, region = np.moveaxis(cv2.warpAffine(known, matrix, (size, size), flags=how | cv2.INTER_NEAREST), -1, 0)
    xy, shown = _to_field(item.xy, matrix, size)
    return Fields(
        _tensor(recolor(rng, recipe.augment, image)),
        _tensor(image) if plain else torch.empty((0, 3, size, size), dtype=torch.uint8),
        torch.from_numpy((mask - 1).astype(np.int8))[None],
        torch.from_numpy(region.astype(np.int8))[None],
        torch.from_numpy(xy[shown].astype(np.float32)),
        torch.from_numpy(item.label[shown]),
        torch.tensor([int(shown.sum())]),
    )


def _to_field(xy: Float64, matrix: Float64, size: int) -> tuple[Float64, Bool]:
    # The matrix speaks of pixel centres, which lie half a pixel beyond our corner.
    there = (xy - 0.5 - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T + 0.5
    return there, ((there >= 0) & (there < size)).all(1)


def _tensor(image: UInt8) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]


def join(batch: Sequence[Fields]) -> Fields:
    """Join batches into one."""
    return Fields(*(torch.cat(parts) for parts in zip(*batch, strict=True)))


def loaders(run: Run, model: Any) -> tuple[DataLoader[Fields], DataLoader[PointImage]]:
    """Return the loaders of training batches and of the whole images that validate; see `draw_loader`."""
    return draw_loader(FieldDataset(run.sets, run.recipe), run, join), whole_loader(run.sets)


def point_set_card(images: PointSet, recipe: PointsRecipe) -> dict[str, Any]:
    """Return the card's entry of a data set, its nuclei counted by class."""

    def count(items: Sequence[PointImage | SlideFields]) -> dict[str, Any]:
        found = (item.label[item.own] if isinstance(item, SlideFields) else item.label for item in items)
        labels = np.concatenate([np.empty(0, np.int64), *found])
        nuclei = {name: int((labels == k).sum()) for k, name in enumerate(recipe.model.classes)}
        return {"images": len(items), "nuclei": nuclei | {"of unknown class": int((labels == UNKNOWN).sum())}}

    return card_of(images, count)
