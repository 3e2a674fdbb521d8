"""What readers of nuclei hand on: blocks as they stand in a file, and all nuclei of a slide with the report on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cellslide.store.anndata_columns import Categorical
from cellslide.types import Cells, Float32, Float64, Int64, SlideInfo

Unit = Literal["px", "um"]
Origin = Literal["bounds", "level0"]
Direction = Literal["slide-to-cells", "cells-to-slide"]

# What an object of a file is; where nuclei and others stand together, the largest number that occurs is the nuclei.
REGION, MARK, TILE, NUCLEUS = 0, 1, 2, 3
XENIUM_MPP = 0.2125


@dataclass(frozen=True, slots=True)
class Source:
    """How the numbers of a file are to be taken.

    unit       of coordinates that do not say theirs; px are level-0 pixels.
    origin     zero point of files for QuPath: the slide's bounds, or the level-0 plane.
    mpp        µm per pixel of the file's coordinates, where they are not level-0 pixels (None).
    alignment  3x3, affine, as Xenium Explorer exports it: from the slide's pixels to those of the assay's image, in
               which the cells are ("slide-to-cells"); or the other way, from the file's own numbers to the slide's
               pixels ("cells-to-slide").
    """

    unit: Unit = "px"
    origin: Origin = "bounds"
    mpp: float | None = None
    alignment: Float64 | None = None
    direction: Direction = "slide-to-cells"

    def to_level0(self, info: SlideInfo, unit: Unit, scale: float = 1.0, qupath: bool = False) -> Float64:
        """Return the 3x3 matrix from the file's coordinates to level-0 pixels.

        `scale` is level-0 pixels per pixel of a file that tells; `qupath`: its zero point may be that of the bounds.
        """
        if self.alignment is not None:
            return self._aligned(unit)
        size = np.array([info.mpp_x, info.mpp_y])
        factor = 1 / size if unit == "um" else np.full(2, scale) if self.mpp is None else self.mpp / size
        shift = info.bounds[:2] if qupath and self.origin == "bounds" and info.bounds else (0, 0)
        return np.array([[factor[0], 0, shift[0]], [0, factor[1], shift[1]], [0, 0, 1]], np.float64)

    def _aligned(self, unit: Unit) -> Float64:
        matrix = np.asarray(self.alignment, np.float64)
        if self.direction == "cells-to-slide":
            return matrix
        pixel_um = (self.mpp or XENIUM_MPP) if unit == "um" else 1.0
        return np.asarray(np.linalg.inv(matrix) @ np.diag([1 / pixel_um, 1 / pixel_um, 1]), np.float64)


@dataclass(frozen=True, slots=True)
class Block:
    """Some nuclei as a file has them; N rows.

    source_id   object (N,), text.
    to_level0   3x3, from the file's coordinates to level-0 pixels.
    centroid    float64 (N, 2) in the file's coordinates, NaN where the outline decides.
    contour_xy, contour_start
                float64 (P, 2) and int64 (N + 1,): outer rings, closed or open; a point has none.
    kind        int8 (N,), REGION to NUCLEUS.
    class_code  int16 (N,) into the reader's `names`, -1 is none.
    score       float32 (N,), NaN where unknown.
    area_um2    float32 (N,) for points whose file tells, else NaN.
    uuid        object (N,), "" where the source has none.
    """

    source_id: NDArray[Any]
    to_level0: Float64
    centroid: Float64
    contour_xy: Float64
    contour_start: Int64
    kind: NDArray[np.int8]
    class_code: NDArray[np.int16]
    score: Float32
    area_um2: Float32
    uuid: NDArray[Any]

    def __post_init__(self) -> None:
        n = len(self.source_id)
        for spec in fields(self)[2:]:
            expected = n + 1 if spec.name == "contour_start" else None if spec.name == "contour_xy" else n
            if expected is not None and len(getattr(self, spec.name)) != expected:
                raise ValueError(f"Block.{spec.name} has {len(getattr(self, spec.name))} rows, expected {expected}")


class Reader(Protocol):
    """Reads one file; `names` grow while blocks come, `labels` maps what a file calls its classes to their names."""

    names: dict[str, int]

    def blocks(self) -> Iterator[Block]:
        """Yield the nuclei in the order of the file."""

    @property
    def labels(self) -> Mapping[str, str]:
        """Classes by the names that the file gives them."""

    @property
    def ordered(self) -> bool:
        """Whether the order of the file is to stay: it is a table of ours."""


@dataclass(slots=True)
class NucleiReport:
    """What became of the objects of a file: `read` = `kept` + all of `outside` to `other`, and `other_image`.

    outside        centroid not on the slide.
    not_finite     no coordinates, or such that are no numbers.
    duplicates     at the place, to 0.01 px, of an earlier one.
    invalid        an outline without area, or a row of a CSV with more or fewer cells than its header.
    other          regions, tiles and marks beside nuclei.
    repaired       kept, with an outline that crossed itself and was mended.
    multipart      kept as the largest of several parts.
    other_image    rows of a table that are of another image.
    repeated_ids   kept, with an id that an earlier one has; the first keeps it as its UUID.
    """

    read: int = 0
    kept: int = 0
    outside: int = 0
    not_finite: int = 0
    duplicates: int = 0
    invalid: int = 0
    other: int = 0
    repaired: int = 0
    multipart: int = 0
    other_image: int = 0
    repeated_ids: int = 0

    def in_words(self) -> str:
        """Return one line: what was kept and what else was met."""
        words = (
            (self.outside, "outside the slide"),
            (self.not_finite, "without finite coordinates"),
            (self.duplicates, "at the place of another"),
            (self.invalid, "with no usable shape"),
            (self.other, "regions or other objects"),
            (self.other_image, "of other images"),
            (self.repaired, "outlines mended"),
            (self.multipart, "of several parts"),
            (self.repeated_ids, "with an id given twice"),
        )
        met = "; ".join(f"{n:,} {word}" for n, word in words if n)
        return f"{self.kept:,} of {self.read:,} nuclei taken" + (f" ({met})" if met else "")


@dataclass(frozen=True, slots=True)
class ForeignNuclei:
    """Nuclei that another tool found, in level-0 pixels and in the order of the table to be.

    source_id   object (N,), the id of the file as text; its place in the file where it has none.
    uuid        object (N,), the source's UUID in canonical form, "" where it has none.
    class_name  what the source calls them, or None where it does not type.
    """

    cells: Cells
    source_id: NDArray[Any]
    uuid: NDArray[Any]
    class_name: Categorical | None
    report: NucleiReport = field(default_factory=NucleiReport)

    def __len__(self) -> int:
        return len(self.cells)
