"""One slide in two results: facts, a map of the agreement, and pictures of where both differ most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellslide.errors import TileError, UsageError
from cellslide.report.compare.agreement import (
    Agreement,
    Matched,
    Nuclei,
    Regions,
    match_nuclei,
    measure_agreement,
)
from cellslide.report.compare.folders import Pair
from cellslide.report.gallery import GalleryCell
from cellslide.report.overlay import draw_overlay
from cellslide.report.pixels import Crop, cut_crops
from cellslide.slides.reopen import reopen_or_why
from cellslide.slides.slide import Slide
from cellslide.store.cell_table import CellTable, open_table
from cellslide.store.run_record import TABLE, flatten
from cellslide.types import Float32, Int64, RunRecord, UInt8

MOST_REGIONS, REGION_PX = 3, 640
LEAST_NUCLEI = 10
MOST_CROPS = 12
MOST_SETTINGS = 40
# Where and how fast a run worked, what came of it, and what follows from the weights, which are named.
NOT_COMPARED = (
    "config.infer.", "config.output.", "config.spec.", "config.classify.infer.", "config.classify.counts.",
    "config.classify.device", "config.classify.network.", "config.classify.spec.", "config.classify.rule.calibration.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RegionPicture:
    """A square of the slide with the outlines of either result, uint8 (h, w, 3), and its numbers."""

    box: tuple[int, int, int, int]
    first: UInt8
    second: UInt8
    counts: tuple[int, int]
    agreement: float


@dataclass(frozen=True, slots=True)
class CropStrip:
    """Nuclei to look at, each with a caption."""

    title: str
    crops: tuple[tuple[Crop, str], ...]


@dataclass(frozen=True, slots=True)
class Pictures:
    """Where both differ most, to look at; `why_none` is why there are none."""

    regions: tuple[RegionPicture, ...] = ()
    strips: tuple[CropStrip, ...] = ()
    why_none: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far both results agree on one slide, and the settings that differ: name, first, second."""

    pair: Pair
    agreement: Agreement
    settings: tuple[tuple[str, str, str], ...]

    def facts(self) -> dict[str, Any]:
        """Return the numbers by name, as `--json` prints them."""
        found = self.agreement
        return {
            "slide": self.pair.slide_id,
            "nuclei": [found.first, found.second],
            "both": found.both,
            "only": [found.first - found.both, found.second - found.both],
            "f1": found.f1,
            "distance_um": found.distance_um,
            "area_ratio": found.area_ratio,
            "same_class": found.same_class,
            "kappa": found.kappa,
            "classes": list(found.names),
            "confusion": found.confusion.tolist(),
            "settings": {name: [a, b] for name, a, b in self.settings},
        }


def compare_slide(pair: Pair, radius_um: float) -> Comparison:
    """Compare the tables of one slide; nothing is written.

    radius_um  centres nearer than this are one nucleus.
    Raises TableError where a table cannot be read, UsageError where they are of different slides.
    """
    with open_table(pair.first / TABLE) as first, open_table(pair.second / TABLE) as second:
        _check_same_slide(pair, first, second)
        agreement = measure_agreement(match_nuclei(first, second, radius_um), first)
        return Comparison(pair, agreement, tuple(differing_settings(first.run, second.run)))


def take_pictures(comparison: Comparison, radius_um: float) -> Pictures:
    """Return pictures of where both tables of a slide differ, if the slide is still there."""
    pair = comparison.pair
    with ExitStack() as stack:
        first, second = (stack.enter_context(open_table(f / TABLE)) for f in (pair.first, pair.second))
        slide, why = reopen_or_why(second)
        if slide is None:
            slide, why = reopen_or_why(first)
        if slide is None:
            return Pictures(why_none=why)
        stack.enter_context(slide)
        matched = match_nuclei(first, second, radius_um)
        regions = tuple(region_pictures(slide, pair, comparison.agreement.regions))
        return Pictures(regions, tuple(_strips(slide, first, second, matched)))


def _check_same_slide(pair: Pair, first: CellTable, second: CellTable) -> None:
    hashes = [table.run.slide.get("sha256_head") for table in (first, second)]
    sizes = [(table.slide.width_px, table.slide.height_px) for table in (first, second)]
    if (None not in hashes and hashes[0] != hashes[1]) or sizes[0] != sizes[1]:
        raise UsageError(
            f"{pair.first} and {pair.second} are of different slides ({first.slide.path}, {second.slide.path}): "
            "only results of one slide can be compared nucleus by nucleus"
        )


