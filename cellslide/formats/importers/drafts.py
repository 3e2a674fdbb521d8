"""Objects that come one by one gathered into blocks: ids, places, outlines, classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.errors import UsageError
from cellslide.formats.importers.records import NUCLEUS, Block
from cellslide.types import Float64, Int64

BLOCK_ROWS = 5_000
# More than any taxonomy has; the codes of a table hold them.
MOST_CLASSES = 2_000
_UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
NOWHERE = (float("nan"), float("nan"))
Ring = Any  # a list of [x, y] as JSON has it, or float64 (n, 2)


@dataclass(slots=True)
class Draft:
    """One object of a file: an outer ring, or a point (no ring), or nothing usable (neither)."""

    source_id: str
    ring: Ring | None = None
    centroid: tuple[float, float] = NOWHERE
    kind: int = NUCLEUS
    class_name: str = ""
    score: float = float("nan")


class Drafts:
    """Makes blocks of drafts that share a matrix to level-0; `names` counts the classes over all blocks of a file."""

    def __init__(self, names: dict[str, int], to_level0: Float64) -> None:
        self.names, self.to_level0 = names, to_level0
        self.rows: list[Draft] = []

    def add(self, draft: Draft) -> Iterator[Block]:
        """Add one object; yield a block when there are enough."""
        self.rows.append(draft)
        if len(self.rows) >= BLOCK_ROWS:
            yield from self.rest()

    def rest(self) -> Iterator[Block]:
        """Yield what was gathered as a block, if there is anything, and start anew."""
        rows, self.rows = self.rows, []
        if not rows:
            return
        xy, start = flat_rings([row.ring for row in rows])
        codes = [self.names.setdefault(row.class_name, len(self.names)) if row.class_name else -1 for row in rows]
        check_classes(self.names)
        ids = objects([row.source_id for row in rows])
        yield Block(
            ids,
            self.to_level0,
            np.array([row.centroid for row in rows], np.float64),
            xy,
            start,
            np.array([row.kind for row in rows], np.int8),
            np.array(codes, np.int16),
            np.array([row.score for row in rows], np.float32),
            np.full(len(rows), np.nan, np.float32),
            objects([uuid_of(text) for text in ids]),
        )


def check_classes(names: dict[str, int]) -> None:
    """Raise UsageError where what was taken for the class differs from nucleus to nucleus."""
    if len(names) > MOST_CLASSES:
        few = ", ".join(list(names)[:3])[:80]
        raise UsageError(f"--cells: more than {MOST_CLASSES:,} classes ({few}, ...): what it calls a class is none")


def objects(values: list[str]) -> NDArray[Any]:
    """Return texts as a column of objects."""
    column = np.empty(len(values), object)
    column[:] = values
    return column


def uuid_of(text: str) -> str:
    """Return a UUID in canonical form, or "" for any other text."""
    lower = text.lower()
    if not _UUID.fullmatch(lower):
        return ""
    return text if text == lower else lower  # millions of ids: not each twice


def number(value: Any) -> float:
    """Return a JSON value as a number, NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def point(value: Any) -> tuple[float, float]:
    """Return the first two numbers of a JSON array, NaN where it has none."""
    return (number(value[0]), number(value[1])) if isinstance(value, (list, tuple)) and len(value) > 1 else NOWHERE


def flat_rings(rings: list[Ring | None]) -> tuple[Float64, Int64]:
    """Return rings as flat float64 (P, 2) and int64 (N + 1,); None has no vertex, a vertex that is none becomes NaN."""
    lists = [[] if ring is None else ring for ring in rings]
    start = np.concatenate([[0], np.cumsum([len(ring) for ring in lists])]).astype(np.int64)
    if any(isinstance(ring, np.ndarray) for ring in lists):
        return np.concatenate([_vertices(ring) for ring in lists]), start
    return _vertices(list(chain.from_iterable(lists))), start


def _vertices(ring: Ring) -> Float64:
    if isinstance(ring, np.ndarray):
        return ring
    try:
        xy = np.array(ring, np.float64)
    except (TypeError, ValueError, OverflowError):
        xy = np.empty(0)
    if xy.ndim != 2 or xy.shape[1] < 2:  # somewhere a null, a text, or vertices of different length
        xy = np.array([point(vertex) for vertex in ring], np.float64).reshape(-1, 2)
    return np.ascontiguousarray(xy[:, :2])
