"""`cellslide run`: slides in, typed nuclei out; what `segment` and `classify` do, slide by slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cellslide.cli.classify import (
    decision_options,
    load,
    network_options,
    organ_finder,
    organ_option,
    remote_work,
    to_rule,
    work_of,
)
from cellslide.cli.classify import to_config as to_classify_config
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
    FILE,
    chain,
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
from cellslide.cli.segment import chosen_slides, shard_option
from cellslide.cli.segment import to_config as to_segment_config

if TYPE_CHECKING:
    from cellslide.batch.local_copy import LocalCopies
    from cellslide.batch.run import SlideOutcome
    from cellslide.classify import Classifier
    from cellslide.classify.columns import Rule
    from cellslide.classify.targets import Target
    from cellslide.config import ClassifyConfig, SegmentConfig
    from cellslide.progress import Watch
    from cellslide.weights.organs import Organ

classifier_options = chain(
    click.option("--classifier", metavar="ID", help="Classifier from `cellslide weights list`.  [default: what ships]"),
    click.option("--classifier-weights", type=FILE, help="Weights file of a classifier."),
)


@click.command()
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
    no_progress: bool,
    log_json: bool,
    **settings: Any,
) -> int:
    """Find and type every nucleus of SLIDES: files, folders, patterns, or one .csv or .txt list.

    Each slide gets the folder that `segment` writes, its cells typed as `classify` does it. The same command again
    skips what is done and goes on where it stopped.

    \b
    Examples:
      cellslide run slide.svs -o out --organ breast
      cellslide run slides.csv -o out --organ lung --abstain 0.5 --format zarr,geojson,csv
    """
    flags = ("gate", "tau", "gamma", "thresholds", "abstain", "prior", "taxonomy")
    decision = {name: settings.pop(name) for name in flags}
    network = {name: settings.pop(name) for name in ("organ", "paths", "context_size", "context_grid", "adaptive")}
    network |= {name: settings.pop(name) for name in ("max_cells", "sample")}
    config = to_segment_config(**settings)
    own = {"model": classifier, "weights": classifier_weights, "batch_size": None}
    shared = (
        "formats",
        "compile_",
        "mpp",
        "allow_fluorescence",
        "roi",
        "device",
        "precision",
        "seed",
        "geojson_origin",
        "profile",
    )
    flags = {**network, **own, **{name: settings[name] for name in (*shared, "overwrite")}}
    classify_config = to_classify_config(taxonomy=decision["taxonomy"], **flags)
    sources = chosen_slides(slides, shard)
    if not sources:
        click.echo("no slide falls into this shard", err=True)
        return 0
    from cellslide.config import parse_devices

    devices = parse_devices(config.infer.device)
    config, classify_config = at_first(config, devices), at_first(classify_config, devices)
    place = place_of(scheduler, jobs, devices)
    if place is not None:
        from cellslide.batch.worker_jobs import SegmentWork
        from cellslide.weights import load_model

        found, typed = (
            SegmentWork(config, copies_in(stage_dir), load_model),
            remote_work(classify_config, decision, stage_dir),
        )
        targets = to_targets(sources, output)
        tell = telling(log_json, no_progress, ledger_for(targets, output))
        return ended(finish(on_cluster(place, found, typed, targets, tell), tell))
    typing = load(classify_config)
    rule, organ_of = to_rule(typing.spec, decision), organ_finder(typing.spec, network["organ"])
    rule.check()
    targets, copies = to_targets(sources, output), copies_in(stage_dir)
    tell = telling(log_json, no_progress, ledger_for(targets, output))
    if len(devices) > 1:
        from cellslide.batch.worker_jobs import RunWork, SegmentWork

        work = RunWork(SegmentWork(config, copies), work_of(classify_config, rule, copies))
        return finish(on_devices(work, targets, devices, tell, stages=2), tell)
    return finish(run(targets, config, typing, rule, organ_of, copies, tell), tell)


Config = TypeVar("Config", "SegmentConfig", "ClassifyConfig")


def at_first(config: Config, devices: Sequence[str]) -> Config:
    """Return settings with the first device."""
    return replace(config, infer=replace(config.infer, device=devices[0]))


def run(
    targets: list[Target],
    config: SegmentConfig,
    classifier: Classifier,
    rule: Rule,
    organ_of: Callable[[str | None], Organ],
    copies: LocalCopies | None,
    tell: RunOutput,
) -> list[SlideOutcome]:
    """Segment and type the slides, one after another."""
    from cellslide.batch.local_copy import done_before
    from cellslide.batch.run import run_slides
    from cellslide.inference.segmenter import load_segmenter
    from cellslide.weights import load_model

    with load_segmenter(load_model, config) as segmenter:

        def work(stream: Iterator[Target], watch: Watch) -> Iterator[SlideOutcome]:
            sources, out_dir = (t.source for t in stream), targets[0].folder.parent
            return run_slides(sources, segmenter, classifier, rule, organ_of, out_dir, watch)

        return one_by_one(targets, work, tell, copies, done_before("classify", config.output.overwrite), stages=2)
