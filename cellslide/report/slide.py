"""The report of one slide's folder: one pass over its table, a look at the slide, one page written in one step."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from cellslide.errors import SlideError, TileError, in_words
from cellslide.plausibility.verdict import judge
from cellslide.report.page import Budget, Material, render, shown_each
from cellslide.report.pixels import Crop, cut_crops, read_picture
from cellslide.report.quality import notes
from cellslide.report.regions import read_searched
from cellslide.report.statistics import CellStatistics, Frame, tally_cells
from cellslide.slides.reopen import reopen_or_why
from cellslide.slides.slide import Slide
from cellslide.store.atomic import write_text
from cellslide.store.cell_table import CellTable, open_table
from cellslide.store.lock import hold
from cellslide.store.run_record import RUN_FILE, TABLE, read_record
from cellslide.types import UInt8

PAGE_FILE = "report.html"
# Mail and browsers take a megabyte; the first budget that fits is used.
MOST_BYTES = 980_000
BUDGETS = (Budget(75, 120), Budget(55, 90), Budget(35, 60), Budget(15, 24))

log = logging.getLogger(__name__)


def needs_report(folder: Path) -> bool:
    """Tell whether a slide's folder holds cells, and no report that is newer than they are."""
    if not (folder / TABLE).is_dir() or not (folder / RUN_FILE).is_file():
        return False
    page = folder / PAGE_FILE
    return not page.is_file() or page.stat().st_mtime_ns < (folder / RUN_FILE).stat().st_mtime_ns


def keep_report(folder: Path, slide_path: Path) -> None:
    """Write the page of a slide that a run is done with, where it is needed; what goes wrong is only said.

    slide_path  where the slide can be read best, if it is there; its copy on a local disk, for one.
    """
    try:
        if needs_report(folder):
            with hold(folder):
                write_report(folder, slide_path if slide_path.exists() else None)
    except Exception as error:  # The page is an extra: whatever is wrong with it, the cells are there.
        log.debug("%s: no report", folder, exc_info=error)
        log.warning("%s: no report: %s", folder, in_words(error))


def write_report(folder: Path, slide_path: Path | None = None) -> Path:
    """Write `report.html` into the folder of a slide whose cells are found, and return where it is.

    slide_path  where the slide is now, if it is not where it was; without the slide the page has no pictures.
    Raises TableError where there are no cells, UsageError where `slide_path` is another slide.
    """
    with ExitStack() as stack:
        table = stack.enter_context(open_table(folder / TABLE))
        slide, gone = reopen_or_why(table, slide_path, insist=slide_path is not None)
        if slide is not None:
            stack.enter_context(slide)
        text = fitted(gather(folder, table, slide, gone))
    page = folder / PAGE_FILE
    write_text(page, text)
    return page


def fitted(material: Material) -> str:
    """Return the page by the widest budget that keeps it small."""
    for budget in BUDGETS:
        text = render(material, budget)
        if len(text.encode("utf-8", "backslashreplace")) < MOST_BYTES:
            break
    return text


def gather(folder: Path, table: CellTable, slide: Slide | None, gone: str | None) -> Material:
    """Find out all that the page says."""
    record = read_record(folder) or table.run
    searched = read_searched(folder, table.slide, record)
    tally = tally_cells(table, Frame.of(table.slide, searched.box()))
    picture: UInt8 | None = None
    crops: dict[int, Crop] = {}
    if slide is not None:
        picture, crops, gone = look(slide, table, tally)
    # Records of earlier versions hold none.
    verdict = record.verdict or judge(table, record)
    further = tuple(notes(record, str(table.slide.mpp_source), gone))
    return Material(table, record, tally, searched, verdict, further, crops, picture)


def look(slide: Slide, table: CellTable, tally: CellStatistics) -> tuple[UInt8 | None, dict[int, Crop], str | None]:
    """Return picture and crops; of a slide that is damaged what can be had, and why not all."""
    gone = None
    try:
        picture: UInt8 | None = read_picture(slide, tally.frame)
    except (TileError, SlideError) as error:
        picture, gone = None, f"No picture: {error}"
    each = shown_each(tally, BUDGETS[0])
    picks = [pick for k, kind in tally.picks.kept for pick in tally.picks.of(k, kind, each)]
    return picture, cut_crops(slide, table, picks), gone
