"""A cohort as one self-contained HTML page: a row a slide, sorted and filtered by a small script of its own.

The page loads nothing from elsewhere; its links lead to the slides' folders beside it. Without scripts it is still a
table. Names of slides and words of errors are strangers' text: escaped, and quoted in links.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np

from cellslide.plausibility.histogram import Histogram
from cellslide.report.charts import HEIGHT, WIDTH, Chart, chart_of
from cellslide.report.cohort_row import Row, batch_effects, common_classes, share_of
from cellslide.report.page import CHECKS
from cellslide.report.rendering import part, template
from cellslide.types import WORDS

REPORT = "report.html"
# Fewer slides have no distribution; more thumbnails make the page heavy.
LEAST_STRIP, MOST_THUMBNAILS = 3, 300
# Of more slides than this only the name is a link, to the report; and more than this many rows no browser opens soon.
MOST_LINKED, MOST_ROWS = 2000, 5000
THUMBNAIL = re.compile(r"data:image/webp;base64,[A-Za-z0-9+/=]{1,8000}")
SYMBOLS = {"good": ("i", "✓"), "look": ("u", "○"), "do not use": ("b", "✗")}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the page: its heading, what it means, and whether it sorts by number."""

    name: str
    title: str
    number: bool = True


COLUMNS = (
    Column("slide", "Slide, with links to its files", False),
    Column("status", "How the slide ended", False),
    Column("verdict", "Whether the nuclei can be used: good, look, or do not use"),
    Column("nuclei", "Nuclei found"),
    Column("per mm²", "Nuclei per mm² of the area that was searched"),
    Column("tissue mm²", "Area that was searched"),
    Column("tiles", "Tiles that were searched"),
    Column("failed", "Tiles that could not be done"),
    Column("s", "Seconds of the last run that worked on the slide"),
    Column("µm/px", "Pixel size of level 0"),
)
TYPED = (Column("typed", "Cells that were typed"), Column("abstained", "Share of them of which no class was said"))
LAST = (
    Column("organ", "Organ that the typing was told", False),
    Column("ended", "When the slide ended (UTC)", False),
    Column("what stands out", "Why a slide failed, its verdict, and what differs from the other slides", False),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of the table: what it sorts by, and what is shown."""

    value: str
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table; `folder`, `first` and `links` are quoted for addresses, links with what they say.

    marks  a symbol for each check; the script colours those that are seen.
    """

    row: Row
    kind: str
    folder: str
    first: str
    links: tuple[tuple[str, str], ...]
    numbers: tuple[Cell, ...]
    words: tuple[str, ...]
    marks: str
    thumbnail: str

    @property
    def rank(self) -> str:
        """Where the verdict sorts: the worst is the largest."""
        return str([*WORDS].index(self.row.verdict)) if self.row.verdict in WORDS else ""

    @property
    def bad(self) -> str:
        """How many checks are not good, those of no use for ten."""
        return str(self.marks.count("○") + 10 * self.marks.count("✗")) if self.marks else ""


def page(rows: Sequence[Row], why: Sequence[Sequence[str]], title: str) -> str:
    """Return the page for rows and, of each, why it stands out; its links are relative to the output folder."""
    classes = common_classes(rows)
    typed = any(row.typed is not None for row in rows)
    checks, pictured = _checks(rows), _shown(rows, why)
    shares = tuple(Column(name, f"Share of {name} among the cells with a class") for name in classes)
    return template("cohort.html").render(
        title=f"{title}: {len(rows):,} slides",
        style=part("cohort.css"),
        script=part("cohort.js"),
        facts=_facts(rows, why), effects=batch_effects(rows), checks=checks, symbols=SYMBOLS,
        charts=list(_strips(rows, classes)), chart_width=WIDTH, chart_height=HEIGHT,
        pictured=len(pictured), n=len(rows),
        columns=(*COLUMNS, *(TYPED if typed else ()), *shares, *LAST),
        lines=[_line(rows[k], why[k], typed, classes, checks, pictured) for k in _kept(rows, why)],
        left=max(0, len(rows) - MOST_ROWS),
        linked=len(rows) <= MOST_LINKED,
    )  # fmt: skip


def _strips(rows: Sequence[Row], classes: Sequence[str]) -> Iterator[Chart]:
    """Yield how slides are distributed over what they are compared by."""
    wanted: list[tuple[str, str, str, Callable[[Row], float | None]]] = [
        ("nuclei per mm²", "", ",.0f", lambda r: r.density),
        ("median width of nuclei", "µm", ".1f", lambda r: r.width_um),
        ("stain: green in eosin, more than other colours", "", ".2f", lambda r: r.stain),
        ("share of tissue out of focus", "", ".0%", lambda r: r.out_of_focus),
        ("share without a class", "", ".0%", lambda r: r.abstained_share),
        *((f"share of {name}", "", ".0%", share_of(name)) for name in classes),
    ]
    for title, unit, form, value_of in wanted:
        values = np.array([v for row in rows if (v := value_of(row)) is not None], np.float64)
        if len(values) >= LEAST_STRIP:
            low, high = float(values.min()), float(values.max())
            histogram = Histogram(low, high if high > low else low + 1e-6, 40)
            histogram.add(values)
            chart = chart_of(histogram, title, unit, form, whole=True)
            if chart is not None:
                yield chart


def _checks(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the checks that any slide has, by name and title, in the report's order."""
    made = {name for row in rows for name in row.checks}
    return [(name, title) for name, title in CHECKS.items() if name in made]


def _kept(rows: Sequence[Row], why: Sequence[Sequence[str]]) -> list[int]:
    """Return the rows that the page has room for, in their order: what failed first, then what is worth a look."""

    def rank(k: int) -> tuple[bool, bool]:
        return rows[k].status == "done", rows[k].verdict in ("", "good") and not why[k]

    return sorted(sorted(range(len(rows)), key=rank)[:MOST_ROWS])


def _shown(rows: Sequence[Row], why: Sequence[Sequence[str]]) -> set[str]:
    """Return the folders of the slides whose thumbnail the page has room for, those worth a look first."""
    first = sorted(zip(rows, why, strict=True), key=lambda pair: (pair[0].verdict in ("", "good"), not pair[1]))
    # A row is a file that others may have written: nothing but a picture goes into the page.
    return {row.folder for row, _ in first[:MOST_THUMBNAILS] if THUMBNAIL.fullmatch(row.thumbnail)}


def _facts(rows: Sequence[Row], why: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    done = sum(row.status == "done" for row in rows)
    bad = sum(row.status in ("failed", "done_with_errors") for row in rows)
    stale = sum(row.status == "stale" for row in rows)
    facts = [("done", done), ("failed or with errors", bad), ("not finished", len(rows) - done - bad - stale)]
    facts += [("stale: of other settings", stale)] if stale else []
    facts += [(word, sum(row.verdict == word for row in rows)) for word in WORDS if any(row.verdict for row in rows)]
    facts += [("stand out", sum(map(bool, why))), ("nuclei", sum(row.cells or 0 for row in rows))]
    area = sum(row.tissue_mm2 or 0 for row in rows)
    return [*((f"{n:,}", name) for name, n in facts), (f"{area:,.1f}", "mm² searched")]


def _line(
    row: Row, words: Sequence[str], typed: bool, classes: Sequence[str], checks: Sequence[tuple[str, str]],
    pictured: set[str],
) -> Line:  # fmt: skip
    numbers = [_cell(row.cells, ",.0f"), _cell(row.density, ",.0f"), _cell(row.tissue_mm2, ",.2f")]
    numbers += [_cell(row.tiles, ",.0f"), _cell(row.tiles_failed, ",.0f"), _cell(row.seconds, ",.1f")]
    numbers.append(_cell(row.mpp, ".4g"))
    if typed:
        numbers += [_cell(row.typed, ",.0f"), _cell(row.abstained_share, ".1%")]
    numbers += [_cell(share_of(name)(row), ".1%") for name in classes]
    odd = words or row.verdict in ("look", "do not use")
    kinds = {"failed": "failed", "done_with_errors": "errors", "stale": "errors", "done": "out" if odd else ""}
    return Line(
        row=row,
        kind=kinds.get(row.status, "other"),
        folder=quote(row.folder.encode("utf-8", "surrogateescape"), safe=""),
        # The name leads to what a reader wants first; the folder lists everything.
        first=REPORT if REPORT in row.files else "",
        links=tuple((quote(file), _short(file)) for file in row.files),
        numbers=tuple(numbers),
        words=tuple(words),
        marks="".join(SYMBOLS.get(row.checks.get(name, ""), ("i", "·"))[1] for name, _ in checks) if row.checks else "",
        thumbnail=row.thumbnail if row.folder in pictured else "",
    )


def _short(file: str) -> str:
    """Return what a link says of a file, short enough that all of a slide stand on one line."""
    return file.removeprefix("cells.").removesuffix(".html").removesuffix(".json").removesuffix(".geojson") or file


def _cell(value: float | None, form: str) -> Cell:
    return Cell("", "") if value is None else Cell(f"{value:.10g}", f"{value:{form}}")
