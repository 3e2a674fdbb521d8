"""Labelled samples, resampled to one pixel size and kept in memory, and the crops that are drawn from them.

Every crop is a function of (seed, draw number) alone, so neither workers nor resuming change what is seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import cv2
import numpy as np
import torch
from skimage.measure import label as connected_labels
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import MANIFEST, Sample, read_rows
from cellslide.evaluate.layouts.registry import layout_of
from cellslide.store.recovery import tables_below
from cellslide.train.artefacts import add_artefact
from cellslide.train.augment import crop_matrix, pale_nuclei, recolor, warp
from cellslide.train.hover.recipe import HoverRecipe
from cellslide.train.loaders import Draws, draw_loader, whole_loader
from cellslide.train.recipe import DatasetConfig, Fold, LabelConfig, Recipe, Supervision, ValConfig
from cellslide.train.slide_fields import SlideFields, Window
from cellslide.train.slide_sets import AnySample, SlideSample, check_labels, read_samples, set_name
from cellslide.train.targets import IGNORE, hover_map, point_labels, single_nuclei
from cellslide.train.task import Run
from cellslide.types import Bool, Float64, Int32, UInt8

PAD_PX = 96
IGNORE_LABEL = 65535


@dataclass(frozen=True, slots=True)
class TrainImage:
    """One image at the recipe's pixel size with what is known of it.

    labels       int32 (H, W): 0 background, k nucleus, IGNORE not known.
    label_class  int32 (n + 1,): class of label k (1..K), 0 for background, IGNORE where not known.
    label_hover  bool (n + 1,): whether the HoVer branch may learn from label k.
    points_xy    float64 (N, 2) in pixels of `image`, or None.
    mpp          pixel size of the source file, as given or estimated.
    """

    name: str
    dataset: str
    image: UInt8
    labels: Int32
    label_class: Int32
    label_hover: Bool
    points_xy: Float64 | None
    mpp: float

    @property
    def n_nuclei(self) -> int:
        """Nuclei with a label."""
        return len(np.unique(self.labels[self.labels > 0]))


TrainT = TypeVar("TrainT")
ValT = TypeVar("ValT")


@dataclass(frozen=True, slots=True)
class ImageSet(Generic[TrainT, ValT]):
    """The images of one data set that train, those that validate, and how often it is drawn."""

    name: str
    path: Path
    weight: float
    train: tuple[TrainT, ...]
    val: tuple[ValT, ...]

    @property
    def trains(self) -> bool:
        """Whether crops are drawn from it."""
        return bool(self.train) and self.weight > 0


TrainSet = ImageSet[TrainImage, TrainImage]


def set_card(images: ImageSet[Any, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the card's entry of a data set whose images count their nuclei."""

    def count(items: Sequence[Any]) -> dict[str, int]:
        return {"images": len(items), "nuclei": sum(item.n_nuclei for item in items)}

    return card_of(images, count)


