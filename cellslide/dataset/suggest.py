"""Places worth a correction: where the classifier is unsure, or its two paths disagree, spread over a slide."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.errors import UsageError
from cellslide.slides.regions import Origin, origin_offset
from cellslide.store.atomic import write_text
from cellslide.store.cell_table import BLOCK_ROWS, CellTable
from cellslide.types import Float64

# The square around a nucleus that is to be checked.
SQUARE_UM = 64.0
COLOR = [230, 140, 20]


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A nucleus that is worth a look: its place, how much so (0..1), and why."""

    xy: tuple[float, float]
    doubt: float
    why: str


def suggest(table: CellTable, n: int) -> list[Suggestion]:
    """Return up to n nuclei of greatest doubt, no two of whose squares overlap, the most doubtful first.

    Doubt is 1 - the probability of the best class; one more where both paths say different classes. Raises UsageError
    for a table whose nuclei were not typed.
    """
    xy, doubt, differ = (np.concatenate(parts) for parts in zip(*_doubts(table), strict=True))
    if not len(xy):
        raise UsageError(f"{table.path}: its nuclei have no classes to doubt; run `cellslide classify` first")
    edge_px = SQUARE_UM / np.array([table.slide.mpp_x, table.slide.mpp_y])
    taken: set[tuple[int, int]] = set()
    found: list[Suggestion] = []
    for row in np.argsort(-(doubt + differ), kind="stable"):
        column, line = np.floor(xy[row] / edge_px).astype(int)
        if any((column + dx, line + dy) in taken for dx in (-1, 0, 1) for dy in (-1, 0, 1)):
            continue
        taken.add((int(column), int(line)))
        why = "the paths disagree" if differ[row] else f"best class {1 - doubt[row]:.0%}"
        found.append(Suggestion((float(xy[row, 0]), float(xy[row, 1])), float(min(doubt[row] + differ[row], 1)), why))
        if len(found) == n:
            break
    return found


def _doubts(table: CellTable) -> Iterator[tuple[Float64, Float64, Float64]]:
    both = {"prob_local", "prob_global"} <= set(table.matrices)
    for start in range(0, max(len(table), 1), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(table))
        xy = np.stack([table.vector(name, start, stop) for name in "xy"], axis=1).astype(np.float64)
        doubt = 1 - np.asarray(table.vector("class_prob", start, stop), np.float64)
        differ = np.zeros(len(xy))
        if both:
            first, second = (np.asarray(table.matrix(f"prob_{name}", start, stop)) for name in ("local", "global"))
            # A path that did not run has no numbers.
            known = np.isfinite(first).all(axis=1) & np.isfinite(second).all(axis=1)
            differ = (known & (first.argmax(axis=1) != second.argmax(axis=1))).astype(np.float64)
        keep = np.asarray(table.vector("is_nucleus", start, stop), np.bool_) & np.isfinite(doubt)
        yield xy[keep], doubt[keep], differ[keep]


def write_suggestions(path: Path, table: CellTable, found: list[Suggestion], origin: Origin = "bounds") -> None:
    """Write squares around suggestions as annotations of the class "to check", which QuPath opens.

    One that has been checked is given the class "checked" there.
    """
    half = SQUARE_UM / 2 / np.array([table.slide.mpp_x, table.slide.mpp_y])
    shift = np.array(origin_offset(table.slide, origin), np.float64)
    size = np.array([table.slide.width_px, table.slide.height_px])
    features = []
    for number, one in enumerate(found, 1):
        (x0, y0), (x1, y1) = (np.clip(np.array(one.xy) + k * half, 0, size) - shift for k in (-1, 1))
        ring = [[round(float(v), 2) for v in p] for p in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))]
        properties: dict[str, Any] = {
            "objectType": "annotation", "name": f"{number}: {one.why}",
            "classification": {"name": "to check", "color": COLOR},
        }  # fmt: skip
        features.append(
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}
        )
    write_text(path, json.dumps({"type": "FeatureCollection", "features": features}) + "\n")
