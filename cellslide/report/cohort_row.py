"""One row of a cohort's summary, and which rows stand out from the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

# Fewer slides than this have no usual value.
LEAST_SLIDES = 8
# A value this many (robust) standard deviations from the median stands out, if it also differs by a quarter.
FAR = 3.5
LEAST_SHARE = 1.25
# Median absolute deviation to standard deviation, for normal values.
MAD_TO_SD = 1.4826


@dataclass(frozen=True, slots=True)
class Row:
    """What is told of one slide; None and "" are what is not known.

    status  done, done_with_errors, failed, stale (work of other settings than the last
            request, left as it is), or what a run that did not end left: interrupted, running.
    verdict  good, look or do not use, and `reasons` the checks behind it, each in a few words.
    folder  name of its folder in the output, and `files` what lies there to be opened.
    seconds  of the last run that worked on it; `classes` is cells by class.
    """

    slide: str
    status: str
    cells: int | None = None
    tissue_mm2: float | None = None
    tiles: int | None = None
    tiles_failed: int | None = None
    typed: int | None = None
    abstained: int | None = None
    classes: Mapping[str, int] = field(default_factory=dict)
    organ: str = ""
    seconds: float = 0.0
    mpp: float | None = None
    width: int | None = None
    height: int | None = None
    vendor: str = ""
    device: str = ""
    model: str = ""
    ended: str = ""
    verdict: str = ""
    reasons: tuple[str, ...] = ()
    error: str = ""
    path: str = ""
    folder: str = ""
    files: tuple[str, ...] = ()

    @property
    def density(self) -> float | None:
        """Cells per mm² of the area that was searched."""
        if self.cells is None or not self.tissue_mm2:
            return None
        return self.cells / self.tissue_mm2

    @property
    def abstained_share(self) -> float | None:
        """Share of the typed cells of which no class was said."""
        return None if not self.typed or self.abstained is None else self.abstained / self.typed


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that slides of one cohort have in common, with the words for one that is much lower or higher."""

    value: Callable[[Row], float | None]
    low: str
    high: str
    text: Callable[[float], str]


def _per_tile(row: Row) -> float | None:
    return row.seconds / row.tiles if row.status == "done" and row.tiles and row.seconds else None


MEASURES = (
    Measure(lambda r: r.density, "few nuclei", "many nuclei", lambda v: f"{v:,.0f}/mm²"),
    Measure(lambda r: r.tissue_mm2, "little tissue", "much tissue", lambda v: f"{v:,.2f} mm²"),
    Measure(lambda r: r.mpp, "fine pixels", "coarse pixels", lambda v: f"{v:.4g} µm"),
    Measure(_per_tile, "quick", "slow", lambda v: f"{v:.3g} s a tile"),
    Measure(lambda r: r.abstained_share, "few abstained", "many abstained", lambda v: f"{v:.1%}"),
)
_HARMLESS = ("quick", "few abstained")


def outliers(rows: Sequence[Row]) -> list[list[str]]:
    """Return for each row in words why it stands out, most often nothing: by the cohort's median, on a log scale."""
    why: list[list[str]] = [[] for _ in rows]
    for row, words in zip(rows, why, strict=True):
        if row.status.startswith("done") and row.cells == 0:
            words.append("no nuclei")
    for measure in MEASURES:
        _mark(rows, measure, why)
    return why


def _mark(rows: Sequence[Row], measure: Measure, why: list[list[str]]) -> None:
    values = [measure.value(row) for row in rows]
    logs = [math.log(v) for v in values if v]
    if len(logs) < LEAST_SLIDES:
        return
    middle = median(logs)
    spread = MAD_TO_SD * median(abs(v - middle) for v in logs)
    limit = max(FAR * spread, math.log(LEAST_SHARE))
    for value, words in zip(values, why, strict=True):
        if not value or abs(math.log(value) - middle) <= limit:
            continue
        name = measure.low if math.log(value) < middle else measure.high
        if name not in _HARMLESS:
            words.append(f"{name}: {measure.text(value)}, usual {measure.text(math.exp(middle))}")
