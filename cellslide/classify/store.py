"""What the network said of cells so far, kept on disk, so that a run that was stopped goes on where it was.

`DIR/<slide_id>/.classify/` holds `fingerprint.json` and two arrays by row of the table: `probs.npy` float32 (N, 2K + 1)
with local, global, gate, and `done.npy` uint8 (N,). They are mapped, not held, so a large slide needs no memory; a row
is marked done after it was written.
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
from cellslide.types import Bool, Int64, PathProbs

FOLDER = ".classify"
FINGERPRINT_FILE = "fingerprint.json"


class PartialProbs:
    """Probabilities of N cells over K classes, filled row by row."""

    def __init__(self, folder: Path, probs: np.memmap[Any, Any], done: np.memmap[Any, Any]) -> None:
        self.folder, self._probs, self._done = folder, probs, done
        self.k = (probs.shape[1] - 1) // 2

    @classmethod
    def open(
        cls, slide_folder: Path, fingerprint: Mapping[str, str], n: int, k: int, overwrite: bool = False
    ) -> PartialProbs:
        """Open or begin the store of a slide of `n` cells and `k` classes.

        Raises UsageError, naming the differences, when what is there was made with other settings.
        """
        folder = slide_folder / FOLDER
        if overwrite:
            remove_folder(folder)
        if (folder / FINGERPRINT_FILE).is_file():
            _check(folder / FINGERPRINT_FILE, fingerprint)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            # An empty array cannot be mapped.
            new_array(folder / "probs.npy", np.float32, (max(n, 1), 2 * k + 1))
            new_array(folder / "done.npy", np.uint8, (max(n, 1),))
            write_json(folder / FINGERPRINT_FILE, fingerprint)
        return cls(folder, open_memmap(folder / "probs.npy", "r+"), open_memmap(folder / "done.npy", "r+"))

    @staticmethod
    def is_there(slide_folder: Path) -> bool:
        """Tell whether a slide's folder holds a store that was begun."""
        return (slide_folder / FOLDER / FINGERPRINT_FILE).is_file()

    @staticmethod
    def count_done(slide_folder: Path) -> int:
        """Return how many rows are done in the store of a slide's folder; 0 where there is none."""
        try:
            return int(np.count_nonzero(np.load(slide_folder / FOLDER / "done.npy", mmap_mode="r")))
        except (FileNotFoundError, ValueError):
            return 0

    @staticmethod
    def discard(slide_folder: Path) -> None:
        """Delete the store of a slide's folder, if there is one."""
        remove_folder(slide_folder / FOLDER)

    def missing(self, rows: Int64) -> Int64:
        """Return those of `rows` that are not done."""
        return rows[self._done[rows] == 0]

    def add(self, rows: Int64, probs: PathProbs) -> None:
        """Keep what was said of `rows`."""
        self._probs[rows] = np.concatenate([probs.local, probs.global_, probs.gate[:, None]], axis=1)
        self._probs.flush()
        self._done[rows] = 1
        self._done.flush()

    def block(self, start: int, stop: int) -> tuple[PathProbs, Bool]:
        """Return rows [start, stop), NaN where nothing is known, and which are known."""
        known = np.asarray(self._done[start:stop] == 1)
        values = np.where(known[:, None], self._probs[start:stop], np.float32(np.nan))
        return PathProbs(values[:, : self.k], values[:, self.k : -1], values[:, -1]), known

    def remove(self) -> None:
        """Delete the store; called when the slide is complete."""
        del self._probs, self._done
        remove_folder(self.folder)


def _check(path: Path, fingerprint: Mapping[str, str]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SlideError(f"{path}: damaged ({error}); --overwrite types the slide anew") from error
    if words := differences(found, fingerprint):
        raise UsageError(f"{path.parent.parent}: typed before in part with other settings ({words}); --overwrite")
