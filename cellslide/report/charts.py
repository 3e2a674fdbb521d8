"""Histograms as bars in the units of a small SVG; the template draws them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cellslide.plausibility.histogram import Histogram

WIDTH, HEIGHT = 300, 90


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar from `x`, `width` wide: `height` of the first group, on it `upper` of the second; `words` say its count."""

    x: float
    width: float
    height: float
    upper: float
    words: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A histogram to draw: bars in a field of WIDTH x HEIGHT, limits in words, and what it says for those who read."""

    title: str
    bars: tuple[Bar, ...]
    low: str
    high: str
    summary: str


def chart_of(
    histogram: Histogram, title: str, unit: str = "", form: str = ".3g", whole: bool = False, split: bool = False
) -> Chart | None:
    """Return a chart of a histogram, None where nothing was counted.

    whole  shows the whole range, else only as far as nearly all values lie.
    split  sets the second of two groups off; else all groups are added up.
    """
    if not histogram.n:
        return None
    if whole:
        step = max(1, histogram.steps // 40)
        counts = histogram.counts.reshape(histogram.groups, -1, step).sum(axis=2)
        edges = histogram.edges[::step]
    else:
        edges, counts = histogram.bars()
    if not split:
        counts = counts.sum(axis=0, keepdims=True)
    return Chart(title, _bars(edges, counts, form, unit), f"{edges[0]:{form}}", _last(edges, form, unit, whole),
                 summary(histogram, unit, form))  # fmt: skip


def _last(edges: np.ndarray, form: str, unit: str, whole: bool) -> str:
    return f"{edges[-1]:{form}}{'' if whole else ' or more'} {unit}".strip()


def _bars(edges: np.ndarray, counts: np.ndarray, form: str, unit: str) -> tuple[Bar, ...]:
    tallest = max(int(counts.sum(axis=0).max()), 1)
    width = WIDTH / counts.shape[1]
    found = []
    for k in range(counts.shape[1]):
        lower, upper = int(counts[0, k]), int(counts[1, k]) if len(counts) > 1 else 0
        words = f"{edges[k]:{form}} to {edges[k + 1]:{form}} {unit}".strip() + f": {lower + upper:,}"
        words += f", {upper:,} without a class" if upper else ""
        found.append(Bar(k * width, max(width - 1, 0.5), HEIGHT * lower / tallest, HEIGHT * upper / tallest, words))
    return tuple(found)


def summary(histogram: Histogram, unit: str, form: str) -> str:
    """Return median and middle nine tenths in words."""
    low, middle, high = (histogram.quantile(q) for q in (0.05, 0.5, 0.95))
    return f"median {middle:{form}} {unit}".strip() + f", nine of ten from {low:{form}} to {high:{form}}"
