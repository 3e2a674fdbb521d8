"""Crops around nuclei: cut from shared regions, beside one read a crop, and how often each tile of the slide is
decoded for it.

Nuclei lie at the density of dense tissue, in random order. Both ways give the same pixels, which is checked first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from cellslide.bench.read import tissue
from cellslide.bench.rows import BenchOptions, Form, Row, Target, cpu_rows, row
from cellslide.inference.crops import CropCutter, crop_corners, cut_naive, plan_regions, read_region
from cellslide.slides.painted import write_pyramid
from cellslide.slides.readers import OpenSlideReader, TiledReader
from cellslide.slides.slide import Slide, open_slide
from cellslide.types import CropSpec, Float64, Plane, UInt8

STAGE = "crops"
UNIT, PER = "CPU s per 100,000", 100_000
NUCLEI = 20_000
# One read a crop is so slow that it is timed on few of them.
ALONE = {224: 400, 1024: 60}
DENSITY_PER_MM2, MPP = 4000, 0.25
TARGETS = {224: Target(6), 1024: Target(35)}
DECODED = Target(1.5)
CPU = torch.device("cpu")


def rows(options: BenchOptions) -> Iterator[Row]:
    """Time crops of 224 and 1024 px around `nuclei` (20,000) places of a slide given, or of a painted one."""
    n, threads = options.nuclei or NUCLEI, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            file = options.slide or Path(scratch) / "painted.tif"
            if options.slide is None:
                write_pyramid(file, tissue(edge_px(n) + 256), MPP)
            for field_px in TARGETS:
                yield from field_rows(file, CropSpec(field_px, field_px), n, options.rounds)
    finally:
        torch.set_num_threads(threads)


def edge_px(n: int) -> int:
    """Return the edge of a square of tissue that holds `n` nuclei."""
    return int(np.sqrt(n / DENSITY_PER_MM2) * 1000 / MPP)


def field_rows(file: Path, spec: CropSpec, n: int, rounds: int) -> Iterator[Row]:
    """Time crops of one size: each read by itself through OpenSlide and through our reader, then from regions."""
    check(file, spec, n)
    alone = min(ALONE[spec.field_px], n)
    forms = [
        Form(f"{spec.field_px} px: one read a crop, OpenSlide", lambda: one_by_one(file, spec, n, alone, plain=True)),
        Form(f"{spec.field_px} px: one read a crop", lambda: one_by_one(file, spec, n, alone)),
        Form(f"{spec.field_px} px: shared regions", lambda: by_region(file, spec, n), TARGETS[spec.field_px]),
    ]
    yield from cpu_rows(STAGE, forms, rounds, PER, UNIT)
    counts: list[tuple[int, int, int]] = []
    by_region(file, spec, n, counts)
    times = [len(counts) / len(set(counts))] if counts else []
    note = "times that a tile of the slide is decoded" if times else ""
    yield row(STAGE, f"{spec.field_px} px: shared regions", times, "×", len(set(counts)), None, DECODED, note)


def places(slide: Slide, n: int) -> tuple[Plane, Float64]:
    """Return `n` centres at the density of tissue, in the plane at 0.25 µm/px, in random order."""
    plane = Plane.of(slide.info, MPP)
    width, height = min(edge_px(n), plane.width_px), min(edge_px(n), plane.height_px)
    return plane, np.random.default_rng(0).uniform(0, (width, height), (n, 2))


def opened(file: Path, plain: bool = False) -> Slide:
    """Open a slide, of unknown pixel size too; `plain` through OpenSlide where it is ours that reads the tiles."""
    with closing(open_slide(file, MPP)) as slide:
        info, reader = slide.info, slide.reader
        beside = reader.beside if isinstance(reader, TiledReader) else None
    if plain and isinstance(beside, OpenSlideReader):
        return Slide(OpenSlideReader(file, beside.file), info)
    return open_slide(file, MPP)


def one_by_one(file: Path, spec: CropSpec, n: int, alone: int, plain: bool = False) -> int:
    """Read the first crops each by itself; the reader keeps what it likes."""
    with opened(file, plain) as slide:
        plane, xy = places(slide, n)
        for centre in xy[:alone]:
            cut_naive(slide, plane, centre[None], spec)
    return alone


def by_region(file: Path, spec: CropSpec, n: int, decoded: list[tuple[int, int, int]] | None = None) -> int:
    """Cut all crops from shared regions in passes as on a CPU: 8 small ones, large ones one by one.

    decoded  gains level, row and column of each tile that is decoded.
    """
    step = 8 if spec.field_px <= 256 else 1
    with opened(file) as slide:
        if decoded is not None and isinstance(slide.reader, TiledReader):
            count_decoded(slide.reader, decoded)
        plane, xy = places(slide, n)
        corners = crop_corners(xy, spec.field_px)
        for region in plan_regions(xy, [(corners, spec.field_px)]):
            cutter = CropCutter(read_region(slide, plane, region.box, (spec.border,)), plane, CPU)
            for first in range(0, len(region.rows), step):
                cutter.cut_field(corners[region.rows[first : first + step]], spec)
    return n


def count_decoded(reader: TiledReader, decoded: list[tuple[int, int, int]]) -> None:
    """Note each tile that the reader decodes from now on."""
    decode = reader.decode

    def counting(level: int, row: int, col: int) -> UInt8:
        decoded.append((level, row, col))
        return decode(level, row, col)

    reader.decode = counting  # type: ignore[method-assign]


def check(file: Path, spec: CropSpec, n: int) -> None:
    """Raise AssertionError unless both ways give the same pixels for some of the places."""
    with opened(file) as slide:
        plane, xy = places(slide, n)
        xy = xy[:16]
        corners = crop_corners(xy, spec.field_px)
        for region in plan_regions(xy, [(corners, spec.field_px)]):
            cutter = CropCutter(read_region(slide, plane, region.box, (spec.border,)), plane, CPU)
            same = torch.equal(cutter.cut(corners[region.rows], spec), cut_naive(slide, plane, xy[region.rows], spec))
            assert same, f"{file}: crops of {spec.field_px} px differ"
