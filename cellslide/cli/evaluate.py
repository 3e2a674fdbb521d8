"""`cellslide evaluate`: score a model, the classical baseline, or predictions on disk against a labelled data set."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cellslide.cli.classify import decision_options
from cellslide.cli.evaluate_classifier import Scored, Typing, evaluate_classifier
from cellslide.cli.options import (
    config_option,
    infer_options,
    model_options,
    tile_options,
    tta_option,
    verbosity_options,
)
from cellslide.cli.typed import (
    dataset_mpp_option,
    dataset_organ_option,
    image_progress,
    is_classifier,
    map_class_option,
)
from cellslide.config import InferConfig, SegmentConfig, TileConfig, TissueConfig
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.evaluate.dataset import Dataset
    from cellslide.evaluate.protocols import Protocol
    from cellslide.evaluate.report import Predictor
    from cellslide.evaluate.score import ClassSet, ImageScores

CLASSICAL = "classical"
# Flags that a classifier alone understands, and what they are where nobody gives them.
TYPING_FLAGS = {"detector": None, "organ": None, "gate": "mix", "tau": None, "gamma": None, "thresholds": None,
                "abstain": None, "prior": None, "taxonomy": None}  # fmt: skip
OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER_IN = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("dataset", type=FOLDER_IN, metavar="DATASET_DIR")
@model_options
@click.option(
    "--predictions",
    type=FOLDER_IN,
    metavar="DIR",
    help="Score what lies here instead of a model: STEM/cells.zarr, label images STEM.png|.npy|.tif, "
    "or points STEM.csv with x,y[,class][,score].",
)
@click.option("--split", metavar="NAME", help="Only the images of this split of the manifest.  [default: all]")
@click.option(
    "--protocol", metavar="NAME",
    help="How nuclei are paired with points: brca-m2c, consep (7 classes joined to 4), promptnucseg, ocelot, puma, "
    "pannuke, or optimal.  "
    "[default: brca-m2c for points with classes, else optimal]",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N images.")
@dataset_mpp_option
@map_class_option
@click.option(
    "--nuclei", type=click.Choice(["given", "detected"]),
    help="Classifier: type the annotated points, or nuclei that a segmentation model finds.  [default: given]",
)  # fmt: skip
@click.option(
    "--detector", metavar="ID", help="Segmentation model for --nuclei detected.  [default: the one that ships]"
)
@dataset_organ_option
@decision_options
@click.option("--reliability", type=OUTPUT_FILE, metavar="FILE.png", help="Classifier: draw a reliability diagram.")
@click.option("--json", "json_file", type=OUTPUT_FILE, metavar="FILE", help="Write the scores as JSON.")
@click.option("--per-image", type=OUTPUT_FILE, metavar="FILE", help="Write the scores of each image as CSV.")
@infer_options
@tta_option
@tile_options
@config_option
@click.option("--no-progress", is_flag=True, help="No progress bar.")
@verbosity_options
def command(
    dataset: Path, model: str | None, weights: Path | None, predictions: Path | None, split: str | None,
    protocol: str | None, limit: int | None, mpp: float | None, class_map: dict[str, str],
    nuclei: Literal["given", "detected"] | None, json_file: Path | None, per_image: Path | None,
    reliability: Path | None, tile_size: int | None, overlap: int | None, no_progress: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Score a model or its predictions on the labelled images in DATASET_DIR.

    DATASET_DIR holds manifest.csv with images, masks (instance labels) or points. `--model classical` is the
    baseline without training: haematoxylin, Otsu, watershed. A classifier types the annotated points, by every rule.

    \b
    Example:
      cellslide evaluate data/tnbc --json scores.json
      cellslide evaluate --model classical data/tnbc
      cellslide evaluate --predictions out data/tnbc --split val
      cellslide evaluate --predictions points data/brca-m2c --protocol brca-m2c
      cellslide evaluate --model CLASSIFIER data/typed --split val --reliability diagram.png
      cellslide evaluate --model CLASSIFIER data/typed --nuclei detected
    """
    if predictions is not None and (model is not None or weights is not None):
        raise UsageError("--predictions: scores what is on disk, so it goes without --model and --weights")
    from cellslide.evaluate.dataset import read_dataset
    from cellslide.evaluate.protocols import protocol_of
    from cellslide.evaluate.report import pixel_size, write_per_image
    from cellslide.evaluate.score import scored_classes
    from cellslide.store.atomic import write_text

    for file in (json_file, per_image):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    data = read_dataset(dataset, split)
    data = replace(data, samples=data.samples[:limit])
    rule = protocol_of(protocol, data)
    classes = scored_classes(data, rule, class_map)
    for sample in data.samples:  # Before a network is loaded for nothing.
        pixel_size(sample, mpp)
    typing = {name: flags.pop(name) for name in TYPING_FLAGS}
    tta, tiles = flags.pop("tta"), TileConfig(tile_size, overlap)
    infer = InferConfig(**flags)
    if tta and (predictions is not None or model == CLASSICAL or is_classifier(model, weights)):
        raise UsageError(
            "--tta: is for models of outlines; leave it out with --predictions, a classifier or the baseline"
        )
    if predictions is None and (nuclei is not None or is_classifier(model, weights)):
        how = Typing(nuclei or "given", typing.pop("detector"), typing.pop("organ"), typing, infer, tiles, reliability,
                     no_progress, rule)  # fmt: skip
        _check_detected(how, per_image, protocol)
        scored = evaluate_classifier(data, split, classes, mpp, model, weights, how)
    else:
        _refuse_typing({**typing, "reliability": reliability, "nuclei": nuclei})
        tissue = TissueConfig(enabled=False)
        config = SegmentConfig(model, weights, mpp, tta=tta, tissue=tissue, tiles=tiles, infer=infer)
        scored = _evaluate(data, split, classes, config, predictions, rule, no_progress)
    if json_file is not None:
        write_text(json_file, scored.report.to_json())
    if per_image is not None:
        write_per_image(per_image, scored.images)
    _show(scored)


