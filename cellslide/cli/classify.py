"""`cellslide classify`: say of every nucleus what it is, how sure that is, and where it is not known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli.cluster import cluster_options, ended, on_cluster, place_of
from cellslide.cli.many import RunOutput, copies_in, finish, ledger_for, on_devices, one_by_one, stage_option, telling
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
)
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.batch.local_copy import LocalCopies
    from cellslide.batch.run import SlideOutcome
    from cellslide.batch.worker_jobs import ClassifyWork
    from cellslide.classify import Classifier
    from cellslide.classify.columns import Rule
    from cellslide.classify.targets import Target
    from cellslide.config import ClassifyConfig
    from cellslide.progress import Watch
    from cellslide.slides.slide import Slide
    from cellslide.types import Calibration, ClassifierSpec
    from cellslide.weights.organs import Organ

log = logging.getLogger(__name__)

organ_option = click.option(
    "--organ", metavar="NAME", help="Organ of the slides.  [default: the list's column organ, else unknown]"
)

decision_options = chain(
    click.option(
        "--gate", type=click.Choice(["mix", "safe", "local", "global"]), default="mix", show_default=True,
        help="Which probabilities decide: the gate's mix, the safe gate's choice, or one path.",
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
        "--paths", type=click.Choice(["both", "local"]), default="both", show_default=True,
        help="Run both paths, so that any rule may follow, or the local one alone, which needs no context.",
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
    click.option("--compile", "compile_", is_flag=True, help="Compile the network first."),
    seed_option,
)


@click.command()
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
    **settings: Any,
) -> int:
    """Type the nuclei of slides: SLIDES whose cells.zarr lies in -o DIR, or the folders that `segment` wrote.

    The table gains class, class_prob, gate, path, abstained and organ, and the probabilities of both paths, so that any
    rule can be applied later. The same command again goes on where it stopped.

    \b
    Examples:
      cellslide classify out/slide --organ breast
      cellslide classify slides/ -o out --organ lung --abstain 0.5
      cellslide classify out --gate safe --regate
      cellslide classify slide.svs -o out --cells qupath.geojson --organ breast
    """
    from cellslide.classify.targets import expand_targets
    from cellslide.config import parse_devices

    config = to_config(**settings)
    targets = expand_targets(slides, output)
    tell = telling(log_json, no_progress, ledger_for(targets, output, slides))
    if regate:
        return finish(regate_all(targets, config, settings, tell), tell)
    devices = parse_devices(config.infer.device)
    config = replace(config, infer=replace(config.infer, device=devices[0]))
    place = place_of(scheduler, jobs, devices)
    if place is not None and not dry_run:
        work = remote_work(config, settings, stage_dir)
        targets = targets if config.cells is None else [bring_cells(targets, config)]
        return ended(finish(on_cluster(place, None, work, targets, tell), tell))
    classifier = load(config)
    rule = to_rule(classifier.spec, settings)
    rule.check()
    organ_of = organ_finder(classifier.spec, config.organ)
    if config.cells is not None:
        targets = [bring_cells(targets, config)]
    if dry_run:
        return show_plan(targets, classifier)
    copies = copies_in(stage_dir)
    if len(devices) > 1:
        return finish(on_devices(work_of(config, rule, copies), targets, devices, tell), tell)
    return finish(run(targets, classifier, rule, organ_of, copies, tell), tell)


def to_config(formats: tuple[Any, ...], compile_: bool, **flags: Any) -> ClassifyConfig:
    """Return the settings that the flags give; raises UsageError for values out of range."""
    from cellslide.config import ClassifyConfig, InferConfig, OutputConfig

    infer = {name: flags[name] for name in ("device", "batch_size", "precision", "seed")}
    output = {name: flags[name] for name in ("geojson_origin", "profile", "overwrite")}
    names = (
        "model", "weights", "mpp", "allow_fluorescence", "organ", "paths", "context_size", "context_grid", "adaptive",
        "max_cells", "sample", "roi", "cells", "cells_unit", "cells_mpp", "alignment", "alignment_direction",
        "taxonomy",
    )  # fmt: skip
    return ClassifyConfig(
        **{name: flags[name] for name in names if name in flags},
        infer=InferConfig(compile=compile_, **infer),
        output=OutputConfig(formats=formats, **output),
    )


def load(config: ClassifyConfig) -> Classifier:
    """Return the classifier that the flags name, on its device."""
    from cellslide.classify import open_classifier
    from cellslide.weights.classifier import load_classifier

    return open_classifier(load_classifier(config.model, config.weights), config)


def to_rule(spec: ClassifierSpec, flags: dict[str, Any], calibration: Calibration | None = None) -> Rule:
    """Return how cells are decided; raises UsageError for thresholds or a taxonomy that do not suit the classes."""
    from cellslide.classify.columns import Rule
    from cellslide.classify.decision import DecisionConfig, read_prior, read_thresholds
    from cellslide.classify.taxonomy import load_taxonomy

    names = tuple(c.name for c in spec.classes)
    thresholds = None if flags["thresholds"] is None else read_thresholds(flags["thresholds"], names)
    calibration = calibration or spec.calibration
    prior = None if flags["prior"] is None else read_prior(flags["prior"], names, calibration)
    decision = DecisionConfig(flags["gate"], flags["tau"], flags["gamma"], thresholds, flags["abstain"], prior)
    taxonomy = None if flags["taxonomy"] is None else load_taxonomy(flags["taxonomy"], names)
    return Rule(decision, calibration, names, taxonomy)


def organ_finder(spec: ClassifierSpec, given: str | None) -> Callable[[str | None], Organ]:
    """Return what gives the organ for the list's word; checks `--organ` now, raising UsageError with near names."""
    from cellslide.weights.organs import find_organ

    if given is None:
        return lambda listed: find_organ(spec, listed)
    organ = find_organ(spec, given)
    return lambda _: organ


