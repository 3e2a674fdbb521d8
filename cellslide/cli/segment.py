"""`cellslide segment`: find every nucleus of one or many slides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli.cluster import cluster_options, ended, on_cluster, place_of
from cellslide.cli.many import (
    RunOutput,
    copies_in,
    finish,
    ledger_for,
    on_devices,
    one_by_one,
    stage_option,
    telling,
    to_targets,
)
from cellslide.cli.options import (
    fluorescence_option,
    format_option,
    geojson_options,
    infer_options,
    model_options,
    output_option,
    run_options,
    slides_argument,
    tile_options,
    tissue_options,
    tta_option,
)

if TYPE_CHECKING:
    from cellslide.batch.local_copy import LocalCopies
    from cellslide.batch.run import SlideOutcome
    from cellslide.classify.targets import Target
    from cellslide.config import SegmentConfig
    from cellslide.progress import Watch
    from cellslide.slides.inputs import SlideInput


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
      cellslide segment slides.csv -o out --device cuda:0,1,2,3 --stage-dir /scratch
      cellslide segment slides.csv -o out --scheduler scheduler.json
    """
    config = to_config(**settings)
    sources = chosen_slides(slides, shard)
    if not sources:
        click.echo("no slide falls into this shard", err=True)
        return 0
    from cellslide.config import parse_devices

    devices = parse_devices(config.infer.device)
    config = replace(config, infer=replace(config.infer, device=devices[0]))
    if dry_run:
        return show_plan(sources, config)
    place = place_of(scheduler, jobs, devices)
    targets = to_targets(sources, output)
    tell = telling(log_json, no_progress, ledger_for(targets, output))
    if place is not None:
        from cellslide.batch.worker_jobs import SegmentWork
        from cellslide.weights import load_model

        work = SegmentWork(config, copies_in(stage_dir), load_model)
        return ended(finish(on_cluster(place, work, None, targets, tell), tell))
    return finish(run(targets, config, devices, copies_in(stage_dir), tell), tell)


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
        allow_fluorescence=flags["allow_fluorescence"],
        tta=flags["tta"],
        tissue=TissueConfig(not no_tissue, tissue_mask, roi, roi_origin=flags["geojson_origin"]),
        tiles=TileConfig(flags["tile_size"], flags["overlap"]),
        infer=InferConfig(compile=compile_, **{name: flags[name] for name in infer}),
        output=OutputConfig(formats=formats, **{name: flags[name] for name in output}),
    )


def chosen_slides(args: Sequence[str], shard: tuple[int, int] | None) -> list[SlideInput]:
    """Return the slides that the arguments name, of one shard if asked; raises UsageError when they name none."""
    from cellslide.batch.run import in_shard
    from cellslide.slides.inputs import expand_slides

    return [s for s in expand_slides(args) if shard is None or in_shard(s.slide_id, shard)]


def run(
    targets: list[Target], config: SegmentConfig, devices: Sequence[str], copies: LocalCopies | None, tell: RunOutput
) -> list[SlideOutcome]:
    """Segment the slides, on one device or several."""
    if len(devices) > 1:
        from cellslide.batch.worker_jobs import SegmentWork

        return on_devices(SegmentWork(config, copies), targets, devices, tell)
    from cellslide.batch.local_copy import done_before
    from cellslide.batch.run import segment_slides
    from cellslide.inference.segmenter import load_segmenter
    from cellslide.weights import load_model

    with load_segmenter(load_model, config) as segmenter:

        def work(stream: Iterator[Target], watch: Watch) -> Iterator[SlideOutcome]:
            return segment_slides((t.source for t in stream), segmenter, targets[0].folder.parent, watch)

        return one_by_one(targets, work, tell, copies, done_before("segment", config.output.overwrite))


def show_plan(sources: list[SlideInput], config: SegmentConfig) -> int:
    """Print the tiles of each slide and how long they would take here, from one tile that is tried; returns 0."""
    from cellslide.batch.run import plan
    from cellslide.inference.segmenter import open_segmenter
    from cellslide.weights import load_model

    total, seconds_per_tile = 0, None
    with open_segmenter(load_model(config.model, config.weights), config) as segmenter:
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
