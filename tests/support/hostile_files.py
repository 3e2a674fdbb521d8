"""Files of slides and of nuclei that somebody made to do harm, written byte by byte."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

OME = b'<?xml version="1.0"?>%s<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
PIXELS = b'<Pixels DimensionOrder="XYCZT" Type="uint8" SizeX="64" SizeY="64" SizeC="3" SizeT="1" SizeZ="1">'
END = b"</Pixels></Image></OME>"
CHANNEL = b'<Channel ID="c" SamplesPerPixel="3"/>'
Tag = tuple[int, int, int, int | bytes]


def tiff(
    width: int, height: int, tile: int = 0, rows: int = 0, more: tuple[Tag, ...] = (), following: int = 0
) -> bytes:
    """Return an RGB TIFF of one page that says it has this size, with at most 12 KB of pixels.

    tile       edge of its only tile; 0 is strips of `rows` (0: one strip).
    following  offset of the next page, 8 for the page itself.
    """
    pixels = min(max(tile, 1) ** 2 * 3 if tile else width * height * 3, 64 * 64 * 3)
    micron = struct.pack("<II", 20_000, 1)
    tags: list[Tag] = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, struct.pack("<HHH", 8, 8, 8)), (259, 3, 1, 1),
        (262, 3, 1, 2), (277, 3, 1, 3), (282, 5, 1, micron), (283, 5, 1, micron), (296, 3, 1, 3), *more,
    ]  # fmt: skip
    first, second = ((322, 4, 1, tile), (323, 4, 1, tile)) if tile else ((278, 4, 1, rows or height), None)
    tags += [tag for tag in (first, second) if tag]
    offset, count = (324, 325) if tile else (273, 279)
    tags += [(offset, 4, 1, 0), (count, 4, 1, pixels)]
    return _packed(sorted(tags), offset, pixels, following)


def _packed(tags: list[Tag], pixels_tag: int, pixels: int, following: int) -> bytes:
    start = 8 + 2 + 12 * len(tags) + 4
    held = b"".join(value for *_, value in tags if isinstance(value, bytes))
    entries, at = b"", start
    for tag, kind, count, value in tags:
        if isinstance(value, bytes):
            entries += struct.pack("<HHII", tag, kind, count, at)
            at += len(value)
        else:
            entries += struct.pack("<HHII", tag, kind, count, start + len(held) if tag == pixels_tag else value)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + struct.pack("<I", following) + held + b"\xc8" * pixels


def described(xml: bytes) -> tuple[Tag, ...]:
    """Return the tag that makes a TIFF an OME-TIFF."""
    return ((270, 2, len(xml) + 1, xml + b"\0"),)


def xml_bomb() -> bytes:
    """Return OME-XML whose entities would grow to a thousand million letters."""
    entities = b'<!ENTITY a "aaaaaaaaaa">' + b"".join(
        b'<!ENTITY %c "%s">' % (98 + k, b"&%c;" % (97 + k) * 10) for k in range(9)
    )
    return OME % (b"<!DOCTYPE x [" + entities + b"]>") + PIXELS + b"&j;" + CHANNEL + END


def bad_slides(whole: Path) -> dict[str, bytes]:
    """Return file name -> content of slides that must be refused; `whole` is a good TIFF to spoil."""
    raw = whole.read_bytes()
    huge = 4_000_000_000
    files = {f"cut-{n}.tif": raw[:n] for n in (0, 1, 8, 100)}
    for ending in ("svs", "ndpi", "mrxs", "dcm", "scn", "bif", "czi", "png", "jpg"):
        files[f"empty.{ending}"] = b""
        files[f"text.{ending}"] = b"hello\nworld\n" * 20
    return files | {
        "huge-strip.tif": tiff(huge, huge),
        "huge-strips.tif": tiff(huge, huge, rows=1),
        "huge-tile.tif": tiff(2_000_000_000, 2_000_000_000, tile=1 << 20),
        "many-tiles.tif": tiff(2_000_000_000, 2_000_000_000, tile=256),
        "large-tile.tif": tiff(65_536, 65_536, tile=65_536),
        "large-strip.tif": tiff(65_000, 65_000),
        "wide.tif": tiff(400_000, 400_000, tile=256),
        "nothing.tif": tiff(0, 0),
        "no-order.ome.tif": tiff(64, 64, more=described(OME % b"" + b'<Pixels SizeX="64"/></Image></OME>')),
    }


def odd_slides(whole: Path) -> dict[str, bytes]:
    """Return file name -> content of slides that are odd and can be read all the same."""
    raw = whole.read_bytes()
    other = b'<TiffData IFD="0"><UUID FileName="../../secret.tif">urn:uuid:1</UUID></TiffData>'
    return {
        "loop.tif": tiff(64, 64, following=8),
        "loop-of-tiles.tif": tiff(64, 64, tile=64, following=8),
        "loop-below.tif": tiff(64, 64, more=((330, 4, 1, 8),)),
        "elsewhere.ome.tif": tiff(64, 64, more=described(OME % b"" + PIXELS + CHANNEL + other + END)),
        "bomb.ome.tif": tiff(64, 64, more=described(xml_bomb())),
        **{f"really-tiff.{ending}": raw for ending in ("svs", "ndpi", "mrxs", "png", "dcm")},
    }


def write_png_bomb(path: Path) -> None:
    """Write a PNG of some 40 KB that unpacks to 400 million pixels."""
    Image.fromarray(np.zeros((20_000, 20_000), np.bool_)).save(path)


def spoil_tile(whole: Path) -> bytes:
    """Return a tiled TIFF whose first tile of the first level holds no pixels that can be unpacked."""
    raw = bytearray(whole.read_bytes())
    with tifffile.TiffFile(whole) as tiff:
        page = tiff.pages.first
        start, count = page.dataoffsets[0], page.databytecounts[0]
    raw[start : start + count] = bytes(b ^ 255 for b in raw[start : start + count])
    return bytes(raw)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        """Open the file for writing."""
        return open, (self.path, "w")


def bad_nuclei() -> dict[str, bytes]:
    """Return file name -> content of files that hold no nuclei and must be refused."""
    gz = gzip.compress
    return {
        "cut.geojson.gz": gz(b"[" + b"1," * 5000)[:-20],
        "spoilt.geojson.gz": _spoilt(gz(bytes(range(256)) * 9, 9)),
        "no-zip.zip": b"PK\3\4 no",
        "of-nothing.zip": _zip({}),
        "locked.zip": _locked(_zip({"a.geojson": "[]"})),
        "impossible-size.json.snappy": b"\xff\xff\xff\xff\xff\x7f" + b"0",
        "many-digits.json": b"[" + b"1" * 10_000 + b"]",
        "no-text.json": b'["\xff\xfe\xfd"]',
        "zero-bytes.json": b"",
        "picture.geojson": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "no.parquet": b"PAR1" + bytes(50) + b"PAR1",
        "zero-bytes.csv": b"",
        "no-text.csv": b"x,y\n\xff\xfe,1\n",
        "spoilt.csv.gz": _spoilt(gz(b"x,y\n" * 999)),
        "pickle.pkl": pickle.dumps([1]),
    }


def _spoilt(raw: bytes) -> bytes:
    return raw[:20] + bytes(b ^ 255 for b in raw[20:40]) + raw[40:]


def _zip(entries: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return file.getvalue()


def _locked(packed: bytes) -> bytes:
    raw = bytearray(packed)
    raw[6] |= 1  # the mark of an encrypted entry, before it and in the directory at the end
    raw[raw.index(b"PK\1\2") + 8] |= 1
    return bytes(raw)
