"""Merge: what overlapping tiles report to one list of nuclei, outlines carried along."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cellslide.bench.fake import FakeDetector, detect_cells, square_slide
from cellslide.bench.rows import BenchOptions, Form, Row, Target, cpu_rows
from cellslide.nuclei.merge import merge_stream
from cellslide.slides.tiles import TileGrid, tile_grid
from cellslide.types import Cells, Plane

STAGE = "merge"
UNIT = "CPU s per million"
PER_MM2, MPP = 5000, 0.25
MILLION = 1_000_000
PLAIN_NUCLEI = 5_000


def reports(n: int, tile_px: int = 1024, overlap_px: int = 128) -> tuple[TileGrid, list[Cells]]:
    """Return a grid and what its tiles report of about `n` nuclei at 5,000 per mm2, outlines of 24 vertices.

    Each tile shakes positions by 0.6 px (sd) and misses 0.5 % of the nuclei.
    """
    size_px = int(np.sqrt(n / PER_MM2) * 1000 / MPP)
    info = square_slide(size_px, MPP)
    grid = tile_grid(Plane.of(info, MPP), tile_px, overlap_px)
    return grid, list(detect_cells(FakeDetector.over(size_px, n, jitter_px=0.6, miss=0.005), grid, info))


def plain_merge(parts: list[Cells]) -> int:
    """Go through all outlines of a slide, largest first, and drop whichever overlaps a kept one by more than 1 % of
    either, a polygon at a time, as is usual; returns how many stay (the baseline)."""
    import shapely

    rings = [
        part.contour_xy[a:b]
        for part in parts
        if part.contour_xy is not None and part.contour_start is not None
        for a, b in zip(part.contour_start[:-1], part.contour_start[1:], strict=True)
    ]
    polygons = [polygon if polygon.is_valid else polygon.buffer(0) for polygon in map(shapely.Polygon, rings)]
    tree, dropped = shapely.STRtree(polygons), np.zeros(len(polygons), np.bool_)
    for i in np.argsort([-polygon.area for polygon in polygons], kind="stable").tolist():
        if dropped[i]:
            continue
        for j in tree.query(polygons[i]).tolist():
            if j != i and not dropped[j]:
                shared = polygons[i].intersection(polygons[j]).area
                dropped[j] = shared > 0.01 * min(polygons[i].area, polygons[j].area)
    return int((~dropped).sum())


def rows(options: BenchOptions) -> Iterator[Row]:
    """Time the plain form on a few of `nuclei` (1,000,000) nuclei, then the merge of all."""
    n = options.nuclei or MILLION
    _, few = reports(min(n, PLAIN_NUCLEI))
    grid, parts = reports(n)

    def merge() -> int:
        return sum(len(block) for block in merge_stream(parts, grid))

    forms = [Form("polygon by polygon", lambda: plain_merge(few)), Form("cellslide", merge, Target(0.5))]
    yield from cpu_rows(STAGE, forms, options.rounds, MILLION, UNIT)
