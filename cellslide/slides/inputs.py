"""From what the user names to a list of slides: files, addresses, folders, globs, and .csv, .tsv or .txt lists.

The order is the order given, folders and globs sorted by name, so a run over many slides is the same run each time.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from cellslide.errors import HIDDEN, UsageError
from cellslide.slides.lists import Listed, read_lines, read_table
from cellslide.slides.remote import Remote, file_name, to_remote
from cellslide.slides.slide_formats import dicom_series, format_of, is_ome_zarr, series_uid
from cellslide.types.address import Address, is_address

# Room for a hash, and for the endings of files that are being written.
MOST_NAME_BYTES = 200
# What stands beside the folders of the slides.
TAKEN_NAMES = frozenset(("summary.csv", "cohort.html"))

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SlideInput:
    """One slide to work on: its file (or DICOM folder), what the list says of it, and its id, unique in the run.

    local   a copy of it that is quicker to read; the slide is still the one at `path`.
    remote  what is fetched where `path` is an address: without its copy such a slide cannot be read.
    """

    path: Path
    mpp: float | None = None
    organ: str | None = None
    slide_id: str = ""
    local: Path | None = None
    remote: Remote | None = None


def expand_slides(args: Sequence[str | Path]) -> list[SlideInput]:
    """Return the slides that files, addresses, folders, glob patterns and lists name, each once.

    Raises UsageError for what is not there, a list that cannot be read, or a slide listed with two pixel sizes.
    """
    found = [item for arg in args for item in _expand(Path(arg), str(arg))]
    return _with_ids(_merge_dicom(_unique(found)))


def _expand(path: Path, text: str) -> list[SlideInput]:
    if is_address(text):
        return [_at_address(text)]
    if path.is_dir() and not is_ome_zarr(path):
        return [SlideInput(p) for p in _in_folder(path)]
    if path.exists():
        lists = {".csv": _read_csv, ".tsv": _read_csv, ".txt": _read_txt}
        reader = lists.get(path.suffix.lower())
        return reader(path) if reader else [SlideInput(path)]
    if glob.has_magic(text):
        matches = [p for p in map(Path, sorted(glob.glob(text, recursive=True))) if p.is_dir() or _is_slide(p)]
        if not matches:
            raise UsageError(f"{text}: no slide matches this pattern")
        return [
            item
            for p in matches
            for item in (_expand(p, str(p)) if _is_slide(p) or p.is_file() or dicom_series(p) else [])
        ]
    raise UsageError(f"{text}: no such file or folder")


def _at_address(text: str, sha256: str | None = None) -> SlideInput:
    path, remote = to_remote(text, sha256)
    return SlideInput(path, remote=remote)


def _is_slide(path: Path) -> bool:
    known = path.is_file() and format_of(path) is not None
    return (known or is_ome_zarr(path)) and not path.name.startswith(".")


def _in_folder(folder: Path) -> list[Path]:
    """Return the slides right inside a folder, sorted; a folder of one DICOM series is one slide, also inside it."""
    series = dicom_series(folder)
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    plain = [p for p in entries if _is_slide(p) and p.suffix.lower() != ".dcm"]
    if len(series) == 1 and not plain:
        return [folder]
    if any(p.suffix.lower() in (".vms", ".vmu") for p in plain):
        # The JPEGs beside a Hamamatsu index are its parts.
        plain = [p for p in plain if p.suffix.lower() not in (".jpg", ".jpeg")]
    below = [
        p
        for entry in entries
        if entry.is_dir() and not _is_slide(entry) and dicom_series(entry)
        for p in _in_folder(entry)
    ]
    slides = sorted([*plain, *(files[0] for files in series), *below])
    if not slides:
        raise UsageError(f"{folder}: no slide in this folder; name files, or a pattern such as '{folder}/**/*.svs'")
    return slides


def _read_txt(path: Path) -> list[SlideInput]:
    return _of_list(path, read_lines(path))


def _read_csv(path: Path) -> list[SlideInput]:
    return _of_list(path, read_table(path))


def _of_list(path: Path, rows: list[Listed]) -> list[SlideInput]:
    found = [replace(item, mpp=row.mpp, organ=row.organ) for row in rows for item in _listed(path, row)]
    return _not_empty(path, found)


def _listed(list_file: Path, row: Listed) -> list[SlideInput]:
    """Return the slides of one entry, also one that is not there: it fails in its turn, and stops no other.

    Relative paths start at the list file.
    """
    if is_address(row.entry):
        return [_at_address(row.entry, row.sha256)]
    path = list_file.parent / row.entry
    if not path.exists():
        log.warning("%s: it lists %s, which is not there (%s)", list_file, row.entry, path)
    return [SlideInput(p) for p in _in_folder(path)] if path.is_dir() and not is_ome_zarr(path) else [SlideInput(path)]


def _not_empty(path: Path, found: list[SlideInput]) -> list[SlideInput]:
    if not found:
        raise UsageError(f"{path}: the list names no slide")
    if not any(item.remote or item.path.exists() for item in found):
        first = found[0].path
        raise UsageError(f"{path}: it lists {first.name}, which is not there ({first}), nor is any other")
    return found


def _absolute(path: Path) -> str:
    return os.path.abspath(path)


def _unique(found: Iterable[SlideInput]) -> list[SlideInput]:
    by_path: dict[str, SlideInput] = {}
    for item in found:
        key = item.remote.known_by if item.remote else _absolute(item.path)
        first = by_path.setdefault(key, item)
        if first.mpp is not None and item.mpp is not None and first.mpp != item.mpp:
            raise UsageError(f"{item.path}: listed twice, with mpp {first.mpp:g} and {item.mpp:g}")
        if first.mpp is None and item.mpp is not None:
            by_path[key] = replace(first, mpp=item.mpp, organ=first.organ or item.organ)
    return list(by_path.values())


def _merge_dicom(found: list[SlideInput]) -> list[SlideInput]:
    """Make one slide of the files of a DICOM series that were named one by one (dir/*.dcm), or beside their folder."""
    merged: list[SlideInput] = []
    seen: set[tuple[str, bytes]] = set()
    folders = {_absolute(item.path) for item in found if item.path.is_dir()}
    for folder, items in groupby(found, key=_dicom_folder):
        group = list(items)
        if folder is None:
            merged += group
            continue
        whole = len(group) > 1 and len(dicom_series(folder)) == 1
        for item in group:
            key = (_absolute(folder), series_uid(item.path))
            if key not in seen and _absolute(folder) not in folders:
                merged.append(replace(item, path=folder) if whole else item)
            seen.add(key)
    return merged


def _dicom_folder(item: SlideInput) -> Path | None:
    return item.path.parent if item.path.suffix.lower() == ".dcm" and item.path.exists() else None


def _with_ids(found: list[SlideInput]) -> list[SlideInput]:
    """Give each slide its stem as id, which is a folder's name.

    A hash of the path is appended to all that share a stem, upper or lower case, and where the stem had to be changed.
    """
    stems = [_stem(item.path) for item in found]
    names = [folder_name(stem) for stem in stems]
    shared = Counter(_folded(name) for name in names)
    ids = [
        name if name == stem and shared[_folded(name)] == 1 else f"{name}-{_path_hash(item)}"
        for item, stem, name in zip(found, stems, names, strict=True)
    ]
    return [replace(item, slide_id=slide_id) for item, slide_id in zip(found, ids, strict=True)]


def _stem(path: Path) -> str:
    if isinstance(path, Address):
        return file_name(path).stem
    absolute = Path(_absolute(path))
    return absolute.name if absolute.is_dir() and not is_ome_zarr(absolute) else absolute.stem


def _path_hash(item: SlideInput) -> str:
    if item.remote is not None:
        return item.remote.known_by[:8]
    return hashlib.sha256(os.fsencode(_absolute(item.path))).hexdigest()[:8]


def _folded(name: str) -> str:
    """Return what file systems that ignore case, or compose letters, take a name for."""
    return unicodedata.normalize("NFC", name).lower()


def folder_name(stem: str) -> str:
    """Return a stem as the name of one folder inside another: itself, unless it holds what leads or looks elsewhere.

    "...svs" has the stem "..", which is the parent; control characters and separators become "_".
    """
    if _folded(stem) in TAKEN_NAMES:
        return f"{stem}_"
    name = HIDDEN.sub("_", stem).replace("/", "_").replace("\\", "_")
    name = "_" * (len(name) - len(name.lstrip("."))) + name.lstrip(".")
    return name.encode()[:MOST_NAME_BYTES].decode(errors="ignore") or "slide"
