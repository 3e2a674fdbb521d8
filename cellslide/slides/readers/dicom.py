"""Where the tiles of a DICOM slide lie, for `tiled`: full grids of single frames in JPEG or JPEG 2000.

OpenSlide says which levels there are; pydicom, which is optional, reads the headers of the files beside the one that
was opened.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from cellslide.errors import SlideError
from cellslide.slides.readers.base import SlideHeader, SlideReader, TileGaps
from cellslide.slides.readers.colours import jpeg_is_rgb
from cellslide.slides.readers.tiled import (
    Codec,
    Jpeg2000Codec,
    JpegCodec,
    OddFile,
    TiledLevel,
    TiledReader,
    tiled_reader,
)
from cellslide.types import Int64

if TYPE_CHECKING:
    from pydicom import Dataset

JPEG = "1.2.840.10008.1.2.4.50"
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
# Element (7FE0,0010) in explicit little endian, of undefined length: encapsulated frames.
PIXELS = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
ITEM = b"\xfe\xff\x00\xe0"
ITEM_BYTES = 8
FIRST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Instance:
    """A file of the series: its header, and where each frame begins and how long it is."""

    path: Path
    header: Dataset
    offset: Int64
    n_bytes: Int64


def dicom_reader(beside: SlideReader, file: Path) -> SlideReader:
    """Return a reader of the frames themselves, or `beside` where these are odd.

    Raises SlideError where the frames are not in the colours that the headers state and cannot be read one by one.
    """
    liars: list[Path] = []
    reader = tiled_reader(beside, lambda: dicom_levels(file, beside.header, liars))
    if reader is beside:
        reader.header = replace(reader.header, missing=_missing(file, reader.header))
    if not liars:
        return reader
    if not isinstance(reader, TiledReader):
        raise SlideError(f"{liars[0]}: its frames are not in the colours that its PhotometricInterpretation states")
    note = "its DICOM headers and its frames state different colours; the frames are believed"
    reader.header = replace(reader.header, notes=(*reader.header.notes, note))
    return reader


def dicom_levels(
    file: Path, header: SlideHeader, liars: list[Path] | None = None
) -> tuple[list[Path], tuple[TiledLevel, ...]]:
    """Return the files of the levels, and where their tiles lie. Raises OddFile.

    liars  gets the files whose frames are in other colours than their headers state.
    """
    levels: list[TiledLevel] = []
    paths: list[Path] = []
    for path, data in _files_of_levels(file, header):
        instance = _instance(path, data)
        is_rgb = _is_rgb(instance)
        lies = is_rgb is not None and is_rgb != (instance.header.PhotometricInterpretation == "RGB")
        if lies and liars is not None:
            liars.append(instance.path)
        levels.append(replace(_level(instance, len(paths), is_rgb), lies=lies))
        paths.append(path)
    return paths, tuple(levels)


def _files_of_levels(file: Path, header: SlideHeader) -> list[tuple[Path, Dataset]]:
    """Return the file of each level and its header; raises OddFile where a level lies in none or in several."""
    try:
        import pydicom
    except ImportError as error:
        raise OddFile("pydicom is not installed (pip install 'cellslide[dicom]')") from error

    series = pydicom.dcmread(file, stop_before_pixels=True).SeriesInstanceUID
    files = sorted(p for p in file.parent.iterdir() if p.is_file() and not p.name.startswith("."))
    by_size: dict[tuple[int, int], list[tuple[Path, Dataset]]] = {}
    for path in files:
        if (data := _volume(path, series)) is not None:
            by_size.setdefault((data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows), []).append((path, data))
    found = [by_size.get((level.width_px, level.height_px), []) for level in header.levels]
    if any(len(pairs) != 1 for pairs in found):
        raise OddFile("levels and files do not match one to one")
    return [pairs[0] for pairs in found]


def _missing(file: Path, header: SlideHeader) -> tuple[TileGaps, ...]:
    """Return which tiles a slide of sparse frames leaves out; nothing where its headers do not tell."""
    try:
        return tuple(_gaps(data, header) for _, data in _files_of_levels(file, header))
    except Exception:  # pydicom raises what it likes on a damaged header, whose pixels may be whole.
        return ()


def _gaps(data: Dataset, header: SlideHeader) -> TileGaps:
    """Return the tiles of a level for which there is no frame; frames that say no place come in order."""
    width, height = int(data.TotalPixelMatrixColumns), int(data.TotalPixelMatrixRows)
    step_x, step_y = int(data.Columns), int(data.Rows)
    is_gap = np.ones((-(-height // step_y), -(-width // step_x)), np.bool_)
    frames = data.get("PerFrameFunctionalGroupsSequence") or ()
    placed = [frame.PlanePositionSlideSequence[0] for frame in frames if "PlanePositionSlideSequence" in frame]
    for place in placed:
        row, col = place.RowPositionInTotalImagePixelMatrix - 1, place.ColumnPositionInTotalImagePixelMatrix - 1
        is_gap[row // step_y, col // step_x] = False
    if not placed:
        is_gap.reshape(-1)[: int(data.NumberOfFrames)] = False
    return TileGaps(is_gap, step_x * header.width_px / width, step_y * header.height_px / height)


def _volume(path: Path, series: str) -> Dataset | None:
    """Return the header of a file that holds a level of the series."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        data = pydicom.dcmread(path, stop_before_pixels=True)
    except InvalidDicomError:
        return None
    kinds = {str(kind).upper() for kind in data.get("ImageType", [])}
    same = data.get("SeriesInstanceUID") == series and "TotalPixelMatrixColumns" in data
    return data if same and "VOLUME" in kinds else None


