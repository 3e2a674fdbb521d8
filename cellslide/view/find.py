"""Where to look next: nuclei by what is odd of them or by their id, and the regions of the slide."""

from __future__ import annotations

from typing import Any

import numpy as np
import shapely

from cellslide.errors import UsageError
from cellslide.report.explain.select import disagreement, doubt, top_rows
from cellslide.report.regions import SearchedRegion
from cellslide.store.cell_table import BLOCK_ROWS, CellTable
from cellslide.types import Float64, Int64

MOST_RANKED = 200
MOST_ID = 64
# Outlines of regions are drawn to this many level-0 pixels.
REGION_STEP_PX, MOST_REGIONS = 8.0, 500


def ranked(table: CellTable, by: str) -> Int64:
    """Return rows (at most MOST_RANKED), the oddest first: least sure, surest of two classes, or largest.

    Raises UsageError for another word, and where the table does not hold what is asked for.
    """
    match by:
        case "uncertain":
            return top_rows(table, doubt, MOST_RANKED)
        case "disputed" if {"prob_local", "prob_global"} <= {*table.matrices}:
            return top_rows(table, disagreement, MOST_RANKED)
        case "disputed":
            raise UsageError("these nuclei were not typed by two paths, so none is disputed")
        case "largest" if table.kind != "point":
            return top_rows(table, _area, MOST_RANKED)
        case "largest":
            raise UsageError("nuclei that are points have no size")
    raise UsageError(f"by {by[:MOST_ID]}: must be uncertain, disputed or largest")


def _area(table: CellTable, start: int, stop: int) -> Float64:
    area = np.asarray(table.vector("area_um2", start, stop), np.float64)
    return np.where(np.asarray(table.vector("is_nucleus", start, stop), np.bool_), area, np.nan)


def find(table: CellTable, word: str) -> int | None:
    """Return the row of a nucleus by its cell_id or its uuid, None where there is none."""
    word = word.strip()[:MOST_ID]
    name, wanted = ("cell_id", int(word)) if word.isascii() and word.isdigit() else ("uuid", word.lower())
    for start in range(0, len(table), BLOCK_ROWS):
        column = table.vector(name, start, min(start + BLOCK_ROWS, len(table)))
        found = np.flatnonzero(np.asarray(column) == wanted)
        if len(found):
            return start + int(found[0])
    return None


def places(table: CellTable, rows: Int64) -> list[list[float]]:
    """Return row, x and y (level-0 pixels) of each of `rows`."""
    return [[row, *(float(table.vector(name, row, row + 1)[0]) for name in "xy")] for row in rows.tolist()]


def outlines(searched: SearchedRegion) -> dict[str, Any]:
    """Return what was searched and what of it is no clean tissue, as closed rings in level-0 pixels."""
    artefacts = [{"name": name, "rings": _rings(polygon)} for name, polygon in searched.artefacts[:MOST_REGIONS]]
    return {"tissue": [_rings(p) for p in searched.polygons[:MOST_REGIONS]], "artefacts": artefacts}


def _rings(polygon: shapely.Polygon) -> list[list[list[float]]]:
    simple = shapely.simplify(polygon, REGION_STEP_PX)
    return [[[round(x, 1), round(y, 1)] for x, y in ring.coords] for ring in (simple.exterior, *simple.interiors)]
