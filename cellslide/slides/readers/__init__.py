"""What opens a slide file, all behind `SlideReader`: tiles decoded here, OpenSlide, tifffile, Pillow.

OpenSlide knows the formats of scanners, tifffile OME-TIFF and big TIFF, Pillow plain images; where either of the first
two opens a file of plain tiles, these are read and decoded here. A reader knows levels and pixels; it resamples
nothing and decides nothing about pixel size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import openslide
import tifffile

from cellslide.errors import SlideError, UsageError
from cellslide.slides.readers.base import MOST_PX, MOST_TILE_PX, WHITE, SlideHeader, SlideReader, composite, is_tiff
from cellslide.slides.readers.choose import orientation
from cellslide.slides.readers.dicom import dicom_reader
from cellslide.slides.readers.look import looked_at
from cellslide.slides.readers.plain import ArrayReader, pillow_reader
from cellslide.slides.readers.tiff import TiffReader
from cellslide.slides.readers.tiled import TiledReader, tiff_levels, tiled_reader
from cellslide.slides.readers.vendor import OpenSlideReader
from cellslide.slides.slide_formats import format_of
from cellslide.types.address import Address

__all__ = [
    "WHITE",
    "ArrayReader",
    "OpenSlideReader",
    "SlideHeader",
    "SlideReader",
    "TiffReader",
    "TiledReader",
    "composite",
    "open_reader",
    "pillow_reader",
]

# In a TIFF more than any codec packs into so few bytes.
SMALL_PX, MOST_PX_PER_BYTE = 1 << 30, 1_000_000
PAGES_CHECKED = 64
# Vendors whose levels are plain grids of tiles; other formats in TIFF leave tiles out or let them overlap.
PLAIN_VENDORS = ("aperio", "generic-tiff")


def open_reader(path: Path) -> SlideReader:
    """Open a slide file, or a folder of DICOM files, and look at a sample of it.

    What its format names opens it, else the first library that knows it.

    Raises UsageError if it is not there, SlideError if no library can read it.
    """
    if isinstance(path, Address):
        raise UsageError(f"{path}: only run, segment and classify fetch slides; copy it to a file first and name that")
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    format = format_of(path)
    if format is not None and format.open is not None:
        return format.open(path)
    file = _first_dicom(path) if path.is_dir() else path
    if is_tiff(file):
        _check_tiles(file)
    reader, unnamed = _open_known(path, file)
    try:
        _check_size(reader.header, file)
        looked = looked_at(reader, unnamed)
    except BaseException:
        reader.close()
        raise
    if isinstance(reader, TiledReader):
        reader.cache.forget()
    return looked


def _open_known(path: Path, file: Path) -> tuple[SlideReader, bool]:
    """Return a reader, of the file's own tiles where it can be, and whether its channels have no names."""
    vendor = openslide.OpenSlide.detect_format(file)
    if is_tiff(file) and (vendor in (None, *PLAIN_VENDORS) or _is_ome(file)):
        return _open_tiff(path, file, vendor)
    if vendor is None:
        return pillow_reader(path), False
    if is_tiff(file) and (turned := _orientation(file)) != 1:
        raise SlideError(
            f"{path}: its TIFF Orientation is {turned}, and OpenSlide would turn each tile in its place; convert it to "
            "a tiled TIFF"
        )
    reader = OpenSlideReader(path, file)
    if vendor != "dicom":
        return reader, False
    try:
        return dicom_reader(reader, file), False
    except BaseException:
        reader.close()
        raise


def _open_tiff(path: Path, file: Path, vendor: str | None) -> tuple[SlideReader, bool]:
    """Open a TIFF as `choose` decides; OpenSlide stands by only where it sees the very same slide."""
    own = TiffReader(path, vendor)
    try:
        theirs = None if own.image.is_ome or vendor is None else _openslide_of(own, path, file, vendor)
        reader = tiled_reader(theirs or own, lambda: ([file], tiff_levels(own)))
        if own.image.lies and not isinstance(reader, TiledReader):
            raise SlideError(f"{path}: its tags and its JPEG streams state different colours; convert it to RGB")
    except BaseException:
        own.close()
        raise
    if theirs is not None:
        own.close()
    return reader, own.image.unnamed


def _openslide_of(own: TiffReader, path: Path, file: Path, vendor: str) -> SlideReader | None:
    """Return OpenSlide's view of a TIFF with what was decided of it, or None where it sees another slide."""
    try:
        theirs = OpenSlideReader(path, file)
    except SlideError:
        # Plain TIFF with a codec that OpenSlide lacks (WebP, Zstandard); vendors' own files are not second-guessed.
        if vendor != "generic-tiff":
            raise
        return None
    sizes = [(level.width_px, level.height_px) for level in theirs.header.levels]
    if not own.image.is_plain or sizes != own.image.sizes:
        theirs.close()
        return None
    facts, found = own.header, theirs.header.found or own.header.found
    theirs.header = replace(theirs.header, found=found, notes=facts.notes, missing=facts.missing)
    return theirs


def _first_dicom(folder: Path) -> Path:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    for file in files:
        if openslide.OpenSlide.detect_format(file) == "dicom":
            return file
    raise SlideError(f"{folder}: no DICOM slide in this folder; give the slide file")


def _check_tiles(path: Path) -> None:
    """Raise SlideError for a TIFF whose tiles do not fit into memory, before a library in C asks for it."""
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page for _, page in zip(range(PAGES_CHECKED), tiff.pages, strict=False)]
            tiles = [(int(p.tilewidth), int(p.tilelength)) for p in pages if isinstance(p, tifffile.TiffPage)]
    except Exception:  # What is damaged is told when it is opened; tifffile raises what it likes.
        return
    width, height = max(tiles, key=lambda tile: tile[0] * tile[1], default=(0, 0))
    if width * height > MOST_TILE_PX:
        raise SlideError(f"{path}: tiles of {width} x {height} px do not fit into memory; convert it to smaller tiles")


def _orientation(path: Path) -> int:
    """Return the Orientation of the largest page, 1 where nothing is said of it."""
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page.aspage() for _, page in zip(range(PAGES_CHECKED), tiff.pages, strict=False)]
            return orientation(max(pages, key=lambda page: int(page.imagewidth) * int(page.imagelength)))
    except Exception:  # What is damaged is told when it is opened; tifffile raises what it likes.
        return 1


def _check_size(header: SlideHeader, file: Path) -> None:
    """Raise SlideError for a size that no slide has, or that the bytes of a TIFF cannot hold."""
    pixels, size = header.width_px * header.height_px, file.stat().st_size
    bomb = pixels > SMALL_PX and pixels > size * MOST_PX_PER_BYTE and is_tiff(file)
    if bomb or pixels > MOST_PX or pixels <= 0:
        raise SlideError(
            f"{header.path}: {header.width_px} x {header.height_px} px in {size:,} bytes is no slide; is it damaged?"
        )


def _is_ome(path: Path) -> bool:
    if not is_tiff(path):
        return False
    try:
        with tifffile.TiffFile(path) as tiff:
            return bool(tiff.is_ome)
    except Exception:  # tifffile raises what it likes on a damaged file.
        return False
