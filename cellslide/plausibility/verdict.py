"""One verdict on a slide's folder, from its finished table and its record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import shapely

from cellslide.geometry.outlines import to_polygons
from cellslide.plausibility.artefacts import find_artefacts, read_fields
from cellslide.plausibility.cells import sum_cells
from cellslide.plausibility.checks import Evidence, checks
from cellslide.store.cell_table import CellTable, open_table
from cellslide.store.run_record import TABLE
from cellslide.types import Check, Plane, RunRecord, Verdict

# Outlines are checked in whole groups of the file, at most so many nuclei, spread over the slide.
MOST_OUTLINES = 50_000


def judge_folder(folder: Path, record: RunRecord) -> Verdict:
    """Return the verdict on a slide whose table is finished; raises TableError where there is none."""
    with open_table(folder / TABLE) as table:
        return judge(table, record)


def judge(table: CellTable, record: RunRecord) -> Verdict:
    """Return the verdict on a table and the record of its run."""
    folder, info, outlines = table.path.parent, table.slide, broken_outlines(table)
    # Nuclei that come from elsewhere have neither a plane nor fields.
    plane = Plane.of(info, float((record.config.get("spec") or {}).get("mpp", info.mpp_x)))
    artefacts = find_artefacts(read_fields(table), plane)
    evidence = Evidence(folder, info, table.kind, record, sum_cells(table, record), artefacts, outlines)
    return Verdict.of(checks(evidence))


def in_short(check: Check) -> str:
    """Return a check in a few words: what was measured beside what is expected."""
    value = check.value if isinstance(check.value, str) else f"{check.value:,.4g}"
    return f"{check.name} {value} (expected {check.expected}): {check.word}"


def broken_outlines(table: CellTable) -> tuple[int, int] | None:
    """Return how many outlines were looked at and how many of them are no valid polygon on the grid of the GeoJSON.

    None where nuclei have no outlines of their own.
    """
    if table.kind != "mask" or table.shapes is None:
        return None
    first = table.shapes.first
    groups = len(first) - 1
    most = max(1, MOST_OUTLINES // max(int(np.diff(first).max(initial=1)), 1))
    looked = broken = 0
    for k in np.unique(np.linspace(0, groups - 1, min(most, groups)).astype(int)).tolist():
        xy, start = table.shapes.rings(int(first[k]), int(first[k + 1]))
        polygons = to_polygons(np.round(xy, 2), start)
        looked += len(polygons)
        broken += int((~shapely.is_valid(polygons) | (shapely.area(polygons) == 0)).sum())
    return looked, broken
