"""`cellslide explain`: a page that shows where both paths of the classifier looked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from cellslide.cli import grouped
from cellslide.cli.options import FOLDER, config_option, device_option, model_options, verbosity_options
from cellslide.errors import UsageError


@grouped.define()
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
    from cellslide.api import explain, load_model

    named = model is not None or weights is not None
    page, n = explain(
        outdir, cells=() if cells is None else parse_ids(cells), uncertain=uncertain, disagree=disagree, slide=slide,
        out=output, device=device, runner_up=runner_up,
        model=partial(load_model, model, weights=weights, task="classify", device=device) if named else None,
    )  # fmt: skip
    click.echo(f"{page}  {n} cells")


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
