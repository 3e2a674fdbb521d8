"""Vectors of nuclei so far, kept on disk, so that a run that was stopped goes on where it was.

`DIR/<slide_id>/.embed/` holds `fingerprint.json`, `vectors.npy` float32 (N, D) and `done.npy` uint8 (N,), by row of the
table. They are mapped, not held; a row is marked done after it was written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from cellslide.errors import SlideError, UsageError
from cellslide.record import differences, write_json
from cellslide.staging import new_array, remove_folder
from cellslide.types import Float32, Int64

FOLDER = ".embed"
FINGERPRINT_FILE = "fingerprint.json"


class PartialVectors:
    """Vectors of N nuclei, filled row by row."""

    def __init__(self, folder: Path, vectors: np.memmap[Any, Any], done: np.memmap[Any, Any]) -> None:
        self.folder, self._vectors, self._done = folder, vectors, done

    @classmethod
    def open(
        cls, slide_folder: Path, fingerprint: Mapping[str, str], n: int, dim: int, overwrite: bool = False
    ) -> PartialVectors:
        """Open or begin the store of `n` nuclei; raises UsageError where what is there was made with other settings."""
        folder = slide_folder / FOLDER
        if overwrite:
            remove_folder(folder)
        if (folder / FINGERPRINT_FILE).is_file():
            _check(folder / FINGERPRINT_FILE, fingerprint)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            # An empty array cannot be mapped.
            new_array(folder / "vectors.npy", np.float32, (max(n, 1), dim))
            new_array(folder / "done.npy", np.uint8, (max(n, 1),))
            write_json(folder / FINGERPRINT_FILE, fingerprint)
        return cls(folder, open_memmap(folder / "vectors.npy", "r+"), open_memmap(folder / "done.npy", "r+"))

    def missing(self, rows: Int64) -> Int64:
        """Return those of `rows` that are not done."""
        return rows[self._done[rows] == 0]

    def add(self, rows: Int64, vectors: Float32) -> None:
        """Keep the vectors of `rows`."""
        self._vectors[rows] = vectors
        self._done[rows] = 1

    def flush(self) -> None:
        """Write what was kept to the disk."""
        self._vectors.flush()
        self._done.flush()

    def block(self, start: int, stop: int) -> Float32:
        """Return rows [start, stop), NaN where nothing is known."""
        known = self._done[start:stop] == 1
        return np.where(known[:, None], self._vectors[start:stop], np.float32(np.nan)).astype(np.float32)

    def remove(self) -> None:
        """Delete the store; called when the slide is complete."""
        del self._vectors, self._done
        remove_folder(self.folder)


def _check(path: Path, fingerprint: Mapping[str, str]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SlideError(f"{path}: damaged ({error}); --overwrite reads the nuclei anew") from error
    if words := differences(found, fingerprint):
        raise UsageError(f"{path.parent.parent}: read before in part with other settings ({words}); --overwrite")
