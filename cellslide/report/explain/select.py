"""Which cells of a finished table to explain, and what the table says of them; no network here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cellslide.errors import UsageError
from cellslide.store.anndata_columns import Column
from cellslide.store.cell_table import Categorical, CellTable
from cellslide.types import Float32, Float64, Int64

BLOCK_ROWS = 65_536
NEEDED = ("class", "class_top", "class_prob", "gate", "path", "organ")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which cells to explain.

    kind    "cells": those of `ids` (cell_id or uuid), in that order. "uncertain": the `n` typed cells of lowest
            class_prob. "disagree": the `n` whose paths name different classes, the surest first: by the smaller of
            both paths' top probabilities. Equal ones go by cell_id.
    """

    kind: Literal["cells", "uncertain", "disagree"]
    n: int = 0
    ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind != "cells" and self.n < 1:
            raise UsageError(f"--{self.kind} {self.n}: must be at least 1")

    def in_words(self) -> str:
        """Return how the cells were chosen, as the page says it."""
        if self.kind == "cells":
            return "Cells asked for by id."
        if self.kind == "uncertain":
            return "Cells of lowest probability of their class (calibrated), the least sure first."
        return (
            "Cells whose paths name different classes, by the smaller of both paths' top probabilities: first "
            "the cells where both are surest."
        )


def select_cells(table: CellTable, selection: Selection) -> Int64:
    """Return rows of the table, in the order of the selection; cells that were not typed are left out.

    Raises UsageError for ids that are not there and for a table without the columns of `classify`.
    """
    missing = [name for name in NEEDED if name not in table.columns]
    if missing or "prob_local" not in table.matrices:
        names = ", ".join(missing or ["prob_local"])
        raise UsageError(f"{table.path}: no column {names}; run `cellslide classify {table.path.parent}` first")
    if selection.kind == "cells":
        return _rows_of(table, selection.ids)
    return top_rows(table, doubt if selection.kind == "uncertain" else disagreement, selection.n)


def top_rows(table: CellTable, measure: Callable[[CellTable, int, int], Float64], n: int) -> Int64:
    """Return the `n` rows of the highest `measure` of rows [start, stop), the highest first; NaN is none of them."""
    rows, values = np.empty(0, np.int64), np.empty(0)
    for start in range(0, len(table), BLOCK_ROWS):
        found = measure(table, start, min(start + BLOCK_ROWS, len(table)))
        keep = np.flatnonzero(np.isfinite(found))
        rows, values = np.concatenate([rows, keep + start]), np.concatenate([values, found[keep]])
        order = np.lexsort((rows, -values))[:n]
        rows, values = rows[order], values[order]
    return rows


def _rows_of(table: CellTable, ids: Sequence[str]) -> Int64:
    """Return the rows of ids, each a cell_id or the uuid of the GeoJSON."""
    by_uuid: dict[str, int] = {}
    if not all(word.isdigit() for word in ids):
        by_uuid = {str(uuid): row for row, uuid in enumerate(table.vector("uuid"))}
    cell_id = np.asarray(table.vector("cell_id"))
    row_of = dict(zip(cell_id.tolist(), range(len(cell_id)), strict=True))
    rows = [row_of.get(int(word)) if word.isdigit() else by_uuid.get(word) for word in ids]
    unknown = [word for word, row in zip(ids, rows, strict=True) if row is None]
    if unknown:
        raise UsageError(f"--cells {', '.join(unknown[:5])}: no such cell among the {len(table):,} of {table.path}")
    found = np.array(rows, np.int64)
    typed = np.array([np.isfinite(table.matrix("prob_local", r, r + 1)).all() for r in found.tolist()], bool)
    if not typed.all():
        log.warning("%d of the cells asked for were not typed and are left out", (~typed).sum())
    chosen: Int64 = found[typed]
    return chosen


def doubt(table: CellTable, start: int, stop: int) -> Float64:
    """Return how unsure each decision is, 1 - class_prob; NaN for cells that were not typed."""
    return 1.0 - np.asarray(table.vector("class_prob", start, stop), np.float64)


def disagreement(table: CellTable, start: int, stop: int) -> Float64:
    """Return how sure both paths are of different classes; NaN where they agree or one did not run."""
    local, global_ = (np.asarray(table.matrix(name, start, stop)) for name in ("prob_local", "prob_global"))
    both = np.isfinite(local).all(axis=1) & np.isfinite(global_).all(axis=1)
    differ = np.nan_to_num(local).argmax(axis=1) != np.nan_to_num(global_).argmax(axis=1)
    return np.where(both & differ, np.minimum(local.max(axis=1), global_.max(axis=1)), np.nan)


@dataclass(frozen=True, slots=True)
class Typed:
    """Cells of a table as `classify` left them, N rows; columns as in the table.

    outline_xy   level-0 vertices (P, 2) of each, or None where the table holds points.
    """

    cell_id: Int64
    uuid: tuple[str, ...]
    xy: Float64
    class_name: tuple[str, ...]
    class_top: tuple[str, ...]
    class_prob: Float32
    gate: Float32
    path: tuple[str, ...]
    organ: tuple[str, ...]
    prob: Float32
    local: Float32
    global_: Float32
    outline_xy: tuple[Float64 | None, ...]

    def __len__(self) -> int:
        return len(self.cell_id)


def read_typed(table: CellTable, rows: Int64) -> Typed:
    """Read a few rows of a table, in the order given."""
    where = rows.tolist()
    obs = {
        name: [_value(table.column(name, r, r + 1)) for r in where] for name in ("cell_id", "uuid", "x", "y", *NEEDED)
    }
    prob, local, global_ = (
        np.concatenate([table.matrix(name, r, r + 1) for r in where]) for name in ("prob", "prob_local", "prob_global")
    )
    rings = [table.rings(r, r + 1) for r in where]
    return Typed(
        cell_id=np.array(obs["cell_id"], np.int64),
        uuid=tuple(map(str, obs["uuid"])),
        xy=np.stack([obs["x"], obs["y"]], axis=1).astype(np.float64),
        class_name=tuple(map(str, obs["class"])),
        class_top=tuple(map(str, obs["class_top"])),
        class_prob=np.array(obs["class_prob"], np.float32),
        gate=np.array(obs["gate"], np.float32),
        path=tuple(map(str, obs["path"])),
        organ=tuple(map(str, obs["organ"])),
        prob=prob,
        local=local,
        global_=global_,
        outline_xy=tuple(None if ring is None or not len(ring[0]) else ring[0] for ring in rings),
    )


def _value(column: Column) -> Any:
    """Return the one value of a column of one row; "" where a word is missing."""
    if isinstance(column, Categorical):
        code = int(column.codes[0])
        return column.names[code] if code >= 0 else ""
    return column[0]
