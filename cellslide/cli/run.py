"""`cellslide run`: slides in, typed nuclei out; what `segment` and `classify` do, slide by slide."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli.classify import decision_options, finish, load, network_options, organ_finder, organ_option, to_rule
from cellslide.cli.classify import to_config as to_classify_config
from cellslide.cli.options import (
    FILE,
    chain,
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
from cellslide.cli.segment import chosen_slides, shard_option
from cellslide.cli.segment import to_config as to_segment_config

if TYPE_CHECKING:
    from cellslide.batch import SlideOutcome
    from cellslide.classify import Classifier
    from cellslide.classify.columns import Rule
    from cellslide.classify.slide import Organ
    from cellslide.pipeline import Watch
    from cellslide.segmenter import Segmenter
    from cellslide.slides import SlideInput

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
@tissue_options
@format_option()
@geojson_options
@infer_options
@tile_options
@shard_option
@click.option("--overwrite", is_flag=True, help="Start anew; without it, finished slides are skipped, others resumed.")
@run_options
def command(
    slides: tuple[str, ...],
    output: Path,
    classifier: str | None,
    classifier_weights: Path | None,
    shard: tuple[int, int] | None,
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
    decision = {name: settings.pop(name) for name in ("gate", "tau", "gamma", "thresholds", "abstain", "taxonomy")}
    network = {name: settings.pop(name) for name in ("organ", "paths", "context_size", "context_grid", "adaptive")}
    network |= {name: settings.pop(name) for name in ("max_cells", "sample")}
    config = to_segment_config(**settings)
    own = {"model": classifier, "weights": classifier_weights, "batch_size": None}
    shared = ("formats", "compile_", "mpp", "roi", "device", "precision", "seed", "geojson_origin", "profile")
    flags = {**network, **own, **{name: settings[name] for name in (*shared, "overwrite")}}
    classify_config = to_classify_config(taxonomy=decision["taxonomy"], **flags)
    sources = chosen_slides(slides, shard)
    if not sources:
        click.echo("no slide falls into this shard", err=True)
        return 0
    from cellslide.segmenter import open_segmenter
    from cellslide.weights import load_model

    typing = load(classify_config)
    rule, organ_of = to_rule(typing.spec, decision), organ_finder(typing.spec, network["organ"])
    rule.check()
    with open_segmenter(load_model(config.model, config.weights), config) as segmenter:
        shown = not no_progress and logging.getLogger("cellslide").isEnabledFor(logging.INFO)
        outcomes = run(sources, segmenter, typing, rule, organ_of, output, log_json, shown)
    return finish(outcomes, log_json)


def run(
    sources: list[SlideInput],
    segmenter: Segmenter,
    classifier: Classifier,
    rule: Rule,
    organ_of: Callable[[str | None], Organ],
    output: Path,
    log_json: bool,
    shown: bool,
) -> list[SlideOutcome]:
    """Segment and type the slides with a progress bar; one JSON line per slide at its end if asked."""
    from cellslide.batch import StopOnSignal
    from cellslide.cli.classify import told
    from cellslide.cli.progress import progress_bar
    from cellslide.pipeline import Watch

    with StopOnSignal() as stop, progress_bar(len(sources), shown) as progress:
        watch = Watch(progress, stop)
        outcomes = (both(source, segmenter, classifier, rule, organ_of, output, watch) for source in sources)
        return list(told(outcomes, log_json))


def both(
    source: SlideInput,
    segmenter: Segmenter,
    classifier: Classifier,
    rule: Rule,
    organ_of: Callable[[str | None], Organ],
    output: Path,
    watch: Watch,
) -> SlideOutcome:
    """Segment and type one slide; a slide of which some tiles failed is typed all the same, and counts as failed."""
    from cellslide.batch import classify_slides, segment_slides
    from cellslide.classify.targets import Target

    (found,) = segment_slides([source], segmenter, output, watch)
    if found.cells is None:
        return found
    (typed,) = classify_slides([Target(source, output / source.slide_id)], classifier, rule, organ_of, watch)
    seconds = found.seconds + typed.seconds
    if typed.status == "failed" or found.status == "failed":
        worse = typed if typed.status == "failed" else found
        return replace(worse, seconds=seconds)
    return replace(found if found.status == "done" else typed, seconds=seconds)
