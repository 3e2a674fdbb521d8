"""Commands over a labelled data set: the options that they share, and how far they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from cellslide.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from cellslide.evaluate.dataset import Dataset, Sample


def class_map(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Read PREDICTED=TRUE pairs, as a callback of click."""
    wrong = [value for value in values if not all(part.strip() for part in value.partition("=")[::2])]
    if wrong:
        raise click.BadParameter(f"{', '.join(wrong)}: must be PREDICTED=TRUE, such as Neoplastic=tumor")
    return dict(value.split("=", 1) for value in values)


map_class_option = click.option(
    "--map-class", "class_map", multiple=True, callback=class_map, metavar="PREDICTED=TRUE",
    help="Count a predicted class as one of the data set's; may be repeated.",
)  # fmt: skip
dataset_mpp_option = click.option(
    "--mpp", type=click.FloatRange(0.05, 2.0), metavar="F",
    help="Pixel size of the images in µm, over what the manifest says.  [default: the manifest's]",
)  # fmt: skip
dataset_organ_option = click.option(
    "--organ", metavar="NAME", help="Organ of all images.  [default: the manifest's, where the weights know it]"
)


@contextmanager
def image_progress(no_progress: bool) -> Iterator[Progress]:
    """Yield what shows on a terminal how many images of a data set are done."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    with Bars(console=console, disable=no_progress or not console.is_terminal, transient=True) as bars:
        yield _ImageBar(bars)


class _ImageBar(Silent):
    """One bar for a data set, a step an image."""

    def __init__(self, bars: Bars) -> None:
        self.bars, self.task = bars, bars.add_task("")

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        """Start a data set."""
        self.bars.reset(self.task, description=slide_id, total=tiles, completed=done)

    def advance(self, nuclei: int, tiles: int = 1) -> None:
        """Count one more image."""
        self.bars.advance(self.task, tiles)


def tracked(data: Dataset, no_progress: bool) -> Iterator[Sample]:
    """Yield the images of a data set, with a progress bar."""
    with image_progress(no_progress) as progress:
        progress.begin(data.name, len(data), 0)
        for sample in data.samples:
            yield sample
            progress.advance(0)
