"""What the network said of cells so far: `DIR/<slide_id>/.classify/probs.npy`, (N, 2K + 1) of local, global, gate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from cellslide.store.row_checkpoint import PartialRows
from cellslide.types import Bool, Int64, PathProbs

FOLDER = ".classify"


class PartialProbs(PartialRows):
    """Probabilities of N cells over K classes, filled row by row."""

    folder_name, values_file = FOLDER, "probs.npy"
    before, anew = "typed before", "types the slide anew"

    @classmethod
    def open(cls, slide_folder: Path, fingerprint: Mapping[str, str], n: int, k: int, overwrite: bool = False) -> Self:
        """Open or begin the store of a slide of `n` cells and `k` classes.

        Raises UsageError, naming the differences, when what is there was made with other settings.
        """
        return cls._open(slide_folder, fingerprint, n, 2 * k + 1, overwrite)

    def add(self, rows: Int64, probs: PathProbs) -> None:
        """Keep what was said of `rows`."""
        self.put(rows, np.concatenate([probs.local, probs.global_, probs.gate[:, None]], axis=1))
        self.flush()

    def block(self, start: int, stop: int) -> tuple[PathProbs, Bool]:
        """Return rows [start, stop), NaN where nothing is known, and which are known."""
        values, known = self.rows(start, stop)
        k = values.shape[1] // 2
        return PathProbs(values[:, :k], values[:, k:-1], values[:, -1]), known
