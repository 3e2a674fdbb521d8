"""Measure crops from shared regions against one read per crop: CPU time and bytes read per cell, same pixels.

    python benchmarks/crops.py --cells 2000 --slide SLIDE.svs

Without a slide one is painted: a tiled JPEG pyramid of 0.25 µm/px at the density of dense tissue (4,000 nuclei per
mm2). The plain way reads each crop by itself, in random order ("random") or sorted by place ("sorted"), with the
reader's own cache as it is; it is timed on a part of the cells. "MB read" are the pixels handed out, "MB of tiles" the
file's tiles of 256 px that they lie in, which is what is decoded where nothing is cached.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellslide.crops import CropCutter, crop_corners, cut_naive, plan_regions, read_region
from cellslide.demo import MPP, paint, write_pyramid
from cellslide.slide import Slide, open_slide
from cellslide.types import CropSpec, Float64, Plane

DENSITY_PER_MM2 = 4000
LOCAL, CONTEXT = CropSpec(224, 224), CropSpec(1024, 1024)
TILE_PX = 256
CPU = torch.device("cpu")
Use = Callable[[torch.Tensor], None]


@dataclass(slots=True)
class Counted:
    """A slide whose reader counts the pixels that it hands out, and those of the file's tiles that they lie in."""

    slide: Slide
    pixels: int = 0
    in_tiles: int = 0

    def __post_init__(self) -> None:
        read = self.slide.reader.read_level

        def counting(level: int, x: int, y: int, width: int, height: int) -> Any:
            self.pixels += width * height
            spans = ((x, width), (y, height))
            counts = [-(-(first + size) // TILE_PX) - first // TILE_PX for first, size in spans]
            self.in_tiles += counts[0] * counts[1] * TILE_PX**2
            return read(level, x, y, width, height)

        self.slide.reader.read_level = counting  # type: ignore[method-assign]


def painted_slide(path: Path, tiles: int) -> None:
    """Write the demonstration slide `tiles` by `tiles` times as one pyramid."""
    write_pyramid(path, np.tile(paint().image, (tiles, tiles, 1)), MPP)


def places(slide: Slide, n: int) -> tuple[Plane, Float64]:
    """Return `n` centres at the density of tissue, in the plane at 0.25 µm/px, in random order."""
    plane = Plane.of(slide.info, 0.25)
    edge = int(np.sqrt(n / DENSITY_PER_MM2) * 1000 / plane.mpp)
    width, height = min(edge, plane.width_px), min(edge, plane.height_px)
    return plane, np.random.default_rng(0).uniform(0, (width, height), (n, 2))


def by_region(slide: Slide, plane: Plane, xy: Float64, spec: CropSpec, use: Use) -> None:
    """Cut all crops from shared regions, as `classify` does on a CPU, 8 at a time."""
    corners = crop_corners(xy, spec.field_px)
    for region in plan_regions(xy, [(corners, spec.field_px)]):
        cutter = CropCutter(read_region(slide, plane, region.box, (spec.border,)), plane, CPU)
        for first in range(0, len(region.rows), 8):
            use(cutter.cut_field(corners[region.rows[first : first + 8]], spec))


def by_cell(slide: Slide, plane: Plane, xy: Float64, spec: CropSpec, use: Use) -> None:
    """Read each crop by itself."""
    for centre in xy:
        use(cut_naive(slide, plane, centre[None], spec))


def measure(path: Path, spec: CropSpec, n: int, part: int) -> list[tuple[str, float, float, float]]:
    """Return for each way its name, CPU ms, MB read and MB of tiles a cell."""
    rows = []
    for name, run, count in (("random", by_cell, part), ("sorted", by_cell, part), ("regions", by_region, n)):
        with open_slide(path) as slide:
            plane, xy = places(slide, n)
            xy = xy[np.lexsort((xy[:, 0], xy[:, 1] // 256))] if name == "sorted" else xy
            counted = Counted(slide)
            begin = time.process_time()
            run(slide, plane, xy[:count], spec, lambda crops: None)
            ms, mb = (time.process_time() - begin) / count * 1e3, 3 / count / 1e6
            rows.append((name, ms, counted.pixels * mb, counted.in_tiles * mb))
    return rows


def check(path: Path, spec: CropSpec, n: int) -> None:
    """Stop unless both ways give the same pixels for some of the cells."""
    with open_slide(path) as slide:
        plane, xy = places(slide, n)
        xy = xy[:32]
        corners = crop_corners(xy, spec.field_px)
        for region in plan_regions(xy, [(corners, spec.field_px)]):
            cutter = CropCutter(read_region(slide, plane, region.box, (spec.border,)), plane, CPU)
            if not torch.equal(cutter.cut(corners[region.rows], spec), cut_naive(slide, plane, xy[region.rows], spec)):
                raise SystemExit(f"crops of {spec.field_px} px differ")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--part", type=int, default=100, help="cells that are read one by one")
    parser.add_argument("--slide", type=Path, help="a slide; one is painted if not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        path = args.slide or Path(scratch) / "painted.tif"
        if args.slide is None:
            painted_slide(path, 3)
        print(
            f"{args.cells:,} cells\n| field px | way | CPU ms a cell | MB read a cell | times |\n|---|---|---|---|---|"
        )
        for spec in (LOCAL, CONTEXT):
            check(path, spec, args.cells)
            rows = measure(path, spec, args.cells, min(args.part, args.cells))
            for name, ms, mb, tiles in rows:
                times = rows[0][1] / ms
                print(f"| {spec.field_px} | {name} | {ms:.2f} | {mb:.3f} | {tiles:.3f} | {times:.1f} |", flush=True)


if __name__ == "__main__":
    main()
