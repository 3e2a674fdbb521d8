"""What stands in a slide's folder, with size and CRC, as `run.json` lists it; and what differs from that list."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cellslide.errors import CellslideError
from cellslide.store.foreign_files import read_json

# What runs write and only runs change; pages and marks of others are not listed.
PATTERNS = ("cells.*", "tissue.geojson", "labels.ome.zarr", "embedding.*")
RUN_FILE = "run.json"
KEY = "files"
_BLOCK = 1 << 20


def listed(folder: Path) -> list[dict[str, Any]]:
    """Return name, bytes and CRC-32 of every result in a folder; of a store those of all of its files together."""
    found = sorted({path for pattern in PATTERNS for path in folder.glob(pattern)})
    return [{"name": path.name, **_described(path)} for path in found if not _is_scratch(path.name)]


def changed_sizes(folder: Path) -> list[str]:
    """Return the names of listed results that are gone or have another size; nothing is read but sizes."""
    said = _said(folder)
    return [name for name, entry in said.items() if _size(folder / name) != entry.get("bytes")]


def changed_bytes(folder: Path, but: Sequence[str] = ()) -> list[str]:
    """Return in words what differs from the list; everything that is listed is read, `but` for these names."""
    words = []
    for name, entry in _said(folder).items():
        path = folder / name
        if name in but:
            continue
        if not path.exists():
            words.append(f"{name}: is gone")
        elif strange := _not_plain(path):
            words.append(f"{name}: {strange.relative_to(folder)} is not a plain file")
        elif (there := _described(path)) != entry:
            words.append(f"{name}: {there['bytes']:,} bytes, CRC {there['crc32']}; listed are {_in_words(entry)}")
    return words


def _in_words(entry: dict[str, Any]) -> str:
    size = entry.get("bytes")
    return f"{size:,} bytes, CRC {str(entry.get('crc32'))[:8]}" if isinstance(size, int) else "no numbers"


def _said(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the list of a folder's `run.json`, nothing where there is none; a name in it leads nowhere else."""
    try:
        content = read_json(folder / RUN_FILE).get(KEY)
    except (OSError, CellslideError, AttributeError):
        return {}
    if not isinstance(content, list):
        return {}
    entries = [dict(entry) for entry in content if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
    plain = {entry.pop("name"): entry for entry in entries}
    return {
        name: entry for name, entry in plain.items()
        if name not in ("", ".", "..") and "/" not in name and "\0" not in name
    }  # fmt: skip


def _is_scratch(name: str) -> bool:
    return ".tmp" in name or ".old-" in name


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    below = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return sorted(below, key=lambda file: file.relative_to(path).as_posix())


def _not_plain(path: Path) -> Path | None:
    """Return the first file that is no plain one: a pipe would be waited for, a link may lead elsewhere."""
    return next((f for f in _files(path) if not stat.S_ISREG((f.stat() if f == path else f.lstat()).st_mode)), None)


def _size(path: Path) -> int | None:
    return sum(file.lstat().st_size for file in _files(path)) if path.exists() else None


def _described(path: Path) -> dict[str, Any]:
    size, crc = 0, 0
    for file in _files(path):
        if path.is_dir():
            crc = zlib.crc32(f"{file.relative_to(path).as_posix()}\n".encode("utf-8", "surrogateescape"), crc)
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                size, crc = size + len(block), zlib.crc32(block, crc)
    return {"bytes": size, "crc32": f"{crc:08x}"}
