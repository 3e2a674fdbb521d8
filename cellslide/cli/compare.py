"""`cellslide compare`: two results of the same slides, nucleus by nucleus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellslide.cli import grouped
from cellslide.cli.guarded import each, refuse
from cellslide.cli.options import FOLDER, verbosity_options

if TYPE_CHECKING:
    from cellslide.report.compare import Comparison

# Slides that the page shows in full, those that agree least; all stand in its table.
MOST_PICTURED = 12


@grouped.define()
@click.argument("first", type=FOLDER, metavar="OUT_A")
@click.argument("second", type=FOLDER, metavar="OUT_B")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="HTML", default="compare.html",
    show_default=True, help="Where to write the page.",
)  # fmt: skip
@click.option(
    "--radius-um", type=click.FloatRange(min=0, min_open=True), default=3.0, show_default=True,
    help="Centres nearer than this are one nucleus.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, one per slide, and no page.")
@verbosity_options
def command(first: Path, second: Path, output: Path, radius_um: float, as_json: bool) -> None:
    """Compare two results: nuclei that both found, changed classes, agreement by region, with pictures.

    OUT_A and OUT_B are output folders, or the folders of one slide each: two models, two rules, two pixel sizes. Output
    folders are compared slide by slide. Nothing in them is changed.

    \b
    Examples:
      cellslide compare out-a out-b
      cellslide compare out/slide corrected/slide -o changes.html
      cellslide compare out-a out-b --json > agreement.jsonl
    """
    from cellslide.report.compare import compare_slide, pair_folders, render_comparison, take_pictures

    pairs, *alone = pair_folders(first, second)
    by_folder = {pair.second: pair for pair in pairs}
    found: list[Comparison] = []

    def work(folder: Path) -> None:
        comparison = compare_slide(by_folder[folder], radius_um)
        if as_json:
            click.echo(json.dumps(comparison.facts()))
            return
        click.echo(_line(comparison))
        found.append(comparison)

    failed = each(by_folder, work)
    if found:
        from cellslide.store.atomic import write_text

        found.sort(key=lambda c: (1.0 if c.agreement.f1 is None else c.agreement.f1, c.pair.slide_id))
        pictures = [take_pictures(comparison, radius_um) for comparison in found[:MOST_PICTURED]]
        names = (str(first), str(second))
        write_text(output, render_comparison(found, pictures, names, (alone[0], alone[1]), radius_um))
        click.echo(str(output))
    refuse(failed, "slides could not be compared")


def _line(comparison: Comparison) -> str:
    found = comparison.agreement
    f1 = "no nuclei" if found.f1 is None else f"agreement {found.f1:.3f}"
    typed = "" if found.same_class is None else f", same class {found.same_class:.1%}"
    counts = f"{found.first:,} and {found.second:,} nuclei, {found.both:,} in both"
    return f"{comparison.pair.slide_id}  {counts}, {f1}{typed}"
