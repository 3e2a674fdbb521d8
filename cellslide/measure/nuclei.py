"""The nuclei of a table as they are measured: places in µm, decided class, area."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cellslide.store.cell_table import BLOCK_ROWS, CellTable
from cellslide.store.table_schema import ABSTAINED, NOT_NUCLEUS
from cellslide.types import Bool, Float32, Float64, Int64

# What a table calls a kind of nucleus; case does not matter.
KINDS = {
    "tumour": ("epithelial", "tumor_epithelial", "neoplastic", "tumour", "tumor", "epithelial_malignant"),
    "lymphocyte": ("lymphocyte", "inflammatory", "immune", "lymphocytes"),
    "stroma": ("stromal", "stroma", "connective", "spindle_shaped", "fibroblast"),
}
UNTYPED = -1


@dataclass(frozen=True, slots=True)
class Nuclei:
    """N nuclei, rejected objects left out.

    um     centroids (N, 2) in µm from the corner of level 0.
    code   int64 (N,) index into `classes`, `len(classes)` where the classifier abstained, UNTYPED where none was asked.
    area   float32 (N,) µm², 0 where nuclei are points.
    top    int64 (N,) index of the most probable class, also of those that abstained; UNTYPED where none is a nucleus's.
    """

    um: Float64
    code: Int64
    area: Float32
    classes: tuple[str, ...]
    top: Int64

    def __len__(self) -> int:
        return len(self.um)

    def of(self, rows: Bool) -> Nuclei:
        """Return some of the nuclei."""
        return Nuclei(self.um[rows], self.code[rows], self.area[rows], self.classes, self.top[rows])

    def counts(self) -> Int64:
        """Return the nuclei by class and, last, those that abstained, int64 (K + 1,)."""
        return np.bincount(self.code[self.code >= 0], minlength=len(self.classes) + 1).astype(np.int64)

    def named(self) -> Int64:
        """Return the nuclei by their most probable class, int64 (K,)."""
        return np.bincount(self.top[self.top >= 0], minlength=len(self.classes)).astype(np.int64)

    def kind(self, name: str) -> int | None:
        """Return the class that is a kind of `KINDS`, None where there is none."""
        found = [k for k, c in enumerate(self.classes) if c.casefold() in KINDS[name]]
        return found[0] if found else None


def read_nuclei(table: CellTable, with_artefacts: bool) -> Nuclei:
    """Return the nuclei of a table; those in regions that are no clean tissue only where they are asked for."""
    names = tuple(name for name in table.class_names if name != NOT_NUCLEUS)
    decisions = table.decisions
    lookup = np.array(
        [names.index(d) if d in names else len(names) if d == ABSTAINED else UNTYPED for d in decisions] + [UNTYPED]
    )
    tops = np.array([names.index(name) if name in names else UNTYPED for name in table.class_names] + [UNTYPED])
    parts = []
    size_um = np.array([table.slide.mpp_x, table.slide.mpp_y])
    for start in range(0, len(table), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(table))
        keep = np.asarray(table.vector("is_nucleus", start, stop), np.bool_)
        if not with_artefacts:
            keep &= ~np.asarray(table.vector("in_artefact", start, stop), np.bool_)
        xy = np.stack([table.vector(name, start, stop) for name in "xy"], axis=1).astype(np.float64)
        code = lookup[table.codes("class", start, stop)]
        top = tops[table.codes("class_top", start, stop)]
        area = np.asarray(table.vector("area_um2", start, stop), np.float32)
        parts.append((xy[keep] * size_um, code[keep], area[keep], top[keep]))
    if not parts:
        none = np.empty(0, np.int64)
        return Nuclei(np.empty((0, 2)), none, np.empty(0, np.float32), names, none)
    um, code, area, top = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Nuclei(um, code.astype(np.int64), area, names, top.astype(np.int64))