def card_of(images: ImageSet[Any, Any], count: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    """Return the card's entry of a data set; `count` gives that of the images that train, or validate."""
    return {
        "name": images.name,
        "weight": images.weight,
        "licences": licences(images.path),
        "train": count(images.train),
        "val": count(images.val),
        "val_images": [image.name for image in images.val],
    }


def licences(path: Path) -> list[str]:
    """Return the licences that the manifest of a data set, a list of slides or its layout names, sorted."""
    # A folder of tables has no layout, and many files that one would look through.
    layout = layout_of(path) if path.is_dir() and not tables_below(path) else None
    if layout is not None:
        return [layout.licence] if layout.licence else []
    listed = path if path.suffix == ".csv" else path / MANIFEST
    rows = read_rows(listed, ()) if listed.is_file() else []
    return sorted({row["licence"] for row in rows if row.get("licence")})


class Crops(NamedTuple):
    """A batch: image uint8 (B, 3, H, W); foreground and types int64 (B, H, W) with -1 = ignored; hover float32
    (B, 2, H, W); hover_valid bool (B, H, W)."""

    image: Tensor
    foreground: Tensor
    hover: Tensor
    hover_valid: Tensor
    types: Tensor


def load_sets(paths: Sequence[Path], recipe: HoverRecipe) -> list[TrainSet]:
    """Read and resample the data sets; raises UsageError on an unknown patient or if nothing is left to train.

    A patient that validates in one set trains in none.
    """

    def prepared(sample: AnySample, config: DatasetConfig) -> TrainImage:
        if isinstance(sample, SlideSample):
            raise UsageError(f"{sample.table}: outlines are learned from data sets of masks, not from slides")
        return prepare(sample, config, recipe)

    return read_sets(paths, recipe.datasets, prepared, lambda sample, config: [prepared(sample, config)], recipe.fold)


def read_sets(
    paths: Sequence[Path],
    configs: Mapping[str, DatasetConfig],
    train: Callable[[AnySample, DatasetConfig], TrainT],
    val: Callable[[AnySample, DatasetConfig], Iterable[ValT]],
    fold: str | None = None,
    labels: LabelConfig | None = None,
) -> list[ImageSet[TrainT, ValT]]:
    """Return the data sets, `configs` by their names, as `train` and `val` make an image, or several, of a sample.

    Raises UsageError as `choose_samples` does, and if nothing is left to train.
    """
    sets, parts = [], choose_samples(paths, configs, DatasetConfig(), fold)
    check_labels([s for chosen in parts for s in (*chosen.train, *chosen.val)], labels or LabelConfig())
    for path, chosen in zip(paths, parts, strict=True):
        name = set_name(path)
        config = configs.get(name, DatasetConfig())
        # A set that is never drawn is there to validate.
        drawn = chosen.train if config.weight > 0 else []
        shown = tuple(item for s in chosen.val for item in val(s, config))
        sets.append(ImageSet(name, path, config.weight, tuple(train(s, config) for s in drawn), shown))
    if not any(s.trains for s in sets):
        raise UsageError("DATASET: no image is left to train on")
    return sets


class SetConfig(Protocol):
    """What tells which samples of a data set are used."""

    @property
    def split(self) -> str | tuple[str, ...] | None: ...
    @property
    def val(self) -> ValConfig: ...
    @property
    def exclude_patients(self) -> tuple[str, ...]: ...
    @property
    def folds(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Chosen:
    """The samples of one data set that train, and those that validate."""

    train: list[AnySample]
    val: list[AnySample]


def choose_samples(
    paths: Sequence[Path], configs: Mapping[str, SetConfig], default: SetConfig, fold: str | None = None
) -> list[Chosen]:
    """Return which samples of each data set train and validate, `configs` by the names of folders and lists.

    `fold` "K/N" takes the place of what the sets say of validation. A patient that validates in one set trains in none.
    Raises UsageError for a name, a patient, an organ or an image that is not there.
    """
    names = [set_name(path) for path in paths]
    unused = sorted(set(configs) - set(names))
    if unused:
        raise UsageError(f"recipe datasets: no DATASET is named {', '.join(unused)}")
    part = Fold.of(fold)
    found = [_choose(path, configs.get(name, default), part) for path, name in zip(paths, names, strict=True)]
    held_out = {s.patient for chosen in found for s in chosen.val if s.patient}
    return [Chosen([s for s in chosen.train if s.patient not in held_out], chosen.val) for chosen in found]


def _choose(path: Path, config: SetConfig, fold: Fold | None) -> Chosen:
    samples = [s for s in read_samples(path) if s.patient not in config.exclude_patients and s.split != "test"]
    if fold is not None:
        return _choose_fold(samples, config, fold)
    val = [s for s in samples if _validates(s, config.val)]
    for name in ("patients", "organs", "images"):
        missing = sorted(set(getattr(config.val, name)) - {_val_key(s, name) for s in val})
        if missing:
            where = f"{path}: recipe datasets.{set_name(path)}.val.{name}"
            raise UsageError(f"{where}: no such {name.removesuffix('s')} {', '.join(missing)}")
    held = {id(s) for s in val}
    train = [s for s in samples if id(s) not in held and _trains(s, config.split)]
    if config.val.share > 0:
        drawn = {id(s) for s in train if zlib.crc32((s.patient or s.stem).encode()) / 2**32 < config.val.share}
        val, train = val + [s for s in train if id(s) in drawn], [s for s in train if id(s) not in drawn]
    if config.val.area == 0:
        return Chosen(train, val)
    slides = [s for s in train if isinstance(s, SlideSample)]
    if len(slides) < len(train):
        raise UsageError(f"recipe datasets.{set_name(path)}.val.area: is for slides, not for images")
    # A patient that is on both sides is not held out.
    return Chosen(
        [replace(s, part="outside") for s in slides], val + [replace(s, part="inside", patient="") for s in slides]
    )


def _trains(sample: AnySample, split: str | tuple[str, ...] | None) -> bool:
    return split is None or sample.split == split or (not isinstance(split, str) and sample.split in split)


def _choose_fold(samples: list[AnySample], config: SetConfig, fold: Fold) -> Chosen:
    if not config.folds:
        # What is no truth teaches without the patients of the fold, wherever their truth is.
        return Chosen([s for s in samples if not s.patient or _part_of(s.patient, fold) != fold.index - 1], [])
    parts = _parts(samples, fold)
    pairs = list(zip(samples, parts, strict=True))
    train, val = ([s for s, part in pairs if (part == fold.index - 1) is held] for held in (False, True))
    return Chosen(train, val)


def _parts(samples: Sequence[AnySample], fold: Fold) -> list[int]:
    """Return the part of each sample: that of its patient, or of its organ, or its place in the order of the images."""
    organs = {s.organ for s in samples}
    return [
        _part_of(s.patient, fold) if s.patient
        else _part_of(s.organ, fold) if len(organs) > 1
        else i * fold.count // len(samples)
        for i, s in enumerate(samples)
    ]  # fmt: skip


def _part_of(group: str, fold: Fold) -> int:
    return zlib.crc32(group.encode()) % fold.count


_VAL_KEYS: Mapping[str, Callable[[AnySample], str]] = {
    "patients": lambda s: s.patient, "organs": lambda s: s.organ, "images": lambda s: s.stem
}  # fmt: skip


def _val_key(sample: AnySample, name: str) -> str:
    return _VAL_KEYS[name](sample)


def _validates(sample: AnySample, val: ValConfig) -> bool:
    """Whether a sample validates under a data set's settings."""
    named = any(_val_key(sample, name) in getattr(val, name) for name in _VAL_KEYS)
    return named or (val.split is not None and sample.split == val.split)


def prepare(sample: Sample, config: DatasetConfig, recipe: HoverRecipe) -> TrainImage:
    """Load one sample and resample it to the recipe's pixel size; raises UsageError if its pixel size is not known."""
    image, kind = sample.load_image(), supervision_of(sample, config)
    mask = None if kind == "points" else _with_ignore(sample.load_mask())
    mpp = pixel_size(sample, config, mask)
    scale = mpp / recipe.mpp
    image = resample_image(image, scale)
    points = sample.load_points() if sample.points_path is not None else None
    points_xy = None if points is None else points.xy * scale
    if mask is None:
        assert points_xy is not None
        radius, far = config.point_radius_um / recipe.mpp, config.background_um / recipe.mpp
        labels = point_labels(image, points_xy, radius, far)
        hover = np.zeros(len(points_xy) + 1, np.bool_)
    else:
        labels = resample_labels(mask, image.shape[:2])
        hover = _trusted(mask, kind, config)
    classes = np.full(len(hover), IGNORE, np.int32)
    if points is not None:
        named = [config.classes.get(name, name) for name in points.class_name]
        _type_labels(classes, labels, points_xy, named, recipe.model.classes)
    # Background is known only to be no nucleus: without any class it says nothing about types.
    classes[0] = 0 if (classes > 0).any() else IGNORE
    return TrainImage(sample.stem, sample.dataset, image, labels, classes, hover, points_xy, mpp)


def supervision_of(sample: Sample, config: DatasetConfig) -> Supervision:
    """Return what a sample may teach; "auto" is resolved by the files and the note of its row."""
    if config.supervision != "auto":
        return config.supervision
    if sample.mask_path is None:
        return "points"
    return "foreground" if sample.derived_instances else "instances"


def _with_ignore(mask: Int32) -> Int32:
    return np.where(mask == IGNORE_LABEL, IGNORE, mask).astype(np.int32)


def _trusted(mask: Int32, kind: Supervision, config: DatasetConfig) -> Bool:
    n = int(mask.max(initial=0))
    if kind == "instances":
        return np.ones(n + 1, np.bool_)
    return single_nuclei(mask) if config.trust_single else np.zeros(n + 1, np.bool_)


def _type_labels(classes: Int32, labels: Int32, xy: Float64, names: Sequence[str], known: Sequence[str]) -> None:
    height, width = labels.shape
    for (x, y), name in zip(xy, names, strict=True):
        if name in known and 0 <= x < width and 0 <= y < height and (k := labels[int(y), int(x)]) > 0:
            classes[k] = known.index(name) + 1


def pixel_size(sample: Sample, config: DatasetConfig, mask: Int32 | None) -> float:
    """Return the µm per pixel of a sample as its settings say; raises UsageError if nothing knows it."""
    if not isinstance(config.mpp, str):
        return config.mpp
    if config.mpp == "manifest":
        if sample.mpp is None:
            mend = f"set datasets.{sample.dataset}.mpp in --recipe"
            raise UsageError(f"{sample.image_path}: mpp is empty in the manifest; {mend}")
        return sample.mpp
    areas = np.bincount(mask[mask > 0]) if mask is not None else np.zeros(0)
    areas = areas[areas > 0]
    if not len(areas):
        raise UsageError(f"{sample.image_path}: mpp from-nuclei needs a mask with nuclei")
    return float(np.clip(config.nucleus_um / np.median(2 * np.sqrt(areas / np.pi)), 0.05, 2.0))


def resample_image(image: UInt8, scale: float) -> UInt8:
    """Resize by `scale`, averaging areas when shrinking and bicubic when enlarging."""
    if abs(scale - 1) < 0.01:
        return image
    height, width = (max(round(n * scale), 1) for n in image.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)


def resample_labels(labels: Int32, shape: tuple[int, int]) -> Int32:
    """Resize labels (h, w) to `shape`: each pixel takes the label that is most frequent at 4 x 4 places inside it."""
    if labels.shape == tuple(shape):
        return labels
    places = [
        np.minimum(((np.arange(n * 4) + 0.5) * (old / (n * 4))).astype(int), old - 1)
        for n, old in zip(shape, labels.shape, strict=True)
    ]
    samples = labels[np.ix_(*places)].reshape(shape[0], 4, shape[1], 4).transpose(1, 3, 0, 2).reshape(16, *shape)
    best, best_votes = samples[0].copy(), np.zeros(shape, np.int32)
    for candidate in samples:
        votes = (samples == candidate).sum(0)
        better = votes > best_votes
        best[better], best_votes[better] = candidate[better], votes[better]
    return best.astype(np.int32)


def mirror_pad(item: TrainImage, pad_px: int = PAD_PX) -> TrainImage:
    """Mirror an image and its labels outwards, each connected piece becoming a nucleus of its own.

    Without new numbers a nucleus and its mirror image would share one centre of mass.
    """
    pad = min(pad_px, *(n - 1 for n in item.image.shape[:2]))
    image = cv2.copyMakeBorder(item.image, pad, pad, pad, pad, cv2.BORDER_REFLECT_101)
    old = np.pad(item.labels, pad, mode="reflect")
    new = np.asarray(connected_labels(old, background=0, connectivity=1), np.int32)
    first = np.unique(new.ravel(), return_index=True)
    origin = np.zeros(int(new.max(initial=0)) + 1, np.int64)
    origin[first[0]] = old.ravel()[first[1]]
    origin[0] = 0
    unknown = origin == IGNORE
    label_class, label_hover = item.label_class[origin], item.label_hover[origin]
    new[unknown[new]] = IGNORE
    xy = None if item.points_xy is None else item.points_xy + pad
    return TrainImage(item.name, item.dataset, image, new, label_class, label_hover, xy, item.mpp)


def image_of(item: SlideFields, window: Window) -> TrainImage:
    """Return a window of a slide as an image; its nuclei must have outlines."""
    assert window.labels is not None
    known = np.where(window.label < 0, IGNORE, window.label + 1)
    label_class = np.concatenate([[0 if (window.label >= 0).any() else IGNORE], known]).astype(np.int32)
    hover = np.ones(len(label_class), np.bool_)
    return TrainImage(item.name, item.dataset, window.image, window.labels, label_class, hover, None, item.plane.mpp)


class CropDataset(Dataset[Crops]):
    """Crops by draw number: item d is drawn with the generator of (seed, d) from a set by weight and an image in it."""

    def __init__(self, sets: Sequence[ImageSet[TrainImage | SlideFields, Any]], recipe: HoverRecipe) -> None:
        self.images = Draws((s.weight, [_padded(item) for item in s.train]) for s in sets if s.trains)
        self.recipe = recipe

    def __getitem__(self, draw: int) -> Crops:
        """Return draw `draw`, unbatched: image uint8 (3, H, W) and its targets."""
        image, labels, item = self.draw(draw)
        return targets_of(image, labels, item.label_class, item.label_hover)

    def draw(self, draw: int) -> tuple[UInt8, Int32, TrainImage]:
        """Return draw `draw` as image (H, W, 3) and labels (H, W), augmented, and the image it was cut from."""
        rng = np.random.default_rng([self.recipe.seed, draw])
        drawn, crop = self.images.draw(rng), self.recipe.crop_px
        if isinstance(drawn, SlideFields):
            matrix = crop_matrix(rng, self.recipe.augment, drawn.draw_centre(rng, crop), crop)
            window, matrix = drawn.under(matrix, crop)
            item = image_of(drawn, window)
        else:
            item, centres = drawn
            matrix = crop_matrix(rng, self.recipe.augment, _draw_centre(rng, item, centres, self.recipe), crop)
        image, labels = warp(item.image, item.labels, matrix, crop)
        image = pale_nuclei(rng, self.recipe.augment, image, labels)
        image, labels = add_artefact(rng, self.recipe.augment, image, labels)
        return recolor(rng, self.recipe.augment, image), labels, item


def _padded(item: TrainImage | SlideFields) -> tuple[TrainImage, Float64] | SlideFields:
    """Return an image with its mirrored border, and the centres of its nuclei (N, 2) in it; a slide as it is."""
    if isinstance(item, SlideFields):
        return item
    padded = mirror_pad(item)
    return padded, _centres(padded)


def _centres(item: TrainImage) -> Float64:
    rows, cols = np.nonzero(item.labels > 0)
    ids = item.labels[rows, cols]
    count = np.bincount(ids)
    centres = np.stack([np.bincount(ids, index + 0.5) for index in (cols, rows)], axis=1)
    kept = count > 0
    return np.asarray(centres[kept] / count[kept, None], np.float64)


def _draw_centre(rng: np.random.Generator, item: TrainImage, centres: Float64, recipe: HoverRecipe) -> Float64:
    """Return the crop's centre in padded pixels, mostly near a nucleus, with little of the mirrored border inside."""
    half, slack = recipe.crop_px / 2, recipe.crop_px / 8
    size = np.array(item.image.shape[1::-1], np.float64)
    low, high = half + PAD_PX - slack, size - half - PAD_PX + slack
    low, high = np.where(low > high, size / 2, low), np.where(low > high, size / 2, high)
    wanted = rng.uniform(low, high)
    if len(centres) and rng.random() < recipe.nuclei_share:
        wanted = centres[rng.integers(len(centres))] + rng.uniform(-half / 2, half / 2, 2)
    return np.clip(wanted, low, high)


def targets_of(image: UInt8, labels: Int32, label_class: Int32, label_hover: Bool) -> Crops:
    """Turn labels (H, W) into tensors; HoVer maps are computed here, after the geometric augmentation."""
    known = labels >= 0
    index = np.where(known, labels, 0)
    types = np.where(known, label_class[index], IGNORE)
    return Crops(
        torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        torch.from_numpy(np.sign(labels).astype(np.int64)),
        torch.from_numpy(hover_map(labels)),
        torch.from_numpy(known & label_hover[index]),
        torch.from_numpy(types.astype(np.int64)),
    )


def loaders(run: Run, model: Any) -> tuple[DataLoader[Crops], DataLoader[TrainImage]]:
    """Return the loaders of training batches and of the whole images that validate; see `draw_loader`."""
    return draw_loader(CropDataset(run.sets, run.recipe), run), whole_loader(run.sets)