def differing_settings(first: RunRecord, second: RunRecord) -> Iterator[tuple[str, str, str]]:
    """Yield name and both values of the settings that differ, weights and version among them."""
    a, b = _settings_of(first), _settings_of(second)
    names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    for name in names[:MOST_SETTINGS]:
        yield name.removeprefix("config."), a.get(name, "–"), b.get(name, "–")


def _settings_of(record: RunRecord) -> dict[str, str]:
    flat = {
        name: value
        for name, value in flatten({"config": record.config}).items()
        if not name.startswith(NOT_COMPARED) and value != "None"
    }
    flat |= {"cellslide": record.cellslide_version, "precision": record.precision, "engine": record.engine}
    flat["mpp"] = str(record.slide.get("mpp"))
    return flat | {f"weights.{k}": f"{w.id} {w.sha256[:12]}" for k, w in enumerate(record.weights)}


def region_pictures(slide: Slide, pair: Pair, regions: Regions) -> Iterator[RegionPicture]:
    """Yield the squares where both agree least, drawn twice; squares with few nuclei are left out."""
    total = regions.first + regions.second
    share = np.where(total >= 2 * LEAST_NUCLEI, regions.agreement, np.nan)
    order = np.argsort(np.where(np.isfinite(share), share, np.inf), axis=None, kind="stable")
    for flat in order[:MOST_REGIONS].tolist():
        row, col = divmod(flat, share.shape[1])
        if not np.isfinite(share[row, col]) or share[row, col] == 1:
            return
        box = _box(slide, regions.edge_px, row, col)
        try:
            drawn = [draw_overlay(slide, folder / TABLE, box, REGION_PX) for folder in (pair.first, pair.second)]
        except TileError:
            continue
        counts = int(regions.first[row, col]), int(regions.second[row, col])
        yield RegionPicture(box, drawn[0], drawn[1], counts, float(share[row, col]))


def _box(slide: Slide, edge_px: float, row: int, col: int) -> tuple[int, int, int, int]:
    x0, y0 = int(col * edge_px), int(row * edge_px)
    return x0, y0, min(int(x0 + edge_px), slide.info.width_px), min(int(y0 + edge_px), slide.info.height_px)


def _strips(slide: Slide, first: CellTable, second: CellTable, matched: Matched) -> Iterator[CropStrip]:
    a, b, pairs = matched.first, matched.second, matched.pairs
    yield _strip(slide, first, a, _surest(a, matched.only_first), "Only the first has it", None)
    yield _strip(slide, second, b, _surest(b, matched.only_second), "Only the second has it", None)
    names_a, names_b = (
        np.array([*nuclei.names, ""], object)[nuclei.class_index[index]]
        for nuclei, index in ((a, pairs.true_index), (b, pairs.pred_index))
    )
    changed = np.flatnonzero((names_a != names_b) & (names_a != "") & (names_b != ""))
    chosen = changed[_best(b.score[pairs.pred_index[changed]])]
    words = [f"{names_a[i]} → {names_b[i]}" for i in chosen.tolist()]
    yield _strip(slide, second, b, pairs.pred_index[chosen], "Another class", words)


def _surest(nuclei: Nuclei, index: Int64) -> Int64:
    return index[_best(nuclei.score[index])]


def _best(score: Float32) -> Int64:
    return np.lexsort((np.arange(len(score)), -score.astype(np.float64)))[:MOST_CROPS].astype(np.int64)


def _strip(
    slide: Slide, table: CellTable, nuclei: Nuclei, index: Int64, title: str, words: list[str] | None
) -> CropStrip:
    picks = [_pick(nuclei, int(i)) for i in index]
    crops = cut_crops(slide, table, picks)
    captions = words or [f"{pick.value:.2f}" for pick in picks]
    return CropStrip(title, tuple((crops[p.row], w) for p, w in zip(picks, captions, strict=True) if p.row in crops))


def _pick(nuclei: Nuclei, i: int) -> GalleryCell:
    xy = (float(nuclei.xy[i, 0]), float(nuclei.xy[i, 1]))
    return GalleryCell(int(nuclei.row[i]), xy, int(nuclei.class_index[i]), True, float(nuclei.score[i]), -1, -1)
