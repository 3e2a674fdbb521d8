"""Lists of slides: tables (.csv, .tsv) with a column path, and .txt files with a path a line.

A pixel size that a table gives under another name than ours is taken where its name says µm, and refused where it only
looks like one: a slide read at a size that nobody meant gives wrong numbers without a word.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cellslide.errors import UsageError, short
from cellslide.slides.pixel_size import LARGEST_UM, SMALLEST_UM
from cellslide.store.foreign_files import read_text

PATH_HEADERS = ("path", "slide", "wsi")
# Names as `_plain` makes them; each may also end in _x and _y.
MPP_HEADERS = (
    "mpp", "wsi_mpp", "slide_mpp", "mpp_um", "um_per_px", "um_per_pixel", "micron_per_pixel", "microns_per_pixel",
    "microns_per_px", "pixel_size", "pixel_size_um", "pixel_width_um", "pixelsize", "pixelsize_um", "pixel_spacing_um",
)  # fmt: skip
# What names of pixel sizes hold; a column with such a name that is none of ours is refused.
LOOKS_LIKE = re.compile(
    r"(^|_)(mpp|mppx|mppy|resolution|spacing|um|micron|microns|px_?size|pixel)(_|$)|pixel_?size|per_?(px|pixel)|microns?per"
)
MOST_LIST_BYTES = 64 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of a list: what stands in its column path, its pixel size (µm), organ, and the hash of its bytes."""

    entry: str
    mpp: float | None = None
    organ: str | None = None
    sha256: str | None = None


def read_lines(path: Path) -> list[Listed]:
    """Return the entries of a .txt list; lines that begin with # are comments."""
    lines = (line.strip() for line in _text(path).splitlines())
    return [Listed(line) for line in lines if line and not line.startswith("#")]


def read_table(path: Path) -> list[Listed]:
    """Return the rows of a table with a header, parted by commas, semicolons or tabs.

    Raises UsageError naming the file, and the line where it is one, for what cannot be understood.
    """
    lines = _text(path).splitlines()
    if lines and re.fullmatch(r"sep=.", lines[0].strip().lower()):
        lines = lines[1:]  # Excel's word on what parts the columns
    header = lines[0] if lines else ""
    rows = csv.reader(lines, delimiter=max(",;\t", key=header.count))
    try:
        names = [_plain(name) for name in next(rows, [])]
        place = _columns(path, names, header)
        found = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UsageError(f"{path}: not a readable list: {error}") from error
    return [item for line, row in found if (item := _row(path, line, row, len(names), place)) is not None]


@dataclass(frozen=True, slots=True)
class _Columns:
    path: int
    mpp: tuple[int, ...]
    organ: int | None
    sha256: int | None


def _plain(name: str) -> str:
    """Return a column's name in lower case, its words joined by _, µm as um."""
    text = name.strip().lower().replace("µ", "u").replace("μ", "u")
    return re.sub(r"[^a-z0-9]+", "_", text).strip("_")


def _columns(path: Path, names: Sequence[str], header: str) -> _Columns:
    twice = sorted({first for first, second in pairwise(sorted(names)) if first and first == second})
    if twice:
        raise UsageError(f"{path}: the column {twice[0]} stands twice in its header: {header[:200]!r}")
    column = next((names.index(name) for name in PATH_HEADERS if name in names), None)
    if column is None:
        raise UsageError(f"{path}: no column path (or slide, wsi) in its header: {header[:200]!r}")
    sizes = [
        k for k, name in enumerate(names) if name in MPP_HEADERS or re.sub(r"_?[xy](_um)?$", r"\1", name) in MPP_HEADERS
    ]
    organ, sha256 = (names.index(name) if name in names else None for name in ("organ", "sha256"))
    rest = [name for k, name in enumerate(names) if name and k not in (column, organ, sha256, *sizes)]
    if doubtful := next((name for name in rest if LOOKS_LIKE.search(name)), None):
        raise UsageError(
            f"{path}: the column {doubtful} looks like a pixel size and is not known; name it mpp (µm per pixel of "
            "level 0), or remove it"
        )
    if rest:
        words = ", ".join(rest[:8])[:200] + (", ..." if len(rest) > 8 else "")
        _log.info("%s: its columns %s are not used; known are path, mpp, organ and sha256", path, words)
    return _Columns(column, tuple(sizes), organ, sha256)


def _row(path: Path, line: int, row: list[str], width: int, place: _Columns) -> Listed | None:
    if len(row) > width and any(cell.strip() for cell in row[width:]):
        raise UsageError(f"{path}: line {line}: {len(row)} columns, the header has {width}; quote what holds commas")
    cells = [cell.strip() for cell in row] + [""] * width
    if not cells[place.path]:
        return None
    mpp = _one_size(path, line, [text for k in place.mpp if (text := cells[k])])
    organ, sha256 = (None if k is None else cells[k] or None for k in (place.organ, place.sha256))
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UsageError(f"{path}: line {line}: sha256 {sha256[:80]!r} must be 64 hexadecimal digits, or empty")
    return Listed(cells[place.path], mpp, organ, sha256 and sha256.lower())


def _one_size(path: Path, line: int, texts: list[str]) -> float | None:
    """Return the pixel size that all columns agree on to 1 %, None where none is given."""
    sizes = [_mpp(path, line, text) for text in texts]
    if not sizes:
        return None
    if max(sizes) > 1.01 * min(sizes):
        words = " and ".join(f"{size:g}" for size in dict.fromkeys(sizes))
        raise UsageError(f"{path}: line {line}: the pixel sizes {words} differ; pixels are to be square")
    return sizes[0]


def _mpp(path: Path, line: int, text: str) -> float:
    try:
        # A decimal comma can be nothing else here: no pixel is a thousand µm.
        mpp = float(text.replace(",", "."))
    except ValueError:
        mpp = 0.0
    if not SMALLEST_UM <= mpp <= LARGEST_UM:
        raise UsageError(f"{path}: line {line}: mpp {text[:40]!r} must be {SMALLEST_UM} to {LARGEST_UM} µm per pixel")
    return mpp


def _text(path: Path) -> str:
    try:
        return read_text(path, UsageError, MOST_LIST_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: not a readable list of slides: {short(error)}") from error