def _check_detected(how: Typing, per_image: Path | None, protocol: str | None) -> None:
    if how.nuclei == "given" and per_image is not None:
        raise UsageError("--per-image: given nuclei are scored together; use it with --nuclei detected")
    if how.nuclei == "given" and protocol is not None:
        raise UsageError("--protocol: given nuclei need no pairing; use it with --nuclei detected")


def _refuse_typing(flags: dict[str, Any]) -> None:
    given = [f"--{name}" for name, value in flags.items() if value != TYPING_FLAGS.get(name)]
    if given:
        raise UsageError(f"{', '.join(given)}: only for a classifier, named with --model or --weights")


def _evaluate(
    data: Dataset, split: str | None, classes: ClassSet, config: SegmentConfig, predictions: Path | None,
    rule: Protocol, no_progress: bool,
) -> Scored:  # fmt: skip
    from cellslide.evaluate.report import summarise

    with ExitStack() as resources:
        name, predict = _predictor(config, predictions, resources)
        scores = _score(data, predict, classes, config.mpp, rule, no_progress)
    return Scored(summarise(name, data, split, classes, scores, rule), images=tuple(scores))


def _predictor(config: SegmentConfig, predictions: Path | None, resources: ExitStack) -> tuple[str, Predictor]:
    """Return the name of what is scored and the function that gives the nuclei of an image, alive with `resources`."""
    from cellslide.evaluate.predictors import classical_nuclei, read_nuclei

    if predictions is not None:
        return str(predictions), lambda sample, mpp: read_nuclei(predictions, sample)
    if config.model == CLASSICAL:
        if config.weights is not None:
            raise UsageError(f"--weights: --model {CLASSICAL} has none")
        return CLASSICAL, classical_nuclei
    return _network(config, resources)


def _network(config: SegmentConfig, resources: ExitStack) -> tuple[str, Predictor]:
    from cellslide.evaluate.predictors import network_predictor
    from cellslide.inference.segmenter import open_segmenter
    from cellslide.weights import load_model

    loaded = load_model(config.model, config.weights)
    # An image has few tiles: decoding them here is quicker than starting processes, unless some are asked for.
    config = replace(config, infer=replace(config.infer, workers=config.infer.workers or 0))
    segmenter = resources.enter_context(open_segmenter(loaded, config))
    names = tuple(c.name for c in loaded.spec.classes)
    return loaded.spec.weights_id or loaded.spec.name, network_predictor(segmenter, config, names)


def _score(
    data: Dataset, predict: Predictor, classes: ClassSet, mpp: float | None, rule: Protocol, no_progress: bool
) -> list[ImageScores]:
    from cellslide.evaluate.report import evaluate_dataset

    with image_progress(data, no_progress) as advance:
        return evaluate_dataset(data, predict, classes, mpp, lambda _: advance(), rule)


def _show(scored: Scored) -> None:
    from rich.console import Console

    for table in (scored.report.table(), *scored.report.group_tables(), *scored.tables):
        Console().print(table)
    for warning in scored.report.warnings:
        click.echo(f"warning: {warning}", err=True)
