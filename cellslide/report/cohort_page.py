"""A cohort as one self-contained HTML page: a row a slide, sorted and filtered by a small script of its own.

The page loads nothing from elsewhere; its links lead to the slides' folders beside it. Without scripts it is still a
table. Names of slides and words of errors are strangers' text: escaped, and quoted in links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from cellslide.report.cohort_row import Row
from cellslide.report.rendering import part, template
from cellslide.types import WORDS

MOST_CLASSES = 8
REPORT = "report.html"


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
    """A row of the table; `folder`, `first` and `links` are quoted for addresses, links with what they say."""

    row: Row
    kind: str
    folder: str
    first: str
    links: tuple[tuple[str, str], ...]
    numbers: tuple[Cell, ...]
    words: tuple[str, ...]

    @property
    def rank(self) -> str:
        """Where the verdict sorts: the worst is the largest."""
        return str([*WORDS].index(self.row.verdict)) if self.row.verdict in WORDS else ""


def page(rows: Sequence[Row], why: Sequence[Sequence[str]], title: str) -> str:
    """Return the page for rows and, of each, why it stands out; its links are relative to the output folder."""
    classes = common_classes(rows)
    typed = any(row.typed is not None for row in rows)
    shares = tuple(Column(name, f"Share of {name} among the cells with a class") for name in classes)
    return template("cohort.html").render(
        title=f"{title}: {len(rows):,} slides",
        style=part("cohort.css"),
        script=part("cohort.js"),
        facts=_facts(rows, why),
        columns=(*COLUMNS, *(TYPED if typed else ()), *shares, *LAST),
        lines=[_line(row, words, typed, classes) for row, words in zip(rows, why, strict=True)],
    )


def common_classes(rows: Sequence[Row]) -> list[str]:
    """Return the classes with most cells over all rows, at most eight, in the order of their first mention."""
    total: dict[str, int] = {}
    for row in rows:
        for name, count in row.classes.items():
            total[name] = total.get(name, 0) + count
    most = sorted(total, key=lambda name: -total[name])[:MOST_CLASSES]
    return [name for name in total if name in most]


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


def _line(row: Row, words: Sequence[str], typed: bool, classes: Sequence[str]) -> Line:
    numbers = [_cell(row.cells, ",.0f"), _cell(row.density, ",.0f"), _cell(row.tissue_mm2, ",.2f")]
    numbers += [_cell(row.tiles, ",.0f"), _cell(row.tiles_failed, ",.0f"), _cell(row.seconds, ",.1f")]
    numbers.append(_cell(row.mpp, ".4g"))
    if typed:
        numbers += [_cell(row.typed, ",.0f"), _cell(row.abstained_share, ".1%")]
    total = sum(row.classes.values())
    numbers += [_cell(row.classes.get(name, 0) / total if total else None, ".1%") for name in classes]
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
    )


def _short(file: str) -> str:
    """Return what a link says of a file, short enough that all of a slide stand on one line."""
    return file.removeprefix("cells.").removesuffix(".html").removesuffix(".json").removesuffix(".geojson") or file


def _cell(value: float | None, form: str) -> Cell:
    return Cell("", "") if value is None else Cell(f"{value:.10g}", f"{value:{form}}")
