"""Rows of numbers about cells, kept on disk as they come, so that a run that was stopped goes on where it was.

A folder of the slide's holds `fingerprint.json` and two arrays by row of the table: values float32 (N, W) and
`done.npy` uint8 (N,). They are mapped, not held, so a large slide needs no memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.lib.format import open_memmap

from cellslide.errors import SlideError, UsageError, short
from cellslide.store.atomic import new_array, remove_folder, write_json
from cellslide.store.foreign_files import read_json
from cellslide.store.run_record import FINGERPRINT_FILE, changed_since
from cellslide.types import Bool, Float32, Int64

DONE_FILE = "done.npy"

log = logging.getLogger(__name__)


class PartialRows:
    """Values of N cells, filled row by row in any order.

    Kinds say their folder and file, what was done of their cells before, and what --overwrite does.
    """

    folder_name: ClassVar[str]
    values_file: ClassVar[str]
    before: ClassVar[str]
    anew: ClassVar[str]

    def __init__(self, folder: Path, values: np.memmap[Any, Any], done: np.memmap[Any, Any]) -> None:
        self.folder, self._values, self._done = folder, values, done
        self._written: list[Int64] = []

    @classmethod
    def _open(
        cls, slide_folder: Path, fingerprint: Mapping[str, str], n: int, width: int, overwrite: bool = False
    ) -> Self:
        """Open or begin the store of `n` cells with `width` numbers each.

        Raises UsageError, naming the differences, when what is there was made with other settings.
        """
        folder = slide_folder / cls.folder_name
        if overwrite:
            remove_folder(folder)
        if not (folder / FINGERPRINT_FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            # An empty array cannot be mapped.
            new_array(folder / cls.values_file, np.float32, (max(n, 1), width))
            new_array(folder / DONE_FILE, np.uint8, (max(n, 1),))
            write_json(folder / FINGERPRINT_FILE, fingerprint)
        else:
            try:
                words = changed_since(folder, fingerprint, cls.anew)
                store = cls._mapped(folder, max(n, 1), width)
            except (SlideError, OSError, ValueError, EOFError) as error:
                log.warning("%s: what was kept is damaged (%s) and done again", folder, short(error))
                return cls._open(slide_folder, fingerprint, n, width, overwrite=True)
            if words and _of_other_cells(folder, fingerprint):
                log.info("%s: kept for cells that have changed since; done again", folder)
                del store
                return cls._open(slide_folder, fingerprint, n, width, overwrite=True)
            if words:
                raise UsageError(f"{slide_folder}: {cls.before} in part with other settings ({words}); --overwrite")
            return store
        return cls._mapped(folder, max(n, 1), width)

    @classmethod
    def _mapped(cls, folder: Path, n: int, width: int) -> Self:
        """Map the two arrays; raises ValueError where they are not of `n` rows."""
        values, done = (open_memmap(folder / name, "r+") for name in (cls.values_file, DONE_FILE))
        if values.shape != (n, width) or done.shape != (n,) or values.dtype != np.float32 or done.dtype != np.uint8:
            raise ValueError(f"arrays of {values.shape} and {done.shape}, expected {n} rows of {width}")
        return cls(folder, values, done)

    @classmethod
    def is_there(cls, slide_folder: Path) -> bool:
        """Tell whether a slide's folder holds a store that was begun."""
        return (slide_folder / cls.folder_name / FINGERPRINT_FILE).is_file()

    @classmethod
    def count_done(cls, slide_folder: Path) -> int:
        """Return how many rows are done in the store of a slide's folder; 0 where there is none."""
        try:
            return int(np.count_nonzero(np.load(slide_folder / cls.folder_name / DONE_FILE, mmap_mode="r")))
        except (FileNotFoundError, ValueError):
            return 0

    @classmethod
    def discard(cls, slide_folder: Path) -> None:
        """Delete the store of a slide's folder, if there is one."""
        remove_folder(slide_folder / cls.folder_name)

    @property
    def width(self) -> int:
        """Numbers a row."""
        return int(self._values.shape[1])

    def missing(self, rows: Int64) -> Int64:
        """Return those of `rows` that are not done."""
        return rows[self._done[rows] == 0]

    def put(self, rows: Int64, values: Float32) -> None:
        """Take the values (n, W) of `rows`; they count as done from the next `flush` on."""
        self._values[rows] = values
        self._written.append(rows)

    def flush(self) -> None:
        """Write what was taken to the disk, and then that it is done: a row that is done holds its values."""
        self._values.flush()
        for rows in self._written:
            self._done[rows] = 1
        self._written.clear()
        self._done.flush()

    def rows(self, start: int, stop: int) -> tuple[Float32, Bool]:
        """Return rows [start, stop), NaN where nothing is known, and which are known."""
        known = np.asarray(self._done[start:stop] == 1)
        return np.asarray(np.where(known[:, None], self._values[start:stop], np.float32(np.nan)), np.float32), known

    def remove(self) -> None:
        """Delete the store; called when the slide is complete."""
        del self._values, self._done
        remove_folder(self.folder)


def _of_other_cells(folder: Path, fingerprint: Mapping[str, str]) -> bool:
    """Tell whether the cells are not those that a store was begun for, whatever its settings."""
    kept = read_json(folder / FINGERPRINT_FILE)
    return any(kept.get(name) != value for name, value in fingerprint.items() if name.startswith("cells."))
