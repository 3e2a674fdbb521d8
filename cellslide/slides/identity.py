"""Whether a slide, or a file that was given, is the one that it was: hashes of its bytes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.errors import SlideError, UsageError
from cellslide.slides.slide_formats import slide_files
from cellslide.store.foreign_files import is_plain
from cellslide.store.run_record import TABLE, read_record
from cellslide.store.tile_checkpoint import PARTS_FOLDER
from cellslide.types import RunRecord, SlideInfo
from cellslide.types.address import full_name, to_path

# Of a slide of many GB these bytes are read: the first, the last, and blocks at equal steps between.
END_BYTES = 1 << 20
BLOCK_BYTES, N_BLOCKS = 1 << 16, 32
_READ_BYTES = 1 << 20

log = logging.getLogger(__name__)


def slide_sha256(path: Path) -> str:
    """Return the SHA-256 of the sizes of a slide's files, of their first and last MiB, and of 32 blocks between.

    The files count as one after another, so at most 4 MiB are read of any slide, and all of a small one. Names do not
    count: a copy elsewhere is the same slide. Raises SlideError for what is no plain file or folder.
    """
    _require_plain(path)
    sizes = [(file, file.stat().st_size) for file in slide_files(path)]
    digest = hashlib.sha256("".join(f"{size}\n" for _, size in sizes).encode())
    for start, stop in _spans(sum(size for _, size in sizes)):
        for block in _read(sizes, start, stop):
            digest.update(block)
    return digest.hexdigest()


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of all bytes of a file; of a folder, of the names and bytes of its files.

    Raises SlideError for what is no plain file or folder.
    """
    _require_plain(path)
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in slide_files(path):
        digest.update(f"{file.relative_to(path).as_posix()}:{content_sha256(file)}\n".encode())
    return digest.hexdigest()


def is_slide(path: Path, known: str) -> bool:
    """Return whether a slide is the one that a record's `sha256_head` stands for, of versions before 0.2 too."""
    return known == slide_sha256(path) or known == _head_sha256(path)


def describe_slide(info: SlideInfo, local: Path | None = None) -> dict[str, Any]:
    """Return the `slide` entry of the record; `mpp` is in µm per level-0 pixel, the mean of x and y.

    local  a copy of the slide, to read from.
    """
    here = local or info.path
    return {
        # As typed it would mean another file from another folder.
        "path": full_name(info.path),
        "sha256_head": slide_sha256(here) if here.exists() else None,
        "mpp": (info.mpp_x + info.mpp_y) / 2,
        "mpp_source": info.mpp_source,
        "width": info.width_px,
        "height": info.height_px,
        "vendor": info.vendor,
    }


def other_slide(earlier: RunRecord | None, path: Path, local: Path | None = None) -> str:
    """Return in words that a record is of another slide than the one at `path`, or "", also where that is gone.

    local  a copy of the slide, to read from.
    """
    known, here = None if earlier is None else earlier.slide.get("sha256_head"), local or path
    if earlier is None or known is None or not here.exists() or is_slide(here, known):
        return ""
    then, now = full_name(to_path(str(earlier.slide.get("path")))), full_name(path)
    if then == now:
        return f"{now} has changed since: another slide lay there then"
    return f"another slide of this name was done here: {then} then, {now} now"


def refuse_other_slide(folder: Path, record: RunRecord, overwrite: bool, local: Path | None = None) -> None:
    """Raise UsageError where a folder holds the work of another slide of the same name; warn where that is given up."""
    if not (folder / TABLE).is_dir() and not (folder / PARTS_FOLDER).is_dir():
        return
    try:
        earlier = read_record(folder)
        if earlier is not None and earlier.slide.get("sha256_head") == record.slide["sha256_head"]:
            return  # Known without reading the slide again.
        words = other_slide(earlier, to_path(record.slide["path"]), local)
    except SlideError:
        return  # What is no record is answered where it is needed.
    if words and overwrite:
        log.warning("%s: %s; its results are replaced", folder, words)
    elif words:
        raise UsageError(f"{folder}: {words}; give another --output, or name both slides in one command")


def _require_plain(path: Path) -> None:
    if not is_plain(path):
        raise SlideError(f"{path}: not a plain file or folder")


def _spans(size: int) -> list[tuple[int, int]]:
    """Return the bytes that are read of so many: [start, stop) in order, none twice."""
    if size <= 2 * END_BYTES + N_BLOCKS * BLOCK_BYTES:
        return [(0, size)]
    first, last = END_BYTES, size - END_BYTES - BLOCK_BYTES
    starts = np.linspace(first, last, N_BLOCKS).astype(np.int64).tolist()
    blocks = [(start, start + BLOCK_BYTES) for start in starts]
    return [(0, END_BYTES), *blocks, (size - END_BYTES, size)]


def _read(sizes: Sequence[tuple[Path, int]], start: int, stop: int) -> Iterator[bytes]:
    """Yield bytes [start, stop) of files that count as one after another."""
    before = 0
    for file, size in sizes:
        low, high = max(start - before, 0), min(stop - before, size)
        before += size
        if low >= high:
            continue
        with file.open("rb") as stream:
            stream.seek(low)
            while low < high and (block := stream.read(min(high - low, _READ_BYTES))):
                low += len(block)
                yield block


def _head_sha256(path: Path) -> str:
    """Return what versions before 0.2 took for a slide: sizes and the first MiB."""
    files = slide_files(path) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        digest.update(f"{name}:{file.stat().st_size}\n".encode())
    if files:
        with files[0].open("rb") as stream:
            digest.update(stream.read(END_BYTES))
    return digest.hexdigest()
