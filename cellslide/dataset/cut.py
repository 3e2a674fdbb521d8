"""Checked regions cut into the images of a data set: pixels, outlines as label images, and typed points.

Rectangles are parted evenly; other regions give the squares that lie in them, large ones first.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from cellslide.dataset.corrections import Checked, Nucleus
from cellslide.errors import UsageError
from cellslide.geometry.outlines import rasterise
from cellslide.slides.slide import Slide
from cellslide.types import Plane

Box = tuple[int, int, int, int]
LEAST_PX = 64
# A region whose corners are off by less than this share of its box is a rectangle drawn by hand.
SQUARE_SHARE = 0.995


@dataclass(frozen=True, slots=True)
class Cut:
    """What one slide gave: rows of the manifest, nuclei, those without an outline, and what was left out.

    left_out_share  share of the regions' area that is in no image.
    beside          changes that lie in no region.
    """

    rows: tuple[dict[str, object], ...]
    nuclei: int
    without_outline: int
    left_out_share: float
    beside: int


def cut_slide(out: Path, slide: Slide, checked: Checked, mpp: float, tile_px: int, about: dict[str, object]) -> Cut:
    """Write the images of one slide at `mpp` below `out`; `about` is what the manifest says of all of them.

    An image has a mask where all its nuclei have outlines. Raises UsageError where no region is large enough.
    """
    plane, stem = Plane.of(slide.info, mpp), str(about["patient"])
    region = shapely.transform(checked.region, plane.from_level0)
    boxes = [box for part in shapely.get_parts(region) for box in tiles_in(part, tile_px)]
    if not boxes:
        raise UsageError(
            f"{slide.info.path}: no checked region holds a square of {LEAST_PX} px at {mpp:g} µm/px; draw larger ones"
        )
    places = plane.from_level0(np.array([n.xy for n in checked.nuclei], np.float64).reshape(-1, 2))
    rows, nuclei, bare = [], 0, 0
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        inside = np.flatnonzero(((places >= (x0, y0)) & (places < (x1, y1))).all(axis=1))
        here = [checked.nuclei[k] for k in inside]
        outlined = all(n.outline is not None for n in here)
        name = f"{stem}-{number:04d}"
        image = slide.read_plane(plane, (x0, y0, x1, y1))
        cv2.imwrite(str(out / "images" / f"{name}.png"), image[..., ::-1])
        if outlined:
            crossing = _crossing(checked.nuclei, plane, (x0, y0, x1, y1))
            cv2.imwrite(str(out / "masks" / f"{name}.png"), crossing)
        _write_points(out / "points" / f"{name}.csv", here, places[inside] - (x0, y0))
        nuclei, bare = nuclei + len(here), bare + sum(n.outline is None for n in here)
        rows.append({
            **about, "file": f"images/{name}.png", "mask": f"masks/{name}.png" if outlined else "",
            "points": f"points/{name}.csv", "mpp": round(mpp, 6), "width": x1 - x0, "height": y1 - y0,
            "n_nuclei": len(here),
        })  # fmt: skip
    used = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
    return Cut(tuple(rows), nuclei, bare, max(0.0, 1 - used / region.area), checked.beside)


def tiles_in(region: BaseGeometry, tile_px: int) -> Iterator[Box]:
    """Yield boxes in plane pixels that lie in a region and do not overlap, at most `tile_px` wide."""
    x0, y0 = (int(np.ceil(v - 1e-6)) for v in region.bounds[:2])
    x1, y1 = (int(np.floor(v + 1e-6)) for v in region.bounds[2:])
    if min(x1 - x0, y1 - y0) < LEAST_PX:
        return
    if region.area >= SQUARE_SHARE * shapely.box(*region.bounds).area:
        xs, ys = (np.linspace(a, b, -(-(b - a) // tile_px) + 1).astype(int) for a, b in ((x0, x1), (y0, y1)))
        yield from (
            (int(a), int(c), int(b), int(d))
            for c, d in zip(ys, ys[1:], strict=False)
            for a, b in zip(xs, xs[1:], strict=False)
        )
        return
    shapely.prepare(region)
    for y in range(y0, y1, tile_px):
        for x in range(x0, x1, tile_px):
            yield from _quarters(region, x, y, tile_px)


def _quarters(region: BaseGeometry, x: int, y: int, edge: int) -> Iterator[Box]:
    box = shapely.box(x, y, x + edge, y + edge)
    if region.covers(box):
        yield x, y, x + edge, y + edge
    elif edge // 2 >= LEAST_PX and region.intersects(box):
        half = edge // 2
        for dy in (0, half):
            for dx in (0, half):
                yield from _quarters(region, x + dx, y + dy, half)


def _crossing(nuclei: Sequence[Nucleus], plane: Plane, box: Box) -> np.ndarray:
    """Return the label image (H, W) of all nuclei that reach into a box, also from beside it."""
    x0, y0, x1, y1 = box
    rings = []
    for nucleus in nuclei:
        if nucleus.outline is not None:
            ring = plane.from_level0(np.asarray(nucleus.outline.exterior.coords[:-1], np.float64)) - (x0, y0)
            if (ring.max(axis=0) > 0).all() and (ring.min(axis=0) < (x1 - x0, y1 - y0)).all():
                rings.append(ring)
    start = np.cumsum([0, *(len(r) for r in rings)]).astype(np.int64)
    shape = (y1 - y0, x1 - x0)
    if not rings:
        return np.zeros(shape, np.uint16)
    return rasterise(np.concatenate(rings), start, shape).astype(np.uint16)


def _write_points(path: Path, nuclei: Sequence[Nucleus], xy: np.ndarray) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "class"])
        writer.writerows([f"{x:.2f}", f"{y:.2f}", n.name] for n, (x, y) in zip(nuclei, xy, strict=True))
