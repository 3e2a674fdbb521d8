"""`cellslide bench`: measure the speed of single stages on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli import grouped
from cellslide.cli.options import FOLDER, device_option, model_options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cellslide.bench import Machine, Row

# Those of cellslide.bench, which help must not load.
STAGES = ("read", "decode", "merge", "write", "crops", "infer", "classify")
CPU_STAGES = STAGES[:5]
# Wide enough for every row where the output is no terminal.
WIDTH = 160


@grouped.define(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("stages", nargs=-1, type=click.Choice((*STAGES, "all")), metavar=f"[{'|'.join(STAGES)}|all]...")
@click.option(
    "--slide", type=click.Path(exists=True, path_type=Path), help="read, crops: a slide of yours.  [default: painted]"
)
@click.option(
    "--nuclei",
    type=click.IntRange(1),
    help="How many.  [default: decode 800 in 1024 px; merge, write 1,000,000; crops 20,000; classify 200]",
)
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Repeats; shows the median.")
@model_options
@click.option(
    "--random",
    "random_size",
    type=click.Choice(["full", "small"]),
    help="classify: a network of random weights, as large as the published one or small.",
)
@click.option(
    "--cells-of", type=FOLDER, metavar="SLIDEDIR", help="classify: a slide's folder.  [default: painted cells]"
)
@click.option("--context-size", type=int, metavar="N", help="classify: edge of the context in px.")
@click.option("--batch-size", type=click.IntRange(1), help="classify: local crops in one pass.  [default: auto]")
@click.option("--compile", is_flag=True, help="classify: also measure the compiled network.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(stages: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Measure the speed of the stages on this machine: those that need no network, those named, or all.

    \b
    read      tiles of a slide, beside OpenSlide
    decode    HoVer maps of one tile to nuclei, beside the plain published form
    merge     overlapping tiles to one list of nuclei, beside outlines compared one by one
    write     table, GeoParquet and the QuPath file, beside features made one by one; and their memory
    crops     crops around nuclei, beside one read a crop
    infer     the networks, beside the same networks run plainly; how stages overlap; the start
    classify  the same cells typed with each saving, and how it changes the probabilities

    Medians of CPU time; the ratio says how many times better than the stage's first row. With the first five, also
    what they come to on a slide of 300,000 nuclei.

    \b
    Example:
      cellslide bench
      cellslide bench read crops --slide a.svs
      cellslide bench merge --nuclei 200000 --json
      cellslide bench classify --random full --device cuda --context-size 512
    """
    from cellslide.bench import BenchOptions, as_record, machine, measure
    from cellslide.bench.whole import segmented_row, whole_rows

    options, here = BenchOptions(**flags), machine()
    chosen = STAGES if "all" in stages else dict.fromkeys(stages or CPU_STAGES)
    if not as_json:
        click.echo(_described(here))
    rows: dict[str, list[Row]] = {}
    for stage in chosen:
        rows[stage] = list(measure(stage, options))
        if not as_json:
            _show(rows[stage])
    if whole := whole_rows(rows):
        rows["whole"] = [*whole, segmented_row()]
        if not as_json:
            _show(rows["whole"])
    if as_json:
        lists = {stage: [as_record(row) for row in found] for stage, found in rows.items()}
        click.echo(json.dumps({"rounds": options.rounds, "machine": asdict(here), "stages": lists}))


def _described(here: Machine) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    return f"{here.processor}, {here.cores} cores, {here.gpu or 'no GPU'}, {here.system}\n{versions}"


def _show(rows: Iterable[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("stage", "form"):
        table.add_column(name)
    for name in ("value", "least"):
        table.add_column(name, justify="right")
    table.add_column("unit")
    for name in ("count", "ratio"):
        table.add_column(name, justify="right")
    for name in ("target", "met", "note"):
        table.add_column(name)
    for row in rows:
        table.add_row(*_words(row))
    console = Console()
    Console(width=max(console.width, WIDTH) if not console.is_terminal else None).print(table)


def _words(row: Row) -> tuple[str, ...]:
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    met = {None: "", True: "yes", False: "no"}[row.met]
    return (
        row.stage, row.form, _number(row.value), _number(row.least), row.unit, f"{row.count:,}", ratio,
        row.target, met, row.note,
    )  # fmt: skip


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
