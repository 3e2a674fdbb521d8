"""Reading: tiles of 1024 px from a slide, beside OpenSlide, and what it costs that tiles overlap."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np

from cellslide.bench.rows import BenchOptions, Row, Target, row
from cellslide.slides.readers import OpenSlideReader, SlideReader, TiffReader, open_reader
from cellslide.types import UInt8

STAGE = "read"
TILE_PX, OVERLAP_PX = 1024, 128
# A slide of one's own may be large; so many tiles of its middle tell enough.
MOST_TILES = 64
UNIT = "CPU ms a tile"
PAINTED_PX = {"jpeg": 6144, "jpeg2000": 3072}
APERIO = "Aperio Image Library v12\r\n{0}x{0} (256x256) |AppMag = 40|MPP = 0.25"
# Aperio's code of JPEG 2000 in RGB.
CODES: dict[str, str | int] = {"jpeg": "jpeg", "jpeg2000": 33005}
TARGETS = {"JPEG": Target(5, 4), "JPEG 2000": Target(ratio=1.6), "dicom": Target(ratio=2)}
OVERLAP_TARGET = Target(1.15)
Box = tuple[int, int]


def rows(options: BenchOptions) -> Iterator[Row]:
    """Time reads of a slide given, else of a painted one in JPEG and one in JPEG 2000."""
    if options.slide is not None:
        file = options.slide
        yield from slide_rows(first_file(file), options.rounds)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in PAINTED_PX:
            file = Path(scratch) / f"{name}.svs"
            write_tiled(file, name, PAINTED_PX[name])
            yield from slide_rows(file, options.rounds)


def first_file(path: Path) -> Path:
    """Return a file of a DICOM folder that opens it, other paths as they are."""
    if not path.is_dir():
        return path
    with closing(open_reader(path)) as reader:
        return getattr(getattr(reader, "beside", reader), "file", path)


def write_tiled(file: Path, name: str, size_px: int) -> None:
    """Write tissue of `size_px` by `size_px` as a scanner does: tiles of 256 px, one level, 4:2:0 where it is JPEG."""
    import tifffile

    image = tissue(size_px)
    if name == "jpeg":
        options: dict[str, Any] = {"photometric": "ycbcr", "subsampling": (2, 2), "compressionargs": {"level": 80}}
    else:
        options = {"photometric": "rgb", "compressionargs": {"level": 35}}
    about = APERIO.format(size_px)
    tifffile.imwrite(file, image, tile=(256, 256), compression=CODES[name], description=about, metadata=None, **options)


def tissue(size_px: int) -> UInt8:
    """Return painted tissue, uint8 (size, size, 3), turned over at the seams so that there are none."""
    from cellslide.slides.painted import paint

    image = paint().image
    image = np.concatenate([image, image[:, ::-1]], axis=1)
    image = np.concatenate([image, image[::-1]])
    times = [-(-size_px // n) for n in image.shape[:2]]
    return np.ascontiguousarray(np.tile(image, (*times, 1))[:size_px, :size_px])


def slide_rows(file: Path, rounds: int) -> Iterator[Row]:
    """Time one slide: OpenSlide (tifffile where that cannot open it), our reader, and tiles that overlap."""
    cv2.setNumThreads(1)
    with closing(open_reader(file)) as reader:
        size, vendor, by = (
            (reader.header.width_px, reader.header.height_px),
            reader.header.vendor,
            reader.header.read_by,
        )
    kind = next((name for name in ("JPEG 2000", "JPEG") if f"({name})" in by), vendor)
    apart, close = corners(size, TILE_PX), corners(size, TILE_PX - OVERLAP_PX)
    plain = "tifffile" if vendor in ("tiff", "ome-tiff") else "OpenSlide"
    ways: dict[str, Callable[[], SlideReader]] = {
        plain: lambda: TiffReader(file) if plain == "tifffile" else OpenSlideReader(file, file),
        "cellslide": lambda: open_reader(file),
    }
    rounds_of: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):  # in turn, so that what else the machine does slows both
        for name, open_file in ways.items():
            rounds_of[name].append(read_ms(open_file, apart))
    first = median(reading for _, reading in rounds_of[plain]) / len(apart)
    for name, times in rounds_of.items():
        target = Target() if name == plain else TARGETS.get("dicom" if vendor == "dicom" else kind, Target())
        per_tile = [reading / len(apart) for _, reading in times]
        note = f"and {median(opening for opening, _ in times):.0f} ms to open the file"
        yield row(STAGE, f"{vendor}, {kind}: {name}", per_tile, UNIT, len(apart), first, target, note)
    costs = [overlap_cost(ways["cellslide"], apart, close) for _ in range(rounds)]
    note = f"cost of a pixel of the slide, beside tiles that do not overlap; {OVERLAP_PX} px of {TILE_PX}"
    yield row(STAGE, f"{vendor}, {kind}: cellslide, overlap", costs, "×", len(close), None, OVERLAP_TARGET, note)


def overlap_cost(open_file: Callable[[], SlideReader], apart: list[Box], close: list[Box]) -> float:
    """Return what a pixel of the slide costs where tiles overlap, in what it costs where they do not."""
    return read_ms(open_file, close)[1] / area(close) / (read_ms(open_file, apart)[1] / area(apart))


def read_ms(open_file: Callable[[], SlideReader], tiles: list[Box]) -> tuple[float, float]:
    """Return CPU ms to open a file, and to read tiles of its level 0 with a reader that has seen nothing."""
    begin = time.process_time()
    with closing(open_file()) as reader:
        opened = time.process_time()
        for x, y in tiles:
            reader.read_level(0, x, y, TILE_PX, TILE_PX)
        return (opened - begin) * 1e3, (time.process_time() - opened) * 1e3


def corners(size: tuple[int, int], step_px: int) -> list[Box]:
    """Return the top left pixels of whole tiles every `step_px`, row by row, of the middle of a large slide."""
    across, down = (max((n - TILE_PX) // step_px + 1, 1) for n in size)
    edge = int(MOST_TILES**0.5)
    cols, lines = (range(max((n - edge) // 2, 0), min((n + edge) // 2, n)) for n in (across, down))
    return [(col * step_px, line * step_px) for line in lines for col in cols]


def area(tiles: list[Box]) -> float:
    """Return how much of the slide tiles cover together, in tiles."""
    spans = np.ptp(np.array(tiles), axis=0) / TILE_PX + 1
    return float(spans.prod())
