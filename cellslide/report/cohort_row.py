"""One row of a cohort's summary, which rows stand out from the others, and which groups of slides differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

# Fewer slides than this have no usual value.
LEAST_SLIDES = 8
MOST_CLASSES = 8
# A value this many (robust) standard deviations from the median stands out, if it also differs by a quarter.
FAR = 3.5
LEAST_SHARE = 1.25
# Groups of fewer slides are not compared; medians that are this many robust standard deviations apart are told.
LEAST_GROUP, GROUP_FAR = 3, 2.0
# Median absolute deviation to standard deviation, for normal values.
MAD_TO_SD = 1.4826


@dataclass(frozen=True, slots=True)
class Row:
    """What is told of one slide; None and "" are what is not known.

    status  done, done_with_errors, failed, stale (work of other settings than the last
            request, left as it is), or what a run that did not end left: interrupted, running.
    verdict  good, look or do not use, and `reasons` the checks behind it, each in a few words.
    checks  the word of each check by its name; `width_um`, `out_of_focus`, `stain` are what three of them
            measured: median width of nuclei, share of the tissue, how much more green than other light eosin absorbs.
    thumbnail  the slide as a small data URI.
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
    checks: Mapping[str, str] = field(default_factory=dict)
    width_um: float | None = None
    out_of_focus: float | None = None
    stain: float | None = None
    thumbnail: str = ""
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
    Measure(lambda r: r.width_um, "small nuclei", "large nuclei", lambda v: f"{v:.3g} µm"),
    Measure(lambda r: r.stain, "weak stain contrast", "strong stain contrast", lambda v: f"{v:.2f}"),
    Measure(lambda r: r.out_of_focus, "sharp", "out of focus", lambda v: f"{v:.1%}"),
    Measure(_per_tile, "quick", "slow", lambda v: f"{v:.3g} s a tile"),
    Measure(lambda r: r.abstained_share, "few abstained", "many abstained", lambda v: f"{v:.1%}"),
)
_HARMLESS = ("quick", "few abstained", "sharp")


def share_of(name: str) -> Callable[[Row], float | None]:
    """Return what gives the share of a class among a slide's cells with a class."""
    return lambda row: row.classes.get(name, 0) / total if (total := sum(row.classes.values())) else None


def measures_of(rows: Sequence[Row]) -> list[Measure]:
    """Return what slides are compared by: the fixed measures and the share of each common class."""
    shares = [
        Measure(share_of(name), f"little {name}", f"much {name}", lambda v: f"{v:.1%}") for name in common_classes(rows)
    ]
    return [*MEASURES, *shares]


def common_classes(rows: Sequence[Row]) -> list[str]:
    """Return the classes with most cells over all rows, at most eight, in the order of their first mention."""
    total: dict[str, int] = {}
    for row in rows:
        for name, count in row.classes.items():
            total[name] = total.get(name, 0) + count
    most = sorted(total, key=lambda name: -total[name])[:MOST_CLASSES]
    return [name for name in total if name in most]


def outliers(rows: Sequence[Row]) -> list[list[str]]:
    """Return for each row in words why it stands out, most often nothing: by the cohort's median, on a log scale."""
    why: list[list[str]] = [[] for _ in rows]
    for row, words in zip(rows, why, strict=True):
        if row.status.startswith("done") and row.cells == 0:
            words.append("no nuclei")
    for measure in measures_of(rows):
        _mark(rows, measure, why)
    return why


def _mark(rows: Sequence[Row], measure: Measure, why: list[list[str]]) -> None:
    values = [measure.value(row) for row in rows]
    logs = [math.log(v) for v in values if v and v > 0]
    if len(logs) < LEAST_SLIDES:
        return
    middle, spread = _middle(logs)
    limit = max(FAR * spread, math.log(LEAST_SHARE))
    for value, words in zip(values, why, strict=True):
        if not value or value < 0 or abs(math.log(value) - middle) <= limit:
            continue
        name = measure.low if math.log(value) < middle else measure.high
        if name not in _HARMLESS:
            far = f" (robust z {(math.log(value) - middle) / spread:+.1f})" if spread > 1e-3 else ""
            words.append(f"{name}: {measure.text(value)}, usual {measure.text(math.exp(middle))}{far}")


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Return the median, and the standard deviation by the median distance from it."""
    middle = median(values)
    return middle, MAD_TO_SD * median(abs(v - middle) for v in values)


# What slides may be grouped by: what a group is called, and what puts a slide in it.
GROUPS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("scanner", lambda r: r.vendor),
    ("day of the run", lambda r: r.ended[:10]),
    ("model", lambda r: r.model),
)


def batch_effects(rows: Sequence[Row]) -> list[str]:
    """Return in words by what groups of slides (a scanner, a day) differ from the others; a hint, not a test."""
    found = []
    for kind, group_of in GROUPS:
        members: dict[str, list[Row]] = {}
        for row in rows:
            if row.status.startswith("done") and group_of(row):
                members.setdefault(group_of(row), []).append(row)
        large = {name: own for name, own in members.items() if len(own) >= LEAST_GROUP}
        if len(large) >= 2:
            found += _differences(kind, large, measures_of(rows))
    return found


def _differences(kind: str, groups: Mapping[str, Sequence[Row]], measures: Sequence[Measure]) -> list[str]:
    found = []
    for measure in measures:
        logs = {
            name: [math.log(v) for row in own if (v := measure.value(row)) and v > 0] for name, own in groups.items()
        }
        logs = {name: values for name, values in logs.items() if len(values) >= LEAST_GROUP}
        for name, values in logs.items():
            others = [v for other, more in logs.items() if other != name for v in more]
            if not others or (len(logs) == 2 and name != min(logs)):
                continue  # Of two groups one sentence tells both.
            (middle, spread), (usual, usual_spread) = _middle(values), _middle(others)
            apart = abs(middle - usual)
            if apart > max(GROUP_FAR * max(spread, usual_spread), math.log(LEAST_SHARE)):
                words = measure.low if middle < usual else measure.high
                found.append(
                    f"{kind} {name} ({len(values):,} slides): {words}, median {measure.text(math.exp(middle))} against "
                    f"{measure.text(math.exp(usual))} of the {len(others):,} others"
                )
    return found