def work_of(config: ClassifyConfig, rule: Rule, copies: LocalCopies | None) -> ClassifyWork:
    """Return what the process of a device does to type slides."""
    from cellslide.batch.worker_jobs import ClassifyWork

    return ClassifyWork(config, rule, partial(organ_finder, given=config.organ), copies)


def remote_work(config: ClassifyConfig, decision: dict[str, Any], stage_dir: Path | None) -> ClassifyWork:
    """Return what workers do to type slides; the rule and the organ are checked here, where no device is needed."""
    from cellslide.weights.classifier import load_classifier

    spec = load_classifier(config.model, config.weights).spec
    rule = to_rule(spec, decision)
    rule.check()
    if config.organ is not None:
        organ_finder(spec, config.organ)
    return replace(work_of(config, rule, copies_in(stage_dir)), load=load_classifier)


def bring_cells(targets: list[Target], config: ClassifyConfig) -> Target:
    """Make the cell table of the one slide from `--cells`; returns the slide. Raises UsageError for more slides."""
    from cellslide.classify.foreign import import_cells

    if len(targets) != 1:
        raise UsageError(f"--cells {config.cells}: name the one slide that they lie on, not {len(targets)}")
    log.info("%s", import_cells(targets[0], config))
    return targets[0]


def run(
    targets: list[Target],
    classifier: Classifier,
    rule: Rule,
    organ_of: Callable[[str | None], Organ],
    copies: LocalCopies | None,
    tell: RunOutput,
) -> list[SlideOutcome]:
    """Type the slides, one after another."""
    from cellslide.batch.local_copy import done_before
    from cellslide.batch.run import classify_slides

    def work(stream: Iterator[Target], watch: Watch) -> Iterator[SlideOutcome]:
        return classify_slides(stream, classifier, rule, organ_of, watch)

    return one_by_one(targets, work, tell, copies, done_before("classify", classifier.config.output.overwrite))


def regate_all(
    targets: list[Target], config: ClassifyConfig, flags: dict[str, Any], tell: RunOutput
) -> list[SlideOutcome]:
    """Apply the rule of the flags to typed folders; returns how each ended."""
    from cellslide.batch.run import regate_slides

    rule_of = partial(to_rule, flags=flags, calibration=other_calibration(config))

    def work(stream: Iterator[Target], watch: Watch) -> Iterator[SlideOutcome]:
        return regate_slides(stream, rule_of, config.output, watch)

    return one_by_one(targets, work, tell, None, lambda _: True)


def other_calibration(config: ClassifyConfig) -> Calibration | None:
    """Return the calibration of the weights that the flags name, or None: the one that the cells were typed with."""
    if config.model is None and config.weights is None:
        return None
    from cellslide.weights.classifier import calibration_of, classifier_entry

    return calibration_of(classifier_entry(config.model, config.weights))


def _opened(target: Target, classifier: Classifier) -> Slide:
    from cellslide.classify.targets import open_target

    return open_target(target, classifier.config.mpp, classifier.config.allow_fluorescence)


def show_plan(targets: list[Target], classifier: Classifier) -> int:
    """Print the cells of each slide and how long they would take here; returns 0."""
    from cellslide.classify import prepare
    from cellslide.classify.slide import choose_cells, estimate, read_places
    from cellslide.classify.targets import check_slide, require_cells
    from cellslide.store.cell_table import open_table
    from cellslide.store.run_record import TABLE

    for target in targets:
        require_cells(target)
        with _opened(target, classifier) as slide, open_table(target.folder / TABLE) as table:
            check_slide(target, slide)
            xy = read_places(table)
            work = prepare(slide, xy[choose_cells(xy, slide, classifier.config)], classifier)
            click.echo(f"{target.source.slide_id}  {estimate(work, classifier)}  {slide.info.path}")
    return 0
