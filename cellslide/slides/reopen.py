"""The slide that a table was made from, opened once more: it may have moved, or another may lie in its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cellslide.errors import CellslideError, UsageError
from cellslide.slides.identity import is_slide
from cellslide.slides.readers import open_reader
from cellslide.slides.slide import Slide
from cellslide.store.cell_table import CellTable
from cellslide.store.foreign_files import is_plain


def slide_path(table: CellTable) -> Path:
    """Return where the slide of a table lies: as it was named then, or, seen from another folder, by its full path."""
    typed, full = table.slide.path, Path(str(table.run.slide.get("path") or table.slide.path))
    if not full.is_absolute() or typed == full:
        return typed
    known = table.run.slide.get("sha256_head")
    if is_plain(typed) and (known is None or not is_plain(full) or is_slide(typed, known)):
        return typed
    return full


def reopen(table: CellTable, moved_to: Path | None = None) -> Slide:
    """Open the slide of a table with the pixel size that was used.

    moved_to  where it is now, if it is not where it was.
    Raises UsageError where it is gone or another, SlideError where it cannot be read.
    """
    info = replace(table.slide, path=slide_path(table) if moved_to is None else moved_to)
    if not is_plain(info.path):
        if moved_to is not None:
            raise UsageError(f"--slide {moved_to}: no such file")
        raise UsageError(f"{info.path}: the slide of {table.path} is not there any more; say where it is with --slide")
    known = table.run.slide.get("sha256_head")
    if known is not None and not is_slide(info.path, known):
        raise UsageError(f"{info.path}: not the slide that {table.path} was made from; name that one with --slide")
    reader = open_reader(info.path)
    # An earlier version may have used levels that are not read any more.
    return Slide(reader, replace(info, levels=reader.header.levels))


def reopen_or_why(
    table: CellTable, moved_to: Path | None = None, *, insist: bool = False
) -> tuple[Slide | None, str | None]:
    """Return the slide of a table, or None and in words why it cannot be had.

    insist  a slide that is gone, or another, is no answer but the UsageError that `reopen` raises.
    """
    try:
        return reopen(table, moved_to), None
    except CellslideError as error:
        if insist and isinstance(error, UsageError):
            raise
        return None, str(error)
