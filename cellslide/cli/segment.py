"""`cellslide segment`: find every nucleus of one or many slides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli import grouped
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
    fluorescence_option,
    format_option,
    geojson_options,
    infer_options,
    model_options,
    output_option,
    run_options,
    settings_of,
    slides_argument,
    tile_options,
    tissue_options,
    tta_option,
)

if TYPE_CHECKING:
    from cellslide.config import SegmentConfig


@grouped.define()
@slides_argument
@output_option
@model_options
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
@click.option(
    "--overwrite", is_flag=True, help="Start anew; without it, finished slides are skipped and others resumed."
)
@click.option("--dry-run", is_flag=True, help="List slides, tiles and an estimate of the time, and stop.")
@strict_option
@run_options
def command(
    slides: tuple[str, ...],
    output: Path,
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
    """Find every nucleus of SLIDES: files, folders, patterns, web addresses, or one .csv or .txt list.

    Each slide gets a folder with cells.zarr, cells.geojson.gz for QuPath, tissue.geojson and run.json. The same command
    again skips what is done and goes on where it stopped. Models give outlines, or boxes or points: `cellslide weights
    list --task detect` names those.

    \b
    Examples:
      cellslide segment slide.svs -o out
      cellslide segment 'slides/*.ndpi' -o out --device cuda:1 --format zarr,geojson,csv
      cellslide segment slide.svs -o points --model detect
      cellslide segment scan.tif -o out --mpp 0.25 --roi tumour.geojson
      cellslide segment slides.csv -o out --shard 2/8 --log-json
      cellslide segment slides.csv -o out --device cuda:0,1,2,3 --stage-dir /scratch
      cellslide segment slides.csv -o out --scheduler scheduler.json
    """
    config = to_config(**settings)
    if not (targets := choose_slides(slides, output, shard)):
        return 0
    from cellslide.batch.executor import choose_executor
    from cellslide.config import parse_devices

    devices = parse_devices(config.infer.device)
    executor = choose_executor(devices, scheduler, jobs)
    from cellslide.batch.work import SegmentWork, SlideWork

    work = SlideWork(SegmentWork(config), copies=copies_in(stage_dir))
    if dry_run:
        return plan_slides(work, targets, devices[0], output)
    return do_slides(work, targets, executor, output, log_json=log_json, no_progress=no_progress, strict=strict)


def to_config(no_tissue: bool, tissue_mask: Path | None, roi: Path | None, **flags: Any) -> SegmentConfig:
    """Return the settings that the flags give; raises UsageError for values out of range."""
    from cellslide.config import InferConfig, OutputConfig, SegmentConfig, TileConfig, TissueConfig

    return settings_of(
        SegmentConfig,
        flags,
        tissue=TissueConfig(not no_tissue, tissue_mask, roi, roi_origin=flags["geojson_origin"]),
        tiles=TileConfig(flags["tile_size"], flags["overlap"]),
        infer=settings_of(InferConfig, flags),
        output=settings_of(OutputConfig, flags),
    )
