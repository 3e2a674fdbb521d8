"""Data sets on disk: a folder with `manifest.csv`, images, instance masks and points, read as typed records.

Pixels follow the package's rule: pixel i covers [i, i + 1); points are (x, y) in pixels of their image.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cellslide.errors import UsageError
from cellslide.evaluate.detection import centroids
from cellslide.types import Float64, Int32, UInt8

MANIFEST = "manifest.csv"
REQUIRED_COLUMNS = ("file",)
COLUMNS = (
    "file", "mask", "points", "split", "patient", "organ", "cohort", "mpp", "width", "height", "n_nuclei", "licence",
    "note",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Points:
    """Points of one image: xy float64 (N, 2) in pixels; class_name has N names, "" where a point has none.

    score is float64 (N,), the confidence of a prediction, or None.
    """

    xy: Float64
    class_name: tuple[str, ...]
    score: Float64 | None = None

    def __post_init__(self) -> None:
        if self.xy.shape != (len(self.class_name), 2):
            raise ValueError(f"points have shape {self.xy.shape}, expected ({len(self.class_name)}, 2)")

    def __len__(self) -> int:
        return len(self.class_name)

    @property
    def typed(self) -> bool:
        """Whether every point has a class, and there is at least one."""
        return len(self.class_name) > 0 and all(self.class_name)


@dataclass(frozen=True, slots=True)
class Source:
    """What gives the pixels and nuclei of a sample that has no files of its own, such as a row of an array.

    image    gives uint8 (H, W, 3) RGB.
    nuclei   gives a label map int32 (H, W), 0 = background, and the class of the labels 1..n, or None.
    points   gives points where no nuclei are drawn, or None.
    classes  every class that there may be.
    """

    image: Callable[[], UInt8]
    nuclei: Callable[[], tuple[Int32, Sequence[str]]] | None = None
    points: Callable[[], Points] | None = None
    classes: tuple[str, ...] = ()

    def load_points(self) -> Points:
        """Return the points, for drawn nuclei one in each: its centroid, or its own pixel nearest to it."""
        if self.nuclei is None:
            assert self.points is not None
            return self.points()
        labels, names = self.nuclei()
        ids, xy = centroids(labels)
        for place, k in zip(xy, ids.tolist(), strict=True):
            if labels[int(place[1]), int(place[0])] != k:
                own = np.argwhere(labels == k)[:, ::-1] + 0.5
                place[:] = own[np.abs(own - place).sum(axis=1).argmin()]
        return Points(xy, tuple(names[k - 1] for k in ids.tolist()))


@dataclass(frozen=True, slots=True)
class Sample:
    """One annotated image: where its files are and what the manifest says of it; `mpp` None means not known.

    With a `source` the paths only name things: `image_path` has the stem that predictions are looked up by, the others
    the file that holds masks or points, None where there are none.
    """

    image_path: Path
    mask_path: Path | None
    points_path: Path | None
    split: str
    patient: str
    organ: str
    mpp: float | None
    width: int
    height: int
    note: str
    dataset: str
    cohort: str = ""
    source: Source | None = None

    @property
    def stem(self) -> str:
        """Name of the image without its suffix, which predictions are looked up by."""
        return self.image_path.stem

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class that there may be, where that is known without its points."""
        return () if self.source is None else self.source.classes

    @property
    def derived_instances(self) -> bool:
        """Whether only the foreground was drawn by hand and the instance numbers were computed from it."""
        note = self.note.casefold()
        return "foreground is manual" in note or "instances derived" in note

    def load_image(self) -> UInt8:
        """Return the image as uint8 (H, W, 3) RGB; raises UsageError if it cannot be read or has another size."""
        if self.source is not None:
            return self.source.image()
        with open_image(self.image_path) as image:
            pixels = np.asarray(image.convert("RGB"), np.uint8)
        self._check_shape(pixels.shape[:2], self.image_path)
        return pixels

    def load_mask(self) -> Int32:
        """Return the instance mask as int32 (H, W), 0 = background; raises UsageError if there is none."""
        if self.mask_path is None:
            raise UsageError(f"{self.image_path}: the data set has no mask for this image")
        if self.source is not None and self.source.nuclei is not None:
            return self.source.nuclei()[0]
        mask = read_labels(self.mask_path)
        self._check_shape(mask.shape, self.mask_path)
        return mask

    def load_points(self) -> Points:
        """Return the points; raises UsageError if there are none or the file is damaged."""
        if self.points_path is None:
            raise UsageError(f"{self.image_path}: the data set has no points for this image")
        return read_points(self.points_path) if self.source is None else self.source.load_points()

    def _check_shape(self, shape: tuple[int, ...], path: Path) -> None:
        if tuple(shape) != (self.height, self.width):
            raise UsageError(f"{path}: {shape[1]} x {shape[0]} px, but {MANIFEST} says {self.width} x {self.height}")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set: its name (that of its folder), folder and samples in the order of the manifest."""

    name: str
    root: Path
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)


def read_dataset(path: Path, split: str | None = None) -> Dataset:
    """Read `path/manifest.csv`; `split` keeps the rows of one split.

    Raises UsageError if the manifest is missing or damaged, if a path in it leaves the folder or names no file, or if
    no row is left.
    """
    root = Path(path)
    manifest = root / MANIFEST
    if not manifest.is_file():
        raise UsageError(f"{root}: not a data set, {MANIFEST} is missing")
    rows = read_rows(manifest)
    chosen = [line for line, row in enumerate(rows, 2) if split is None or row.get("split", "") == split]
    require_split(manifest, split, {row.get("split", "") for row in rows}, bool(chosen))
    name = root.resolve().name
    return Dataset(name, root, tuple(_sample(root, name, rows[n - 2], f"{manifest} line {n}") for n in chosen))


def require_split(place: Path, split: str | None, known: Iterable[str], found: bool) -> None:
    """Raise UsageError where a data set has nothing, or nothing of this split."""
    if not found:
        names = ", ".join(sorted(known))
        detail = f"no image has --split {split}; its splits are: {names}" if split else "it lists no image"
        raise UsageError(f"{place}: {detail}")


def read_labels(path: Path) -> Int32:
    """Read a label image (PNG, TIFF, or .npy; 8, 16 or 32 bit) as int32 (H, W); raises UsageError on anything else."""
    if path.suffix.lower() == ".npy":
        try:
            labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read as an array ({error})") from error
    elif path.suffix.lower() in (".tif", ".tiff"):
        labels = _read_tiff(path)
    else:
        with open_image(path) as image:
            labels = np.asarray(image)
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and bool(np.all(labels == np.floor(labels))))
    if labels.ndim != 2 or not whole:
        raise UsageError(f"{path}: {labels.dtype} {labels.shape} is not a label image (one channel of whole numbers)")
    if labels.size and (labels.min() < 0 or labels.max() > np.iinfo(np.int32).max):
        raise UsageError(f"{path}: labels must lie between 0 and {np.iinfo(np.int32).max}")
    return np.asarray(labels, np.int32)


def read_points(path: Path) -> Points:
    """Read a CSV with the header `x,y` and optionally `class`, `score`; raises UsageError on a value that is no number.

    Scores are read where every row has one.
    """
    rows = read_rows(path, ("x", "y"))
    scored = bool(rows) and all(row.get("score") for row in rows)
    columns = ("x", "y", "score") if scored else ("x", "y")
    try:
        values = np.array([[float(row[name]) for name in columns] for row in rows], np.float64)
    except ValueError as error:
        raise UsageError(f"{path}: {', '.join(columns)} must be numbers ({error})") from error
    values = values.reshape(-1, len(columns))
    if not np.isfinite(values).all():
        raise UsageError(f"{path}: {', '.join(columns)} must be finite")
    return Points(values[:, :2], tuple(row.get("class", "") for row in rows), values[:, 2] if scored else None)


def _read_tiff(path: Path) -> NDArray[Any]:
    # Pillow cannot hold 32-bit unsigned TIFF; imported here because it is the rare case.
    import tifffile

    try:
        return np.asarray(tifffile.imread(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as TIFF ({error})") from error


def write_manifest(root: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write the manifest of a data set, a row an image, its keys from `COLUMNS`; returns the folder."""
    with (root / MANIFEST).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return root


