"""Rows of numbers about cells, kept on disk as they come, so that a run that was stopped goes on where it was.

A folder of the slide's holds `fingerprint.json` and two arrays by row of the table: values float32 (N, W) and
`checks.npy` uint64 (N,), which is 0 for a row that is not done, else a checksum of its values. They are mapped, not
held, so a large slide needs no memory. Rows whose checksum differs when they are opened are done again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from cellslide.errors import SlideError, StaleError, short
from cellslide.store.atomic import new_array, remove_folder
from cellslide.store.foreign_files import read_json
from cellslide.store.run_record import FINGERPRINT_FILE, changed_since, write_fingerprint
from cellslide.types import Bool, Float32, Int64

CHECKS_FILE = "checks.npy"
BLOCK_BYTES = 16 << 20
_DONE = np.uint64(1 << 63)

log = logging.getLogger(__name__)


class PartialRows:
    """Values of N cells, filled row by row in any order.

    Kinds say their folder and file, what was done of their cells before, and what --overwrite does.
    """

    folder_name: ClassVar[str]
    values_file: ClassVar[str]
    before: ClassVar[str]
    anew: ClassVar[str]

    def __init__(self, folder: Path, values: np.memmap[Any, Any], checks: np.memmap[Any, Any]) -> None:
        self.folder, self._values, self._checks = folder, values, checks
        self._written: list[Int64] = []

    @classmethod
    def _open(
        cls, slide_folder: Path, fingerprint: Mapping[str, str], n: int, width: int, overwrite: bool = False
    ) -> Self:
        """Open or begin the store of `n` cells with `width` numbers each.

        Raises StaleError, naming the differences, when what is there was made with other settings.
        """
        folder = slide_folder / cls.folder_name
        if overwrite:
            remove_folder(folder)
        if not (folder / FINGERPRINT_FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            # An empty array cannot be mapped.
            new_array(folder / cls.values_file, np.float32, (max(n, 1), width))
            new_array(folder / CHECKS_FILE, np.uint64, (max(n, 1),))
            write_fingerprint(folder, fingerprint)
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
                raise StaleError(f"{slide_folder}: {cls.before} in part with other settings ({words}); --overwrite")
            store._drop_damaged()
            return store
        return cls._mapped(folder, max(n, 1), width)

    @classmethod
    def _mapped(cls, folder: Path, n: int, width: int) -> Self:
        """Map the two arrays; raises ValueError where they are not of `n` rows."""
        values, checks = (open_memmap(folder / name, "r+") for name in (cls.values_file, CHECKS_FILE))
        kinds = values.dtype == np.float32 and checks.dtype == np.uint64
        if values.shape != (n, width) or checks.shape != (n,) or not kinds:
            raise ValueError(f"arrays of {values.shape} and {checks.shape}, expected {n} rows of {width}")
        return cls(folder, values, checks)

    def _drop_damaged(self) -> None:
        """Take rows that are not as they were written for not done."""
        step, n_damaged = max(BLOCK_BYTES // (4 * self.width), 1), 0
        for start in range(0, len(self._checks), step):
            checks = self._checks[start : start + step]
            rows = np.flatnonzero(checks != 0)
            damaged = rows[checks[rows] != _checksums(self._values[start : start + step][rows])]
            checks[damaged] = 0
            n_damaged += len(damaged)
        if n_damaged:
            log.warning("%s: %d rows that were kept are damaged and done again", self.folder, n_damaged)
            self._checks.flush()

    @classmethod
    def is_there(cls, slide_folder: Path) -> bool:
        """Tell whether a slide's folder holds a store that was begun."""
        return (slide_folder / cls.folder_name / FINGERPRINT_FILE).is_file()

    @classmethod
    def count_done(cls, slide_folder: Path) -> int:
        """Return how many rows are done in the store of a slide's folder; 0 where there is none."""
        try:
            return int(np.count_nonzero(np.load(slide_folder / cls.folder_name / CHECKS_FILE, mmap_mode="r")))
        except (OSError, ValueError, EOFError):
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
        missing: Int64 = rows[self._checks[rows] == 0]
        return missing

    def put(self, rows: Int64, values: Float32) -> None:
        """Take the values (n, W) of `rows`; they count as done from the next `flush` on."""
        self._values[rows] = values
        self._written.append(rows)

    def flush(self) -> None:
        """Write what was taken to the disk, and then that it is done: a row that is done holds its values."""
        self._values.flush()
        for rows in self._written:
            self._checks[rows] = _checksums(self._values[rows])
        self._written.clear()
        self._checks.flush()

    def rows(self, start: int, stop: int) -> tuple[Float32, Bool]:
        """Return rows [start, stop), NaN where nothing is known, and which are known."""
        known = np.asarray(self._checks[start:stop] != 0)
        return np.asarray(np.where(known[:, None], self._values[start:stop], np.float32(np.nan)), np.float32), known

    def remove(self) -> None:
        """Delete the store; called when the slide is complete."""
        del self._values, self._checks
        remove_folder(self.folder)


def _of_other_cells(folder: Path, fingerprint: Mapping[str, str]) -> bool:
    """Tell whether the cells are not those that a store was begun for, whatever its settings."""
    kept = read_json(folder / FINGERPRINT_FILE)
    return any(kept.get(name) != value for name, value in fingerprint.items() if name.startswith("cells."))


def _checksums(values: Float32) -> NDArray[np.uint64]:
    """Return a number other than 0 for each row of values (N, W); one bit that flips anywhere in a row changes it.

    A sum of the values' bits, each times an odd number of its own: what differs in one place cannot come to 0.
    """
    odd = np.random.default_rng(0).integers(0, 1 << 63, values.shape[1], np.uint64) | np.uint64(1)
    sums = (np.ascontiguousarray(values).view(np.uint32).astype(np.uint64) * odd).sum(1, dtype=np.uint64)
    return np.asarray(sums | _DONE, np.uint64)
