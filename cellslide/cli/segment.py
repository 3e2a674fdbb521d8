"""`cellslide segment`: find every nucleus of one or many slides."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli.options import (
    format_option,
    geojson_options,
    infer_options,
    model_options,
    output_option,
    run_options,
    slides_argument,
    tile_options,
    tissue_options,
)

if TYPE_CHECKING:
    from cellslide.batch import SlideOutcome
    from cellslide.config import SegmentConfig
    from cellslide.segmenter import Segmenter
    from cellslide.slides import SlideInput


def _shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    number, _, count = value.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise click.BadParameter(f"{value!r}: must be I/N with I from 1 to N, such as 2/8")
    return int(number), int(count)


shard_option = click.option("--shard", metavar="I/N", callback=_shard, help="Only part I of N of the slides, I from 1.")


@click.command()
@slides_argument
@output_option
@model_options
@click.option("--mpp", type=float, metavar="F", help="Pixel size of the slides in µm, where their files do not tell.")
@tissue_options
@format_option()
@geojson_options
@infer_options
@tile_options
@shard_option
@click.option(
    "--overwrite", is_flag=True, help="Start anew; without it, finished slides are skipped and others resumed."
)
@click.option("--dry-run", is_flag=True, help="List slides, tiles and an estimate of the time, and stop.")
@run_options
def command(
    slides: tuple[str, ...],
    output: Path,
    shard: tuple[int, int] | None,
    dry_run: bool,
    no_progress: bool,
    log_json: bool,
    **settings: Any,
) -> int:
    """Find every nucleus of SLIDES: files, folders, patterns, or one .csv or .txt list.

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
    """
    config = to_config(**settings)
    sources = chosen_slides(slides, shard)
    if not sources:
        click.echo("no slide falls into this shard", err=True)
        return 0
    from cellslide.segmenter import open_segmenter
    from cellslide.weights import load_model

    with open_segmenter(load_model(config.model, config.weights), config) as segmenter:
        if dry_run:
            return show_plan(sources, segmenter)
        outcomes = run(sources, segmenter, output, log_json, _wants_progress(no_progress))
    return finish(outcomes, log_json)


def to_config(
    formats: tuple[Any, ...], compile_: bool, no_tissue: bool, tissue_mask: Path | None, roi: Path | None, **flags: Any
) -> SegmentConfig:
    """Return the settings that the flags give; raises UsageError for values out of range."""
    from cellslide.config import InferConfig, OutputConfig, SegmentConfig, TileConfig, TissueConfig

    infer = ("device", "batch_size", "precision", "engine", "workers", "seed")
    output = ("geojson_origin", "profile", "overwrite")
    return SegmentConfig(
        model=flags["model"],
        weights=flags["weights"],
        mpp=flags["mpp"],
        tissue=TissueConfig(not no_tissue, tissue_mask, roi, roi_origin=flags["geojson_origin"]),
        tiles=TileConfig(flags["tile_size"], flags["overlap"]),
        infer=InferConfig(compile=compile_, **{name: flags[name] for name in infer}),
        output=OutputConfig(formats=formats, **{name: flags[name] for name in output}),
    )


def chosen_slides(args: Sequence[str], shard: tuple[int, int] | None) -> list[SlideInput]:
    """Return the slides that the arguments name, of one shard if asked; raises UsageError when they name none."""
    from cellslide.batch import in_shard
    from cellslide.slides import expand_slides

    return [s for s in expand_slides(args) if shard is None or in_shard(s.slide_id, shard)]


def _wants_progress(no_progress: bool) -> bool:
    return not no_progress and logging.getLogger("cellslide").isEnabledFor(logging.INFO)


def run(
    sources: list[SlideInput], segmenter: Segmenter, output: Path, log_json: bool, shown: bool
) -> list[SlideOutcome]:
    """Segment the slides with a progress bar; one JSON line per slide at its end if asked."""
    from cellslide.batch import StopOnSignal, segment_slides
    from cellslide.cli.progress import progress_bar
    from cellslide.pipeline import Watch

    outcomes = []
    with StopOnSignal() as stop, progress_bar(len(sources), shown) as progress:
        for outcome in segment_slides(sources, segmenter, output, Watch(progress, stop)):
            outcomes.append(outcome)
            if log_json:
                click.echo(json.dumps({**outcome.to_json(), "seconds": round(outcome.seconds, 2)}))
            elif outcome.cells == 0 and outcome.status == "done":
                logging.getLogger(__name__).warning(
                    "%s: no nuclei; see tissue.geojson for what was searched", outcome.slide
                )
    return outcomes


def finish(outcomes: list[SlideOutcome], log_json: bool) -> int:
    """Show the summary and the errors; return the exit code."""
    from cellslide.batch import exit_code
    from cellslide.cli.progress import summary

    if logging.getLogger("cellslide").isEnabledFor(logging.INFO):
        summary(outcomes, to_stderr=log_json)
    for outcome in outcomes:
        if outcome.error is not None:
            click.echo(f"cellslide: {outcome.slide}: {outcome.error}", err=True)
    return exit_code(outcomes)


def show_plan(sources: list[SlideInput], segmenter: Segmenter) -> int:
    """Print the tiles of each slide and how long they would take here, from one tile that is tried; returns 0."""
    from cellslide.batch import plan

    total, seconds_per_tile = 0, None
    for source in sources:
        tiles, seconds_per_tile = plan(source, segmenter, seconds_per_tile)
        total += tiles
        click.echo(f"{source.slide_id}  {tiles:,} tiles  about {tiles * seconds_per_tile:,.0f} s  {source.path}")
    size, name = segmenter.config.tiles.size_px, segmenter.spec.weights_id
    click.echo(
        f"{len(sources)} slides, {total:,} tiles of {size} px at {segmenter.spec.mpp} µm/px, "
        f"{name} on {segmenter.engine.device}"
    )
    return 0
