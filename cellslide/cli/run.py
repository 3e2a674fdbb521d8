"""`cellslide run`: slides in, typed nuclei out; what `segment` and `classify` do, in one pass over each slide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellslide.cli import grouped
from cellslide.cli.classify import decision_options, network_options, organ_option
from cellslide.cli.classify import to_config as to_classify_config
from cellslide.cli.many import (
    choose_slides,
    cluster_options,
    copies_in,
    do_slides,
    plan_slides,
    shard_option,
    stage_option,
    strict_option,
)
from cellslide.cli.options import (
    FILE,
    chain,
    fluorescence_option,
    format_option,
    geojson_options,
    infer_options,
    model_options,
    output_option,
    run_options,
    settings_of,
    shipped_by_name,
    slides_argument,
    tile_options,
    tissue_options,
    tta_option,
)
from cellslide.cli.segment import to_config as to_segment_config

classifier_options = chain(
    click.option(
        "--classifier",
        metavar="ID",
        callback=shipped_by_name,
        help="Classifier from `cellslide weights list`.  [default: what ships]",
    ),
    click.option("--classifier-weights", type=FILE, help="Weights file of a classifier."),
)


@grouped.define()
@slides_argument
@output_option
@model_options
@classifier_options
@organ_option
@decision_options
@network_options
@click.option("--mpp", type=float, metavar="F", help="Pixel size of the slides in µm, where their files do not tell.")
@fluorescence_option
@tissue_options
@format_option()
@geojson_options
@infer_options
@tta_option
@tile_options
@shard_option
@cluster_options
@stage_option
@click.option("--overwrite", is_flag=True, help="Start anew; without it, finished slides are skipped, others resumed.")
@click.option("--dry-run", is_flag=True, help="List slides, tiles and what they would take, and stop.")
@strict_option
@run_options
def command(
    slides: tuple[str, ...],
    output: Path,
    classifier: str | None,
    classifier_weights: Path | None,
    shard: tuple[int, int] | None,
    scheduler: str | None,
    jobs: int | None,
    stage_dir: Path | None,
    dry_run: bool,
    no_progress: bool,
    log_json: bool,
    strict: bool,
    **settings: Any,
) -> int:
    """Find and type every nucleus of SLIDES: files, folders, patterns, web addresses, or one .csv or .txt list.

    Each slide gets the folder that `segment` writes, its cells typed as `classify` does it. The same command again
    skips what is done and goes on where it stopped.

    \b
    Examples:
      cellslide run slide.svs -o out --organ breast
      cellslide run slides.csv -o out --organ lung --abstain 0.5 --format zarr,geojson,csv
    """
    found = to_segment_config(**settings)
    typed = to_classify_config({**settings, "model": classifier, "weights": classifier_weights})
    if not (targets := choose_slides(slides, output, shard)):
        return 0
    from cellslide.batch.executor import choose_executor
    from cellslide.config import parse_devices

    devices = parse_devices(found.infer.device)
    executor = choose_executor(devices, scheduler, jobs)
    from cellslide.batch.work import ClassifyWork, SegmentWork, SlideWork
    from cellslide.classify.rule_settings import RuleSettings

    work = SlideWork(SegmentWork(found), ClassifyWork(typed, settings_of(RuleSettings, settings)), copies_in(stage_dir))
    if dry_run:
        return plan_slides(work, targets, devices[0], output)
    return do_slides(work, targets, executor, output, log_json=log_json, no_progress=no_progress, strict=strict)
