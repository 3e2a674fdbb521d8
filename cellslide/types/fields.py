"""What was measured of the squares of the plane that the network saw."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cellslide.types.arrays import Float32, Int32, check_lengths

FIELD_MEASURES = (
    "tissue", "blur", "blocks", "density", "contrast", "haematoxylin_r", "haematoxylin_g", "haematoxylin_b",
    "eosin_r", "eosin_g", "eosin_b", "depth", "ink", "dark", "nuclei", "dense_eosin",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fields:
    """Squares of the plane as the network saw them, N of them, and what was measured of each.

    place   int32 (N, 2), column and row in the lattice that covers the plane.
    values  float32 (N, M), a column for each of FIELD_MEASURES:
    tissue     share of the pixels that are stained.
    blur       Crete's measure, 0 is sharp, 1 is not; NaN where the field is too even to tell.
    blocks     steps at the borders of JPEG blocks over those elsewhere, NaN where the plane does not show blocks.
    density    mean optical density of stained pixels; `contrast` its standard deviation.
    haematoxylin_*, eosin_*  optical density (red, green, blue; length 1) of the pixels that stand for the stain.
    depth      log of the optical density of haematoxylin's pixels over that of eosin's; nuclei are the darker.
    ink, dark  share of pixels of a pen's colour, and of pixels too dark for any stain.
    nuclei, dense_eosin  share of pixels as nuclei absorb, and as keratin and blood do.
    """

    place: Int32
    values: Float32

    def __post_init__(self) -> None:
        check_lengths(self, len(self.place), ("values",))

    def __len__(self) -> int:
        return len(self.place)

    @classmethod
    def of(cls, parts: Iterable[Fields]) -> Fields:
        """Return the fields of all parts, in the order of the lattice whatever the order of the parts."""
        found = list(parts)
        place = np.concatenate([np.zeros((0, 2), np.int32), *(part.place for part in found)])
        values = np.concatenate([np.zeros((0, len(FIELD_MEASURES)), np.float32), *(part.values for part in found)])
        order = np.lexsort((place[:, 0], place[:, 1]))
        return cls(place[order], values[order])

    def column(self, name: str) -> Float32:
        """Return one measure (N,)."""
        return self.values[:, FIELD_MEASURES.index(name)]

    def vectors(self, stain: str) -> Float32:
        """Return the vectors (N, 3) of "haematoxylin" or "eosin"."""
        first = FIELD_MEASURES.index(f"{stain}_r")
        return self.values[:, first : first + 3]
