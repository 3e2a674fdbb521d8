"""Where is measured: the whole search, its pieces, annotations, squares of a grid, bands along the tumour's border."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from scipy import ndimage
from shapely.geometry.base import BaseGeometry

from cellslide.errors import UsageError
from cellslide.measure.nuclei import Nuclei
from cellslide.types import Bool, Float64

Kind = Literal["slide", "piece", "annotation", "grid", "band"]
MOST_REGIONS = 20_000
# The border of the tumour is found on squares of this edge, from the share of tumour nuclei around.
SQUARE_UM, SMOOTH_UM = 20.0, 60.0
TUMOUR_SHARE, LEAST_NUCLEI_PER_MM2, LEAST_TUMOUR_MM2 = 0.5, 500.0, 0.02


@dataclass(frozen=True, slots=True)
class Region:
    """One place: `shape` in µm from the corner of level 0, and its area without what was not searched."""

    name: str
    kind: Kind
    shape: BaseGeometry

    @property
    def mm2(self) -> float:
        """Area in mm²."""
        return float(self.shape.area) / 1e6

    def contains(self, um: Float64) -> Bool:
        """Return bool (N,): which of the places (N, 2) lie in it."""
        shapely.prepare(self.shape)
        return np.asarray(shapely.intersects_xy(self.shape, um[:, 0], um[:, 1]), np.bool_)


def pieces(tissue: BaseGeometry) -> Iterator[Region]:
    """Yield the pieces of what was searched, the largest first."""
    parts = sorted(shapely.get_parts(tissue), key=lambda part: (-part.area, part.bounds))
    for number, part in enumerate(parts, start=1):
        yield Region(f"piece {number}", "piece", part)


def annotated(named: list[tuple[str, BaseGeometry]], tissue: BaseGeometry) -> Iterator[Region]:
    """Yield annotated regions, each less what was not searched; one name may stand for several."""
    seen: dict[str, int] = {}
    for name, shape in named:
        seen[name] = seen.get(name, 0) + 1
        number = f" {seen[name]}" if seen[name] > 1 else ""
        yield Region(f"{name}{number}", "annotation", shapely.intersection(shape, tissue))


def grid(tissue: BaseGeometry, edge_um: float) -> Iterator[Region]:
    """Yield squares of `edge_um` that meet what was searched, named by column and row.

    Raises UsageError where there were more than a table is for.
    """
    if tissue.is_empty:
        return
    x0, y0, x1, y1 = tissue.bounds
    cols, rows = range(int(x0 // edge_um), int(x1 // edge_um) + 1), range(int(y0 // edge_um), int(y1 // edge_um) + 1)
    if len(cols) * len(rows) > MOST_REGIONS:
        raise UsageError(f"--grid {edge_um:g}: {len(cols) * len(rows):,} squares; at most {MOST_REGIONS:,}")
    shapely.prepare(tissue)
    for row in rows:
        for col in cols:
            square = shapely.box(col * edge_um, row * edge_um, (col + 1) * edge_um, (row + 1) * edge_um)
            # What only touches the tissue holds none of it.
            if shapely.intersects(tissue, square) and (part := shapely.intersection(tissue, square)).area > 0:
                yield Region(f"{col},{row}", "grid", part)


def bands(nuclei: Nuclei, tissue: BaseGeometry, width_um: float) -> Iterator[Region]:
    """Yield four bands along the border of the tumour: core, inside and outside the border by `width_um`, and beyond.

    Raises UsageError where no class is the tumour's.
    """
    tumour = nuclei.kind("tumour")
    if tumour is None:
        raise UsageError(f"--border: none of {', '.join(nuclei.classes) or 'no classes'} is a class of the tumour")
    if tissue.is_empty or not len(nuclei):
        return
    x0, y0, x1, y1 = tissue.bounds
    cols, rows = int((x1 - x0) // SQUARE_UM) + 1, int((y1 - y0) // SQUARE_UM) + 1
    inside = _tumour(nuclei, tumour, (x0, y0), (rows, cols))
    if not inside.any():
        return
    depth = np.where(inside, ndimage.distance_transform_edt(inside), -ndimage.distance_transform_edt(~inside))
    depth = depth * SQUARE_UM
    names = ("tumour core", "inside the border", "outside the border", "beyond")
    limits = (np.inf, width_um, 0.0, -width_um, -np.inf)
    for name, high, low in zip(names, limits[:-1], limits[1:], strict=True):
        shape = shapely.intersection(_squares((depth <= high) & (depth > low), (x0, y0)), tissue)
        if not shape.is_empty:
            yield Region(name, "band", shape)


def _tumour(nuclei: Nuclei, tumour: int, corner: tuple[float, float], shape: tuple[int, int]) -> Bool:
    """Return bool (rows, cols): squares where most typed nuclei around are the tumour's, in patches large enough."""
    at = ((nuclei.um - corner) / SQUARE_UM).astype(np.int64)
    known = (nuclei.code >= 0) & (nuclei.code < len(nuclei.classes))
    known &= ((at >= 0) & (at < (shape[1], shape[0]))).all(axis=1)
    flat = at[:, 1] * shape[1] + at[:, 0]
    sigma = SMOOTH_UM / SQUARE_UM
    both = [
        ndimage.gaussian_filter(
            np.bincount(flat[rows], minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64), sigma
        )
        for rows in (known, known & (nuclei.code == tumour))
    ]
    dense = both[0] * 1e6 / SQUARE_UM**2 >= LEAST_NUCLEI_PER_MM2
    mask = dense & (both[1] >= TUMOUR_SHARE * both[0])
    mask = ndimage.binary_fill_holes(mask)
    labels, n = ndimage.label(mask)
    large = np.bincount(labels.ravel(), minlength=n + 1) * SQUARE_UM**2 / 1e6 >= LEAST_TUMOUR_MM2
    large[0] = False
    return np.asarray(large[labels], np.bool_)


def _squares(mask: Bool, corner: tuple[float, float]) -> BaseGeometry:
    """Return the squares of a mask as one shape: runs of a row as one box each."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (row, first), (_, last) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    x, y = corner
    boxes = shapely.box(x + first * SQUARE_UM, y + row * SQUARE_UM, x + last * SQUARE_UM, y + (row + 1) * SQUARE_UM)
    return shapely.union_all(boxes)
