"""`cellslide explain`: a page that shows where both paths of the classifier looked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellslide.cli.options import FOLDER, config_option, device_option, model_options, verbosity_options
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.report.explain import Selection
    from cellslide.weights.classifier import LoadedClassifier


@click.command()
@click.argument("outdir", type=FOLDER)
@click.option("--cells", metavar="IDS", help="These cells, with commas: cell_id, a range such as 10-20, or uuid.")
@click.option("--uncertain", type=int, metavar="N", help="The N cells of lowest class_prob.")
@click.option("--disagree", type=int, metavar="N", help="The N cells whose paths are surest of different classes.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="HTML",
    help="Where to write the page.  [default: OUTDIR/explain.html]",
)  # fmt: skip
@click.option("--slide", type=click.Path(exists=True, path_type=Path), help="The slide, where it has moved since.")
@click.option(
    "--runner-up", is_flag=True, help="Show where the second class was found too; --disagree does so by itself."
)
@model_options
@device_option
@config_option
@verbosity_options
def command(
    outdir: Path,
    cells: str | None,
    uncertain: int | None,
    disagree: int | None,
    output: Path | None,
    slide: Path | None,
    runner_up: bool,
    model: str | None,
    weights: Path | None,
    device: str,
) -> None:
    """Show why cells were typed as they were, for OUTDIR, the folder of one slide that `cellslide classify` finished.

    One HTML page that needs nothing else: crops with the nucleus and a scale bar, Grad-CAM of both paths, their top
    classes, the gate and the decision. Without --model or --weights the classifier is
    the one that run.json names.

    \b
    Examples:
      cellslide explain out/slide --uncertain 20
      cellslide explain out/slide --disagree 30 -o disagree.html
      cellslide explain out/slide --cells 17,40-45 --runner-up
    """
    selection = to_selection(cells, uncertain, disagree)
    from cellslide.report.explain import explain_slide

    loaded = classifier_of(outdir, model, weights)
    both = runner_up or selection.kind == "disagree"
    page, n = explain_slide(outdir, selection, loaded, output, moved_to=slide, runner_up=both, device=device)
    click.echo(f"{page}  {n} cells")


def to_selection(cells: str | None, uncertain: int | None, disagree: int | None) -> Selection:
    """Return the choice that the flags give; raises UsageError unless exactly one is given."""
    from cellslide.report.explain import Selection

    if sum(value is not None for value in (cells, uncertain, disagree)) != 1:
        raise UsageError("give one of --cells IDS, --uncertain N and --disagree N")
    if uncertain is not None:
        return Selection("uncertain", uncertain)
    if disagree is not None:
        return Selection("disagree", disagree)
    return Selection("cells", ids=parse_ids(cells or ""))


def parse_ids(text: str) -> tuple[str, ...]:
    """Return the ids that `7,10-12,UUID` names, each once, in that order; raises UsageError where it names none."""
    ids: list[str] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = word.partition("-")
        if dash and first.isdigit() and last.isdigit():
            ids += map(str, range(int(first), int(last) + 1))
        else:
            ids.append(str(int(word)) if word.isdigit() else word.lower())
    if not ids:
        raise UsageError(f"--cells {text!r}: must be ids with commas, such as 7,10-12")
    return tuple(dict.fromkeys(ids))


def classifier_of(folder: Path, model: str | None, weights: Path | None) -> LoadedClassifier:
    """Load the classifier that the flags name, else the one that typed the cells of a slide's folder."""
    from cellslide.report.explain.slide import how_typed
    from cellslide.store.run_record import read_record
    from cellslide.weights.classifier import load_classifier

    record = read_record(folder)
    if record is None:
        raise UsageError(f"{folder}: no run.json here; give the folder of one slide that `cellslide classify` finished")
    if model is None and weights is None:
        settings = how_typed(folder, record)
        weights = Path(settings["weights"]) if settings.get("weights") else None
        model = None if weights else str(settings["spec"]["weights_id"])
    return load_classifier(model, weights)
