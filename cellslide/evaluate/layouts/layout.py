"""What a distributed data set is to us, and what its readers share."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Sample, Source, open_image
from cellslide.geometry.outlines import rasterise
from cellslide.store.foreign_files import read_text
from cellslide.types import Int32, UInt8

DEPTH = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """One distributed data set: files that tell it by their names (globs), its reader, and its licence where known.

    read  folder -> samples, in a fixed order; raises UsageError that names a file which is missing or damaged.
    """

    name: str
    signs: tuple[str, ...]
    read: Callable[[Path], Iterable[Sample]]
    licence: str = ""

    def fits(self, root: Path) -> bool:
        """Whether one of its files lies in a folder."""
        return any(True for sign in self.signs for _ in files(root, sign))


def files(root: Path, pattern: str) -> Iterator[Path]:
    """Yield the files of a folder, some levels deep, that a glob names, in a fixed order."""
    for depth in range(DEPTH):
        yield from sorted(path for path in root.glob("*/" * depth + pattern) if path.is_file())


def require_file(path: Path, what: str) -> Path:
    """Return a path; raises UsageError, with what it would have held, where no file is there."""
    if not path.is_file():
        raise UsageError(f"{path}: {what} is missing")
    return path


def load_array(path: Path, ndim: int, channels: int | None = None) -> NDArray[Any]:
    """Open an .npy file where it lies; raises UsageError if it is no array (..., channels) of `ndim` dimensions."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as an array ({error})") from error
    if array.ndim != ndim or (channels is not None and array.shape[-1] != channels):
        raise UsageError(f"{path}: has shape {array.shape}, expected {ndim} dimensions, the last of {channels}")
    return np.asanyarray(array)


def read_csv(path: Path) -> list[list[str]]:
    """Return the rows of a CSV; raises UsageError where it cannot be read."""
    try:
        return [row for row in csv.reader(io.StringIO(read_text(path, UsageError))) if row]
    except csv.Error as error:
        raise UsageError(f"{path}: cannot be read as CSV ({error})") from error


def array_image(path: Path, row: int) -> UInt8:
    """Return image `row` of an array (N, H, W, 3) of values up to 255, whole or not."""
    return np.asarray(load_array(path, 4, 3)[row]).astype(np.uint8)


def file_image(path: Path) -> UInt8:
    """Return an image file as uint8 (H, W, 3) RGB."""
    with open_image(path) as image:
        return np.asarray(image.convert("RGB"), np.uint8)


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of an image file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise UsageError(f"{path}: cannot be read as an image ({error})") from error


def fill(rings: Sequence[NDArray[Any]], size: tuple[int, int]) -> Int32:
    """Fill outlines, (n, 2) each in pixels, into a label map of `size` (width, height): ring k is label k + 1."""
    start = np.cumsum([0, *(len(ring) for ring in rings)]).astype(np.int64)
    xy = np.concatenate(rings) if rings else np.zeros((0, 2))
    return rasterise(np.asarray(xy, np.float32), start, (size[1], size[0]))


def typed_labels(instance: Int32, kind: Int32, names: Sequence[str], where: Path) -> tuple[Int32, list[str]]:
    """Return a label map (H, W) with labels from 1 without gaps, and the name of each, of which `kind` has the number.

    Raises UsageError for a number without a name; 0 is a nucleus of no class.
    """
    ids, first, rank = np.unique(instance, return_index=True, return_inverse=True)
    kinds = kind.ravel()[first[ids > 0]]
    if len(kinds) and not 0 <= kinds.min() <= kinds.max() <= len(names):
        raise UsageError(f"{where}: has class {kinds.max()}, but there are {len(names)}")
    labels = rank.reshape(instance.shape) + (0 if ids[0] == 0 else 1)
    return labels.astype(np.int32), [("", *names)[k] for k in kinds.tolist()]


def sample(
    root: Path, image: Path, size: tuple[int, int], source: Source, truth: Path, mpp: float | None, **said: str
) -> Sample:
    """Return a sample: `truth` is the file of its nuclei or points, `said` its split, patient, organ and cohort.

    image  its file, or a name below the folder where it has none.
    """
    texts = {"split": "", "patient": "", "organ": "", **said}
    return Sample(
        image_path=image,
        mask_path=None if source.nuclei is None else truth,
        points_path=truth if source.classes or source.nuclei is None else None,
        mpp=mpp,
        width=size[0],
        height=size[1],
        note="",
        dataset=root.resolve().name,
        source=source,
        **texts,
    )
