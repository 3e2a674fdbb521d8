"""Tables of several slides in one file, as QuPath writes them of a project: which rows are of the slide at hand."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from cellslide.errors import UsageError
from cellslide.types import SlideInfo

# Names of columns as `_plain` makes them, the best first.
IMAGES = (
    "image", "image_name", "image_id", "imageid", "image_file", "slide", "slide_name", "slide_id", "wsi", "wsi_name",
    "wsi_id", "filename", "file_name", "file", "sample", "sample_id",
)  # fmt: skip
MOST_IMAGES = 10_000

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ImageSurvey:
    """The names of images in a column of a file."""

    column: str
    names: dict[str, None] = field(default_factory=dict)

    def see(self, names: list[str], where: Path) -> None:
        """Take the names of some rows; raises UsageError for more than any project has."""
        self.names.update(dict.fromkeys(names))
        if len(self.names) > MOST_IMAGES:
            raise UsageError(
                f"{where}: more than {MOST_IMAGES:,} names in its column {self.column}; which are its images?"
            )

    def wanted(self, info: SlideInfo, where: Path) -> str | None:
        """Return the name of the rows to take, None for all rows.

        Raises UsageError where there are rows of several images and not exactly one is the slide.
        """
        names = [name for name in self.names if name]
        mine = [name for name in names if _is_of(name, info)]
        few = ", ".join(names[:4])[:160] + (", ..." if len(names) > 4 else "")
        if len(self.names) <= 1:
            if names and not mine:
                _log.warning(
                    "%s: its %s is %s, the slide is %s; is that meant?", where, self.column, few, info.path.name
                )
            return None
        exact = [name for name in mine if name in (info.path.name, str(info.path))] or mine
        if len(exact) == 1:
            return exact[0]
        what = "more than one of them may be" if mine else "none of them is"
        raise UsageError(
            f"{where}: holds several images by its column {self.column} ({few}), {what} {info.path.name}; leave "
            "the rows of the slide alone in it"
        )


def _is_of(name: str, info: SlideInfo) -> bool:
    """Tell whether an image is called as a slide: with its ending or without, with a path, or a series behind it."""
    own = {info.path.name, info.path.stem, info.slide_id, info.path.stem.removesuffix(".ome")}
    last = re.split(r"[/\\]", name.strip())[-1]
    words = {last, last.rsplit(".", 1)[0], re.sub(r" (- |\[|\().*$", "", last)}
    return bool({w.casefold() for w in words} & {o.casefold() for o in own})
