"""`cellslide classify`: say of every nucleus what it is, how sure that is, and where it is not known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli import grouped
from cellslide.cli.many import cluster_options, copies_in, do_slides, plan_slides, stage_option, strict_option
from cellslide.cli.options import (
    FILE,
    batch_size_option,
    chain,
    devices_option,
    fluorescence_option,
    format_option,
    geojson_options,
    model_options,
    output_option,
    precision_option,
    run_options,
    seed_option,
    settings_of,
)

if TYPE_CHECKING:
    from cellslide.config import ClassifyConfig

organ_option = click.option(
    "--organ", metavar="NAME", help="Organ of the slides.  [default: the list's column organ, else unknown]"
)

decision_options = chain(
    click.option(
        "--gate", type=click.Choice(["mix", "safe", "local", "global"]),
        help="Which probabilities decide: the gate's mix, the safe gate's choice, or one path.  "
        "[default: the weights']",
    ),
    click.option("--tau", type=float, help="Safe gate: least gate weight.  [default: the weights']"),
    click.option("--gamma", type=float, help="Safe gate: least difference of confidence.  [default: the weights']"),
    click.option("--thresholds", type=FILE, help="Least probability per class: CSV class,threshold, or YAML."),
    click.option("--abstain", type=float, metavar="P", help="Least probability of any class; below it none is said."),
    click.option(
        "--prior", metavar="CLASS=SHARE,...",
        help="How frequent the classes are expected to be, such as lymphocyte=0.1,...  [default: as calibrated]",
    ),
    click.option(
        "--taxonomy", metavar="lung|ovary|pancreas|FILE", help="Also project the classes; columns projected, mass_lost."
    ),
)  # fmt: skip

network_options = chain(
    click.option(
        "--paths", type=click.Choice(["both", "local"]),
        help="Run both paths, so that any rule may follow, or the local one alone, which needs no context.  [default: "
        "what --gate needs, else the weights']",
    ),
    click.option("--context-size", type=int, metavar="N", help="Edge of the context in px.  [default: the weights']"),
    click.option(
        "--context-grid", type=int, metavar="N",
        help="Cells of one box of N px (of the classifier's pixel size) share a context.  [default: each its own]",
    ),
    click.option(
        "--adaptive", type=float, metavar="P",
        help="Skip the global path where the local one is sure by P, calibrated.  [default: never]",
    ),
    click.option("--max-cells", type=int, metavar="N", help="Type at most N cells of a slide, drawn by --seed."),
    click.option("--sample", type=float, metavar="F", help="Type this share of the cells, drawn by --seed."),
)  # fmt: skip

cells_options = chain(
    click.option("--cells", type=FILE, help="Nuclei that another tool found, on the one slide that is named."),
    click.option(
        "--cells-unit", type=click.Choice(["px", "um"]), default="px", show_default=True,
        help="Unit of their coordinates: level-0 pixels or µm.",
    ),
    click.option("--cells-mpp", type=float, metavar="F", help="µm of a pixel of theirs, where it is not level 0's."),
    click.option("--alignment", type=FILE, help="CSV of 3x3 numbers between their coordinates and the slide's pixels."),
    click.option(
        "--alignment-direction", type=click.Choice(["slide-to-cells", "cells-to-slide"]), default="slide-to-cells",
        show_default=True, help="What the matrix takes to what; Xenium Explorer exports slide-to-cells.",
    ),
)  # fmt: skip

torch_options = chain(
    devices_option,
    batch_size_option("Local crops per forward pass; contexts by their share of pixels."),
    precision_option,
    click.option("--compile", is_flag=True, help="Compile the network first."),
    seed_option,
)


@grouped.define()
@click.argument("slides", nargs=-1, required=True, metavar="SLIDES_OR_OUTPUTS...")
@output_option
@model_options
@organ_option
@decision_options
@cells_options
@network_options
@click.option("--roi", type=FILE, help="GeoJSON with polygons, zero point as --geojson-origin; types cells inside.")
@click.option("--mpp", type=float, metavar="F", help="Pixel size of the slides in µm, where their files do not tell.")
@fluorescence_option
@torch_options
@format_option()
@geojson_options
@cluster_options
@stage_option
@click.option("--regate", is_flag=True, help="Apply another rule to typed cells; runs no network.")
@click.option("--overwrite", is_flag=True, help="Type anew what was typed with other settings.")
@click.option("--dry-run", is_flag=True, help="List cells and an estimate of the time, and stop.")
@strict_option
@run_options
def command(
    slides: tuple[str, ...],
    output: Path,
    scheduler: str | None,
    jobs: int | None,
    stage_dir: Path | None,
    regate: bool,
    dry_run: bool,
    no_progress: bool,
    log_json: bool,
    strict: bool,
    **settings: Any,
) -> int:
    """Type the nuclei of slides: SLIDES whose cells.zarr lies in -o DIR, or the folders that `segment` wrote.

    The table gains class (what is decided), class_top, class_prob, gate, path, abstained and organ, and the
    probabilities of both paths, so that any rule can be applied later. The same command again goes on where it stopped.

    \b
    Examples:
      cellslide classify out/slide --organ breast
      cellslide classify slides/ -o out --organ lung --abstain 0.5
      cellslide classify out --abstain 0.7 --regate
      cellslide classify slide.svs -o out --cells qupath.geojson --organ breast
    """
    from cellslide.batch.executor import Inline, choose_executor
    from cellslide.batch.preflight import check_output
    from cellslide.batch.work import ClassifyWork, RegateWork, SlideWork, bring_cells
    from cellslide.classify.rule_settings import RuleSettings
    from cellslide.classify.targets import expand_targets
    from cellslide.config import parse_devices

    config, rule = to_config(settings), settings_of(RuleSettings, settings)
    targets = expand_targets(slides, output)
    typing = ClassifyWork(config, rule)
    if config.cells is not None:
        # Nothing is brought for a request that will be refused.
        typing.check()
        check_output(output)
        if dry_run and not all(target.has_cells for target in targets):
            click.echo(f"{config.cells}: its nuclei would be brought into {targets[0].folder}, then typed")
            return 0
        targets = [bring_cells(targets, config)]
    devices = parse_devices(config.infer.device)
    shown = {"log_json": log_json, "no_progress": no_progress, "strict": strict}
    if regate:
        again = RegateWork(config, rule)
        if dry_run:
            return plan_slides(again, targets, devices[0], output)
        return do_slides(again, targets, Inline(devices[0]), output, slides, **shown)
    executor, work = choose_executor(devices, scheduler, jobs), SlideWork(None, typing, copies_in(stage_dir))
    if dry_run:
        return plan_slides(work, targets, devices[0], output)
    return do_slides(work, targets, executor, output, slides, **shown)


def to_config(flags: Mapping[str, Any]) -> ClassifyConfig:
    """Return the settings that the flags give; raises UsageError for values out of range."""
    from cellslide.config import ClassifyConfig, InferConfig, OutputConfig

    infer, output = settings_of(InferConfig, flags), settings_of(OutputConfig, flags)
    return settings_of(ClassifyConfig, flags, infer=infer, output=output)
