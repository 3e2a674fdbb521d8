"""Vectors of nuclei so far: `DIR/<slide_id>/.embed/vectors.npy`, (N, D)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from cellslide.store.row_checkpoint import PartialRows
from cellslide.types import Float32


class PartialVectors(PartialRows):
    """Vectors of N nuclei, filled row by row."""

    folder_name, values_file = ".embed", "vectors.npy"
    before, anew = "read before", "reads the nuclei anew"

    @classmethod
    def open(
        cls, slide_folder: Path, fingerprint: Mapping[str, str], n: int, dim: int, overwrite: bool = False
    ) -> Self:
        """Open or begin the store of `n` nuclei; raises UsageError where what is there was made with other settings."""
        return cls._open(slide_folder, fingerprint, n, dim, overwrite)

    def block(self, start: int, stop: int) -> Float32:
        """Return rows [start, stop), NaN where nothing is known."""
        return self.rows(start, stop)[0]
