"""The kinds of slide files: one record each with its suffixes, the files that make up a slide, and what opens it."""

from __future__ import annotations

import configparser
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cellslide.errors import SlideError

if TYPE_CHECKING:
    from cellslide.slides.readers.base import SlideReader

# More than any slide has.
MOST_FILES = 100_000
_HEAD_BYTES = 1 << 16
_SERIES_UID = b"\x20\x00\x0e\x00UI"
MOST_INDEX_BYTES = 1 << 20
_OME_FILE = re.compile(r'FileName="([^"]+)"')


def only_itself(path: Path) -> list[Path]:
    """Return the one file of a slide."""
    return [path]


@dataclass(frozen=True, slots=True)
class SlideFormat:
    """A kind of slide file.

    suffixes  in lower case, with their dot.
    files     returns all files of a slide from the one that the user names; all lie beside it or below.
              A part that is named and not there is left out.
    open      opens it and knows its pixel size; None leaves it to the libraries, which look at its content.
    """

    name: str
    suffixes: tuple[str, ...]
    files: Callable[[Path], list[Path]] = only_itself
    open: Callable[[Path], SlideReader] | None = None


def dicom_series(folder: Path) -> list[list[Path]]:
    """Return the .dcm files right inside a folder, grouped by the series they belong to."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".dcm" and p.is_file() and p.name[0] != ".")
    groups: dict[bytes, list[Path]] = {}
    for file in files:
        groups.setdefault(series_uid(file), []).append(file)
    return list(groups.values())


def series_uid(file: Path) -> bytes:
    """Return SeriesInstanceUID (0020,000E) from the head of a DICOM file; the file's own name if it has none."""
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    at = head.find(_SERIES_UID)
    if at < 0:
        return file.name.encode()
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    return head[at + 8 : at + 8 + length].rstrip(b"\0 ")


def _dicom_files(path: Path) -> list[Path]:
    return next((series for series in dicom_series(path.parent) if path in series), [path])


def _mirax_files(path: Path) -> list[Path]:
    companion = path.with_suffix("")
    return [path, *(_files_below(companion) if companion.is_dir() else [])]


def _hamamatsu_files(index: Path) -> list[Path]:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        with index.open("rb") as stream:
            parser.read_string(stream.read(MOST_INDEX_BYTES).decode("utf-8", "replace"))
    except configparser.Error:
        return [index]
    return [index, *_beside(index, [value for section in parser.sections() for value in parser[section].values()])]


def _ome_files(path: Path) -> list[Path]:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            return [path, *_beside(path, _OME_FILE.findall(tiff.ome_metadata or "") if tiff.is_ome else [])]
    except Exception:  # tifffile raises what it likes on a damaged file, which is told when it is opened.
        return [path]


def _files_below(folder: Path) -> list[Path]:
    found = []
    for k, path in enumerate(folder.rglob("*")):
        if k >= MOST_FILES:
            raise SlideError(f"{folder}: more than {MOST_FILES:,} files; this is no slide")
        if path.is_file():
            found.append(path)
    return sorted(found)


def _beside(path: Path, names: list[str]) -> list[Path]:
    """Return those names that are files right beside `path`; what leads elsewhere is no part of the slide."""
    plain = dict.fromkeys(name for name in names if name and Path(name).name == name and name != path.name)
    return [path.parent / name for name in plain if (path.parent / name).is_file()]


def is_ome_zarr(path: Path) -> bool:
    """Return whether a folder is an OME-Zarr image by its metadata; label maps and tables in zarr are none."""
    if path.suffix.lower() != ".zarr" or not path.is_dir():
        return False
    for name in ("zarr.json", ".zattrs"):
        try:
            with (path / name).open("rb") as stream:
                attributes = json.loads(stream.read(MOST_INDEX_BYTES))
            attributes = attributes.get("attributes", attributes)
            attributes = attributes.get("ome", attributes)
        except (OSError, ValueError, AttributeError):
            continue
        if not isinstance(attributes, dict) or "image-label" in attributes:
            return False
        return "multiscales" in attributes or "bioformats2raw.layout" in attributes
    return False


def _open_ome_zarr(path: Path) -> SlideReader:
    from cellslide.slides.readers.ome_zarr import open_ome_zarr

    return open_ome_zarr(path)


SLIDE_FORMATS: dict[str, SlideFormat] = {}


def register(format: SlideFormat) -> None:
    """Add a kind of slide file; raises ValueError where its name or a suffix is taken."""
    if format.name in SLIDE_FORMATS or any(format_of(Path(f"a{suffix}")) for suffix in format.suffixes):
        raise ValueError(f"there is a slide format {format.name}, or one of its suffixes {', '.join(format.suffixes)}")
    SLIDE_FORMATS[format.name] = format


def format_of(path: Path) -> SlideFormat | None:
    """Return the kind of slide file that a suffix names, None where it names none."""
    suffix = path.suffix.lower()
    return next((format for format in SLIDE_FORMATS.values() if suffix in format.suffixes), None)


def slide_files(path: Path) -> list[Path]:
    """Return all files of a slide; of a folder all that lie in it. Raises SlideError for more than a slide has."""
    if path.is_dir():
        return _files_below(path)
    format = format_of(path)
    return [path] if format is None else format.files(path)


register(SlideFormat("aperio", (".svs", ".svslide")))
register(SlideFormat("tiff", (".tif", ".tiff", ".btf", ".tf8"), _ome_files))
register(SlideFormat("hamamatsu", (".ndpi",)))
register(SlideFormat("hamamatsu-index", (".vms", ".vmu"), _hamamatsu_files))
register(SlideFormat("leica", (".scn",)))
register(SlideFormat("mirax", (".mrxs",), _mirax_files))
register(SlideFormat("ventana", (".bif",)))
register(SlideFormat("zeiss", (".czi",)))
register(SlideFormat("dicom", (".dcm",), _dicom_files))
register(SlideFormat("avs", (".avs",)))
register(SlideFormat("ome-zarr", (".zarr",), _files_below, _open_ome_zarr))
register(SlideFormat("image", (".png", ".jpg", ".jpeg", ".webp")))
