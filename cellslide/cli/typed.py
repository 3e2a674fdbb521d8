"""A classifier over a labelled data set: what `evaluate` and `calibrate` share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.classify import Classifier
    from cellslide.evaluate.dataset import Dataset, Sample
    from cellslide.evaluate.paths import PathPredictor, TypedCells
    from cellslide.evaluate.score import ClassSet
    from cellslide.types import ClassifierSpec

log = logging.getLogger(__name__)


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


def is_classifier(model: str | None, weights: Path | None) -> bool:
    """Say whether an id, or the `model.yaml` beside a weights file, names a classifier."""
    from cellslide.weights import Manifest

    if model is not None:
        entry = Manifest.load().entries.get(model)
        return entry is not None and entry.task == "classify"
    if weights is None:
        return False
    from cellslide.weights.load import entry_beside

    beside = entry_beside(weights)
    return beside is not None and beside.task == "classify"


def predictor(classifier: Classifier, organ: str | None) -> PathPredictor:
    """Return what types cells (N, 2) of an image, in its pixels."""
    from cellslide.evaluate.predictors import path_predictor
    from cellslide.weights.organs import organ_by_text

    return path_predictor(classifier, organ_by_text(classifier.spec, organ))


def warn_of_unknown_organs(data: Dataset, spec: ClassifierSpec, organ: str | None) -> None:
    """Say which organs of the manifest the weights do not know; `--organ` says its own warning."""
    if organ is not None or not spec.organs:
        return
    from cellslide.weights.organs import organ_by_text

    find = organ_by_text(spec)
    unknown = sorted({sample.organ or "(none)" for sample in data.samples if find(sample.organ) < 0})
    if unknown:
        log.warning(
            "organs that the weights do not know: %s (they know %s)", ", ".join(unknown), ", ".join(spec.organs)
        )


def gather_cells(
    data: Dataset, classes: ClassSet, predict: PathPredictor, mpp: float | None, no_progress: bool
) -> TypedCells:
    """Type the annotated nuclei of all images, with a progress bar."""
    from cellslide.evaluate.paths import gather

    with image_progress(data, no_progress) as advance:
        return gather(data, classes, predict, mpp, advance)


def tracked(data: Dataset, no_progress: bool) -> Iterator[Sample]:
    """Yield the images of a data set, with a progress bar."""
    with image_progress(data, no_progress) as advance:
        for sample in data.samples:
            yield sample
            advance()


@contextmanager
def image_progress(data: Dataset, no_progress: bool) -> Iterator[Callable[[], None]]:
    """Yield what is called after each image of a data set, to show on a terminal how far it is."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=no_progress or not console.is_terminal, transient=True) as progress:
        task = progress.add_task(data.name, total=len(data))
        yield lambda: progress.advance(task)


def require_classes(data: Dataset, names: tuple[str, ...]) -> None:
    """Raise UsageError where the points of a data set have no classes."""
    if not names:
        raise UsageError(f"{data.root}: its points have no classes, which a classifier is compared with")