def read_rows(path: Path, required: tuple[str, ...] = REQUIRED_COLUMNS) -> list[dict[str, str]]:
    """Return the rows of a CSV by its header; raises UsageError where it cannot be read or lacks a column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows = [{key: value.strip() for key, value in row.items() if key is not None} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as CSV ({error})") from error
    missing = [name for name in required if name not in header]
    if missing:
        raise UsageError(f"{path}: the header lacks {', '.join(missing)}")
    return rows


def _sample(root: Path, dataset: str, row: Mapping[str, str], where: str) -> Sample:
    image = _inside(root, row["file"], where)
    if image is None:
        raise UsageError(f"{where}: the column file is empty")
    width, height = _size(row, image, where)
    return Sample(
        image_path=image,
        mask_path=_inside(root, row.get("mask", ""), where),
        points_path=_inside(root, row.get("points", ""), where),
        split=row.get("split", ""),
        patient=row.get("patient", ""),
        organ=row.get("organ", ""),
        mpp=_mpp(row.get("mpp", ""), where),
        width=width,
        height=height,
        note=row.get("note", ""),
        dataset=dataset,
        cohort=row.get("cohort", ""),
    )


def _inside(root: Path, name: str, where: str) -> Path | None:
    """Return the file `name` of the data set, None if empty; links are followed before the check."""
    if not name:
        return None
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"{where}: {name} lies outside the data set folder")
    if not path.is_file():
        raise UsageError(f"{where}: {name} does not exist")
    return path


def _mpp(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        mpp = float(text)
    except ValueError:
        mpp = math.nan
    if not 0 < mpp < math.inf:
        raise UsageError(f"{where}: mpp {text} is not a pixel size in µm")
    return mpp


def _size(row: Mapping[str, str], image: Path, where: str) -> tuple[int, int]:
    width, height = row.get("width", ""), row.get("height", "")
    if not width or not height:
        with open_image(image) as opened:
            return opened.size
    try:
        return int(width), int(height)
    except ValueError as error:
        raise UsageError(f"{where}: width and height must be whole numbers") from error


def open_image(path: Path) -> Image.Image:
    """Open and decode an image; raises UsageError where that cannot be."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: cannot be read as an image ({error})") from error
    return image
