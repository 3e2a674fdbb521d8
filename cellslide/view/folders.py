"""What may be looked at: slides' folders and files that lie inside the folder that was given, links followed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from cellslide.errors import UsageError
from cellslide.store.run_record import TABLE

# Files that a link of a page may lead to; everything else stays unserved.
SERVED = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".geojson": "application/geo+json",
    ".csv": "text/csv; charset=utf-8",
    ".png": "image/png",
}

log = logging.getLogger(__name__)


def is_inside(root: Path, path: Path) -> bool:
    """Tell whether a path, with every link on it followed, lies in `root` (itself resolved)."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def find_slides(root: Path) -> Mapping[str, Path]:
    """Return the folders with a cell table by name: `root` itself, or those right below it, in the order of names.

    Folders that a link leads to outside of `root` are left out. Raises UsageError where there is none.
    """
    if (root / TABLE).is_dir() and is_inside(root, root / TABLE):
        return {root.name: root}
    found: dict[str, Path] = {}
    for table in sorted(root.glob(f"*/{TABLE}")):
        if is_inside(root, table):
            found[table.parent.name] = table.parent
        else:
            log.warning("%s leads out of %s and is left out", table, root)
    if not found:
        raise UsageError(f"{root}: no {TABLE} in it or one level below; run `cellslide segment -o {root}` first")
    return found


def check_links(root: Path, folder: Path) -> None:
    """Raise UsageError where `folder`, or anything in it, is a link that leads out of `root`."""
    if not is_inside(root, folder):
        raise UsageError(f"{folder}: leads out of {root}; it is not opened")
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(here, name)
            if path.is_symlink() and not is_inside(root, path):
                raise UsageError(f"{path}: a link that leads out of {root}; such a table is not opened")


def served_file(root: Path, name: str) -> tuple[Path, str] | None:
    """Return a file below `root` and its content type, or None where it may not or cannot be served."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        return None
    path = root.joinpath(*parts)
    kind = SERVED.get(path.suffix.lower())
    if kind is None or not is_inside(root, path) or not path.is_file():
        return None
    return path.resolve(), kind
