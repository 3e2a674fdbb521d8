"""A comparison as one self-contained HTML page, for people: numbers first, then maps and pictures of what differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cellslide.report.compare.agreement import REGION_UM, Agreement
from cellslide.report.compare.slide import Comparison, CropStrip, Pictures
from cellslide.report.images import heat_uri, webp_uri
from cellslide.report.page import Heat, MatrixRow, Shot, Strip, crop_path
from cellslide.report.pixels import CROP_PX, CROP_UM
from cellslide.report.rendering import part, template

QUALITY = 70


@dataclass(frozen=True, slots=True)
class SlidePart:
    """A slide of the page: its comparison and what is drawn of it."""

    comparison: Comparison
    matrix: tuple[MatrixRow, ...]
    maps: tuple[Heat, ...]
    map_size: tuple[int, int]
    regions: tuple[tuple[str, str, str], ...]
    strips: tuple[Strip, ...]
    why_no_pictures: str | None


def render_comparison(
    comparisons: Sequence[Comparison],
    pictures: Sequence[Pictures],
    names: tuple[str, str],
    alone: tuple[Sequence[str], Sequence[str]],
    radius_um: float,
) -> str:
    """Return the page of the slides that two results share.

    comparisons  in the order of the page; the first of them have `pictures` and are shown in full.
    names        of the two results; alone  slides that only one of them holds.
    """
    return template("compare.html").render(
        style=part("report.css"),
        names=names,
        alone=alone,
        radius_um=radius_um,
        region_um=REGION_UM,
        crop_px=CROP_PX,
        crop_um=CROP_UM,
        rows=comparisons,
        parts=[slide_part(*both) for both in zip(comparisons, pictures, strict=False)],
        settings=_settings(comparisons),
    )


def _settings(comparisons: Sequence[Comparison]) -> list[tuple[str, str, str, int]]:
    """Return the settings that differ, and on how many slides."""
    counts: dict[tuple[str, str, str], int] = {}
    for comparison in comparisons:
        for row in comparison.settings:
            counts[row] = counts.get(row, 0) + 1
    return [(*row, n) for row, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def slide_part(comparison: Comparison, pictures: Pictures) -> SlidePart:
    """Return what the page shows of one slide."""
    found = comparison.agreement
    rows, cols = found.regions.first.shape
    return SlidePart(
        comparison,
        tuple(_matrix(found)),
        tuple(_maps(found)),
        (cols, rows),
        tuple(
            (
                webp_uri(region.first, QUALITY),
                webp_uri(region.second, QUALITY),
                f"{region.agreement:.0%} agreement; {region.counts[0]:,} and {region.counts[1]:,} nuclei; "
                f"x {region.box[0]:,}, y {region.box[1]:,}",
            )
            for region in pictures.regions
        ),
        tuple(strip for strip in map(_strip, pictures.strips) if strip.shots),
        pictures.why_none,
    )


def _matrix(found: Agreement) -> Iterator[MatrixRow]:
    if len(found.names) < 2:
        return
    for k, name in enumerate(found.names):
        total = max(int(found.confusion[k].sum()), 1)
        yield MatrixRow(name, tuple((n, n / total, j == k) for j, n in enumerate(found.confusion[k].tolist())))


def _maps(found: Agreement) -> Iterator[Heat]:
    regions = found.regions
    if not np.isfinite(regions.agreement).any():
        return
    differ = np.where(np.isfinite(regions.agreement), 1 - regions.agreement, 0.0)
    yield Heat("nuclei that only one has", "all of them", heat_uri(differ, 1.0))
    if len(found.names) > 1 and regions.both.any():
        other = np.divide(regions.both - regions.alike, regions.both, out=np.zeros_like(differ), where=regions.both > 0)
        yield Heat("nuclei of both with another class", "all of them", heat_uri(other, 1.0))


def _strip(strip: CropStrip) -> Strip:
    shots = [
        Shot(
            webp_uri(crop.image, QUALITY),
            crop_path(crop),
            caption,
            f"{strip.title}: nucleus {crop.pick.row}, {caption}",
        )
        for crop, caption in strip.crops
    ]
    return Strip(strip.title, tuple(shots))
