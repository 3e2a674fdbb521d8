"""Finished tiles on disk, so that an interrupted slide goes on where it stopped.

`DIR/<slide_id>/.parts/` holds `fingerprint.json` and files `part-*.npz` of a run of tiles each: typed columns of
`Cells` (level-0 frame, before the merge), no pickles. A part is written beside its place and renamed: one that is there
is whole.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.errors import SlideError, StaleError
from cellslide.store.atomic import beside, remove_folder
from cellslide.store.run_record import FINGERPRINT_FILE, changed_since, write_fingerprint
from cellslide.types import Cells, Fields, concat

PARTS_FOLDER = ".parts"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TilePart:
    """What one tile gave: its cells (None when there are none), nuclei before the own-box rule, and why it failed.

    fields  what was measured of its pixels.
    """

    tile_index: int
    cells: Cells | None
    n_raw: int
    error: str | None = None
    fields: Fields | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    n_raw: int
    n_cells: int
    error: str | None


class Parts:
    """The finished tiles of one slide, by tile index; a tile that was done again is taken from the later file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[int, _Entry] = {}
        self._next = 0

    @classmethod
    def open(cls, slide_folder: Path, fingerprint: Mapping[str, str], overwrite: bool = False) -> Parts:
        """Open or begin the parts of a slide.

        Raises StaleError, naming the differences, when the finished tiles come from other settings.
        """
        folder = slide_folder / PARTS_FOLDER
        # Parts that nothing says the settings of would be taken for those of this run.
        if overwrite or not (folder / FINGERPRINT_FILE).exists():
            remove_folder(folder)
            write_fingerprint(folder, fingerprint)
        elif words := _changed_or_gone(folder, fingerprint):
            raise StaleError(f"{slide_folder}: finished tiles come from another run ({words}); --overwrite starts anew")
        parts = cls(folder)
        parts._scan()
        return parts

    def _scan(self) -> None:
        for scratch in self.folder.glob(".*.tmp"):
            scratch.unlink()
        for path in sorted(self.folder.glob("part-*.npz")):
            try:
                self._next = max(self._next, int(path.stem.split("-")[1]) + 1)
                self._enter(path, _checked_index(path))
            except (OSError, ValueError, KeyError, EOFError, TypeError, zlib.error, zipfile.BadZipFile) as error:
                log.warning("%s is damaged (%s); its tiles are done again", path, error)
                path.unlink()

    def _enter(self, path: Path, index: list[tuple[int, int, int, str]]) -> None:
        for tile, n_raw, n_cells, error in index:
            self._entries[tile] = _Entry(path, n_raw, n_cells, error or None)

    def add(self, results: Sequence[TilePart]) -> None:
        """Write a run of tiles as one file."""
        if not results:
            return
        path = self.folder / f"part-{self._next:08d}.npz"
        with beside(path) as scratch, scratch.open("wb") as stream:
            np.savez(stream, **_columns(results))
        self._next += 1
        self._enter(path, [(r.tile_index, r.n_raw, _n_cells(r), r.error or "") for r in results])

    def done(self) -> set[int]:
        """Return the tiles that are finished; failed ones are not."""
        return {tile for tile, entry in self._entries.items() if entry.error is None}

    def failed(self) -> dict[int, str]:
        """Return the tiles that failed, with why, in tile order."""
        return {t: e.error for t, e in sorted(self._entries.items()) if e.error is not None}

    @property
    def n_raw(self) -> int:
        """Nuclei found in all tiles, before the merge."""
        return sum(e.n_raw for e in self._entries.values())

    @property
    def n_empty(self) -> int:
        """Finished tiles without a nucleus."""
        return sum(e.n_raw == 0 and e.error is None for e in self._entries.values())

    def stream(self, tile_indices: Iterable[int]) -> Iterator[Cells]:
        """Yield the cells of each given tile that has any, in that order; one file is held at a time."""
        held: tuple[Path, Cells] | None = None
        for tile in tile_indices:
            entry = self._entries.get(tile)
            if entry is None or entry.n_cells == 0:
                continue
            if held is None or held[0] != entry.path:
                held = (entry.path, _read_cells(entry.path))
            yield held[1].take(held[1].tile_index == tile)

    def fields(self) -> Fields:
        """Return the fields of all tiles."""
        found = []
        for path in sorted({entry.path for entry in self._entries.values()}):
            with np.load(path, allow_pickle=False) as arrays:
                tile = np.repeat(arrays["tile"], arrays["n_fields"])
                place, values = arrays["fields.place"], arrays["fields.values"]
            # A tile that was done again is taken from the later file.
            here = np.array([t for t, entry in self._entries.items() if entry.path == path], np.int64)
            rows = np.isin(tile, here)
            found.append(Fields(place[rows], values[rows]))
        return Fields.of(found)

    def remove(self) -> None:
        """Delete the folder; called when the slide is complete."""
        remove_folder(self.folder)


def _changed_or_gone(folder: Path, fingerprint: Mapping[str, str]) -> str:
    """Return in words where the settings of kept tiles differ; where they cannot be read, all begins anew."""
    try:
        return changed_since(folder, fingerprint, "starts the slide anew")
    except SlideError as error:
        log.warning("%s; the tiles that were kept are done again", str(error).partition("; --overwrite")[0])
        remove_folder(folder)
        write_fingerprint(folder, fingerprint)
        return ""


def _n_cells(result: TilePart) -> int:
    return 0 if result.cells is None else len(result.cells)


def _columns(results: Sequence[TilePart]) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "tile": np.array([r.tile_index for r in results], np.int64),
        "n_raw": np.array([r.n_raw for r in results], np.int64),
        "n_cells": np.array([_n_cells(r) for r in results], np.int64),
        "error": np.array([r.error or "" for r in results], np.str_),
    }
    looked = [Fields.of([]) if r.fields is None else r.fields for r in results]
    columns["n_fields"] = np.array(list(map(len, looked)), np.int64)
    columns["fields.place"] = np.concatenate([fields.place for fields in looked])
    columns["fields.values"] = np.concatenate([fields.values for fields in looked])
    found = [r.cells for r in results if r.cells is not None and len(r.cells)]
    if found:
        cells = concat(found)
        named = {f.name: getattr(cells, f.name) for f in fields(Cells)}
        columns |= {f"cells.{name}": column for name, column in named.items() if column is not None}
    return columns


def _read_index(path: Path) -> list[tuple[int, int, int, str]]:
    with np.load(path, allow_pickle=False) as arrays:
        lists = [arrays[name].tolist() for name in ("tile", "n_raw", "n_cells", "error")]
        if len(arrays["fields.values"]) != int(arrays["n_fields"].sum()):
            raise ValueError("it holds another number of fields than it says")
    return list(zip(*lists, strict=True))


def _checked_index(path: Path) -> list[tuple[int, int, int, str]]:
    """Return the index of a part of which every byte is as it was written, by the checksums that it carries."""
    with zipfile.ZipFile(path) as packed:
        if (damaged := packed.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} differs")
    index = _read_index(path)
    cells = sum(n_cells for _, _, n_cells, _ in index)
    if cells and len(_read_cells(path)) != cells:
        raise ValueError("it holds another number of cells than it says")
    return index


def _read_cells(path: Path) -> Cells:
    with np.load(path, allow_pickle=False) as arrays:
        names = [name for name in arrays.files if name.startswith("cells.")]
        return Cells(**{name.removeprefix("cells."): arrays[name] for name in names})
