"""What speaks for a run and what against it, in plain words, each with how much it matters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely

from cellslide.geometry.outlines import to_polygons
from cellslide.report.pixels import Sharpness
from cellslide.report.seams import SeamVerdict
from cellslide.report.statistics import CellStatistics
from cellslide.store.cell_table import CellTable
from cellslide.types import RunRecord

Level = Literal["good", "note", "bad"]
# Outlines are checked in whole groups of the file, at most so many nuclei, spread over the slide.
MOST_OUTLINES = 50_000
MANY_REPAIRED = 0.01
MANY_ABSTAINED = 0.3
MANY_BLURRED = 0.1
FEW_NUCLEI_MM2, MANY_NUCLEI_MM2 = 50.0, 15_000.0
# 40x is 0.25 µm, 20x 0.5 µm: the magnification that a file states times its pixel size.
UM_TIMES_POWER, POWER_TOLERANCE = 10.0, 0.25

MPP_WORDS = {
    "vendor": "as the scanner wrote it into the file",
    "ome": "as the OME metadata state it",
    "flag": "as given by --mpp",
    "list": "as given in the list of slides",
    "tiff": "from the resolution of the TIFF, which some programs set at will",
}


@dataclass(frozen=True, slots=True)
class Flag:
    """One thing that was checked: how it came out, what it is, and what was seen."""

    level: Level
    title: str
    text: str


def flags(
    record: RunRecord, table: CellTable, tally: CellStatistics, tissue_mm2: float | None, seams: SeamVerdict | None,
    sharpness: Sharpness | None, slide_gone: str | None,
) -> list[Flag]:  # fmt: skip
    """Return all that was checked, what is bad first."""
    found = [
        *_pixel_size(record, table), *_tiles(record), *_focus(sharpness, slide_gone), *_density(tally, tissue_mm2),
        *_outlines(table), *_seams(seams), *_classes(record, tally), *_licences(record),
    ]  # fmt: skip
    rank = {"bad": 0, "note": 1, "good": 2}
    return sorted(found, key=lambda flag: rank[flag.level])


def _pixel_size(record: RunRecord, table: CellTable) -> Iterator[Flag]:
    info, source = table.slide, str(table.slide.mpp_source)
    words = f"{info.mpp_x:.4g} µm per pixel, {MPP_WORDS.get(source, source)}."
    power = info.objective_power
    stretched = abs(info.mpp_x / info.mpp_y - 1) > 0.02
    if stretched:
        words += f" Pixels are not square: {info.mpp_y:.4g} µm high."
    if power and abs(info.mpp_x * power / UM_TIMES_POWER - 1) > POWER_TOLERANCE:
        yield Flag("bad", "Pixel size", f"{words} That does not go with the {power:g}x that the file states.")
        return
    yield Flag("good" if source in ("vendor", "ome") and not stretched else "note", "Pixel size", words)


def _tiles(record: RunRecord) -> Iterator[Flag]:
    counts = record.counts
    if not counts.tiles:
        return
    if counts.tiles_missing:
        text = f"{counts.tiles_missing:,} tiles inside the tissue are missing in the slide's file. No nuclei there."
        yield Flag("bad", "Missing tiles", text)
    if counts.tiles_failed:
        first = record.failed_tiles[0].error if record.failed_tiles else "no reason is known"
        text = f"{counts.tiles_failed:,} of {counts.tiles:,} tiles could not be done: {first}. No nuclei there."
        yield Flag("bad", "Failed tiles", text)
    else:
        yield Flag("good", "Failed tiles", f"None of {counts.tiles:,}.")


def _focus(sharpness: Sharpness | None, slide_gone: str | None) -> Iterator[Flag]:
    if sharpness is None:
        if slide_gone is not None:
            yield Flag("note", "Slide", f"{slide_gone}. Focus was not checked, and there are no pictures.")
        return
    if sharpness.unread:
        yield Flag("bad", "Damage", f"{sharpness.unread} of the fields looked at could not be read from the slide.")
    n, blurred = len(sharpness.blur), len(sharpness.blurred)
    if not n:
        return
    text = (
        f"{blurred} of {n} fields looked at are out of focus" if blurred else f"All of {n} fields looked at are sharp"
    )
    text += f" (blur {np.median(sharpness.blur):.2f} in the median, 0 to 1)."
    yield Flag("bad" if blurred > MANY_BLURRED * n else "note" if blurred else "good", "Focus", text)


def _density(tally: CellStatistics, tissue_mm2: float | None) -> Iterator[Flag]:
    if not tally.n:
        yield Flag("bad", "Nuclei", "None were found. The tissue outline shows what was searched.")
        return
    if not tissue_mm2:
        return
    density = tally.n / tissue_mm2
    usual = FEW_NUCLEI_MM2 <= density <= MANY_NUCLEI_MM2
    text = f"{density:,.0f} nuclei per mm² of {tissue_mm2:,.2f} mm² searched"
    yield Flag("good" if usual else "note", "Density", text + ("." if usual else ": unusual for tissue."))


def _outlines(table: CellTable) -> Iterator[Flag]:
    if table.kind != "mask" or table.shapes is None:
        return
    looked, broken = broken_outlines(table)
    share = broken / max(looked, 1)
    words = f"of {looked:,} outlines{' looked at' if looked < len(table) else ''}"
    text = f"{broken:,} {words} ({share:.2%}) cross themselves; they are repaired in the GeoJSON."
    clean = f"None {words} crosses itself."
    yield Flag("note" if share > MANY_REPAIRED else "good", "Repaired outlines", text if broken else clean)


def broken_outlines(table: CellTable) -> tuple[int, int]:
    """Return how many outlines were looked at and how many of them are no valid polygon on the grid of the GeoJSON."""
    assert table.shapes is not None
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


def _seams(verdict: SeamVerdict | None) -> Iterator[Flag]:
    if verdict is None:
        return
    text = f"{verdict.near:,} nuclei within 3 µm of where tiles meet, {verdict.expected:,.0f} at the density beside it"
    text += f"; {verdict.twins:,} pairs there may be one nucleus." if verdict.twins else "; none looks counted twice."
    many = verdict.twins > max(2.0, 0.01 * verdict.near)
    yield Flag("bad" if verdict.odd or many else "good", "Seams", text)


def _classes(record: RunRecord, tally: CellStatistics) -> Iterator[Flag]:
    typed = int(tally.counts.sum() + tally.abstained.sum())
    if not tally.typed or not tally.n:
        return
    if tally.untyped:
        yield Flag("note", "Not typed", f"{tally.untyped:,} of {tally.n:,} nuclei ({tally.untyped / tally.n:.1%}).")
    yield from _organ(record)
    abstained = int(tally.abstained.sum())
    if abstained and typed:
        share = abstained / typed
        text = f"No class was said of {abstained:,} of {typed:,} nuclei ({share:.1%})."
        yield Flag("bad" if share > MANY_ABSTAINED else "good", "Abstained", text)


def _organ(record: RunRecord) -> Iterator[Flag]:
    typing = record.config.get("classify") or {}
    organ = typing.get("organ")
    if organ == "unknown":
        yield Flag("note", "Organ", "The classifier was not told the organ.")
    elif typing.get("organ_trained") is False:
        trained = ", ".join(typing["spec"]["organs"]) or "no organ by name"
        text = f"The classifier was not trained on {organ} (trained: {trained}), and abstains more."
        worth = typing["spec"]["calibration"].get("accuracy_unseen")
        if worth is not None:
            text += f" On an organ left out of training it typed {worth:.0%} of the nuclei right."
        yield Flag("bad", "Organ", text)


def _licences(record: RunRecord) -> Iterator[Flag]:
    for weights in record.weights:
        if re.search(r"\bNC\b|non-?commercial", weights.licence or "", re.IGNORECASE):
            yield Flag("note", "Licence", f"{weights.id}: {weights.licence}; no commercial use.")
        elif not weights.licence:
            yield Flag("note", "Licence", f"{weights.id}: none is stated.")