def _instance(path: Path, data: Dataset) -> Instance:
    import pydicom

    with path.open("rb") as stream:
        pydicom.dcmread(stream, stop_before_pixels=True)
        if stream.read(len(PIXELS)) != PIXELS:
            raise OddFile("its frames are not compressed")
        offset, n_bytes = _frames(stream, data, path.stat().st_size)
    if len(offset) != data.NumberOfFrames:
        raise OddFile("its frames are in several pieces")
    return Instance(path, data, offset, n_bytes)


def _frames(stream: BinaryIO, data: Dataset, size: int) -> tuple[Int64, Int64]:
    """Return first byte and length of each frame, from the tables where there are any; the stream is at the first."""
    tag, length = struct.unpack("<4sI", stream.read(ITEM_BYTES))
    if tag != ITEM:
        raise OddFile("its list of frames is damaged")
    table = np.frombuffer(stream.read(length), "<u4").astype(np.int64)
    first = stream.tell()
    if "ExtendedOffsetTable" in data:
        extended = np.frombuffer(data.ExtendedOffsetTable, "<u8").astype(np.int64)
        lengths = np.frombuffer(data.ExtendedOffsetTableLengths, "<u8").astype(np.int64)
        return extended + first + ITEM_BYTES, lengths
    if len(table):
        # The last frame ends with the file or before; bytes after the end of a picture are not looked at.
        ends = np.append(table[1:], size - first)
        return table + first + ITEM_BYTES, ends - table - ITEM_BYTES
    return _walk(stream)


def _walk(stream: BinaryIO) -> tuple[Int64, Int64]:
    """Return first byte and length of each item that follows, one after another."""
    spans = []
    while (head := stream.read(ITEM_BYTES))[:4] == ITEM:
        length = struct.unpack("<I", head[4:])[0]
        spans.append((stream.tell(), length))
        stream.seek(length, 1)
    found = np.array(spans, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _is_rgb(instance: Instance) -> bool | None:
    """Return whether the frames are RGB where they are JPEG that says so decisively, else None."""
    held = np.flatnonzero(instance.n_bytes > 0)
    if str(instance.header.file_meta.TransferSyntaxUID) != JPEG or not len(held):
        return None
    with instance.path.open("rb") as stream:
        stream.seek(int(instance.offset[held[0]]))
        return jpeg_is_rgb(stream.read(min(int(instance.n_bytes[held[0]]), FIRST_BYTES)))


def _level(instance: Instance, file: int, is_rgb: bool | None) -> TiledLevel:
    data = instance.header
    _check(data)
    level = TiledLevel(
        int(data.TotalPixelMatrixColumns), int(data.TotalPixelMatrixRows), int(data.Columns), int(data.Rows),
        np.full_like(instance.offset, file), instance.offset, instance.n_bytes, *_codec(data, is_rgb),
    )  # fmt: skip
    if len(instance.offset) != level.n_across * level.n_down or (instance.n_bytes <= 0).any():
        raise OddFile("tiles are missing")
    return level


def _check(data: Dataset) -> None:
    plain: Sequence[tuple[str, object, object]] = (
        ("SamplesPerPixel", 3, None),
        ("BitsAllocated", 8, None),
        ("DimensionOrganizationType", "TILED_FULL", None),
        ("TotalPixelMatrixFocalPlanes", 1, 1),
        ("NumberOfOpticalPaths", 1, 1),
    )
    for name, wanted, absent in plain:
        if data.get(name, absent) != wanted:
            raise OddFile(f"its {name} is {data.get(name)}")


def _codec(data: Dataset, is_rgb: bool | None) -> tuple[Codec, str]:
    syntax, colours = str(data.file_meta.TransferSyntaxUID), str(data.PhotometricInterpretation)
    if syntax == JPEG and colours in ("RGB", "YBR_FULL_422", "YBR_FULL"):
        return JpegCodec.of(None, colours == "RGB" if is_rgb is None else is_rgb), "JPEG"
    if syntax in JPEG_2000 and colours in ("RGB", "YBR_ICT", "YBR_RCT"):
        return Jpeg2000Codec(), "JPEG 2000"
    raise OddFile("its frames are not JPEG or JPEG 2000")
