"""What `classify` works on: slides whose cells lie in the output folder, or output folders that name their slide."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cellslide.errors import SlideError, UsageError, in_words
from cellslide.slides.identity import other_slide
from cellslide.slides.inputs import SlideInput, expand_slides
from cellslide.slides.reopen import slide_path
from cellslide.slides.slide import Slide, open_slide
from cellslide.store.cell_table import open_table
from cellslide.store.foreign_files import is_plain
from cellslide.store.recovery import put_back, tables_below
from cellslide.store.run_record import TABLE, read_record
from cellslide.types import SlideInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """A slide and the folder of its cells; `known` is what the cell table says of the slide, where that named it.

    why  its table cannot be read, where that is known already.
    """

    source: SlideInput
    folder: Path
    known: SlideInfo | None = None
    why: str = ""

    @property
    def has_cells(self) -> bool:
        """True where the folder holds a cell table."""
        return (self.folder / TABLE).is_dir()


def expand_targets(args: Sequence[str], out_dir: Path) -> list[Target]:
    """Return the slides that slides, lists, folders of slides, and output folders name, each once.

    Raises UsageError for what is not there.
    """
    found: dict[Path, Target] = {}
    slides: list[str] = []
    for arg in args:
        tables = tables_below(Path(arg))
        for table in tables:
            found.setdefault(table.parent.resolve(), _from_table(table))
        if not tables:
            slides.append(arg)
    if slides:
        put_back(out_dir, TABLE)
    for source in expand_slides(slides) if slides else ():
        folder = out_dir / source.slide_id
        found.setdefault(folder.resolve(), Target(source, folder))
    return list(found.values())


def _from_table(path: Path) -> Target:
    """Return the slide of a table; one that cannot be read fails in its turn, and ends no other."""
    try:
        with open_table(path) as table:
            info = replace(table.slide, path=slide_path(table))
    except Exception as error:
        log.debug("%s", path, exc_info=error)
        return Target(SlideInput(path.parent, slide_id=path.parent.name), path.parent, why=in_words(error))
    return Target(SlideInput(info.path, slide_id=info.slide_id), path.parent, info)


def open_target(target: Target, mpp: float | None, allow_fluorescence: bool = False) -> Slide:
    """Open the slide of a target; `mpp` is that of `--mpp`.

    A slide of fluorescence is read where that is allowed, or where an output folder says that it was read before.

    Raises SlideError where an output folder names a slide that is not there any more.
    """
    known, source = target.known, target.source
    if known is not None and not is_plain(known.path):
        raise SlideError(
            f"{target.folder}: its slide {known.path} is not there any more; name the slide, and its results by "
            f"-o {target.folder.parent}"
        )
    told = None if known is None or known.mpp_source not in ("flag", "list") else known.mpp_x
    given = source.mpp if source.mpp is not None else told
    allowed = allow_fluorescence or known is not None
    if mpp is None:
        return open_slide(source.path, given, "list", source.slide_id, source.local, allowed)
    return open_slide(source.path, mpp, "flag", source.slide_id, source.local, allowed)


def require_cells(target: Target) -> None:
    """Raise UsageError where a slide has no cells to type, SlideError where its table cannot be read."""
    if target.why:
        raise SlideError(target.why)
    if not target.has_cells:
        raise UsageError(
            f"{target.folder}: no {TABLE} here; run `cellslide segment` with the same -o first, use `cellslide run`, "
            "or give nuclei by --cells FILE"
        )


def check_slide(target: Target, slide: Slide) -> None:
    """Raise SlideError where the cells were found on another slide: of another size, or with other bytes."""
    with open_table(target.folder / TABLE) as table:
        info = table.slide
    sizes = [(i.width_px, i.height_px) for i in (info, slide.info)]
    if sizes[0] != sizes[1]:
        raise SlideError(
            f"{slide.info.path}: {sizes[1]} pixels, the cells in {target.folder} lie on {sizes[0]}; use another -o"
        )
    if words := other_slide(read_record(target.folder), slide.info.path, target.source.local):
        raise SlideError(f"{target.folder}: {words}; use another -o")
