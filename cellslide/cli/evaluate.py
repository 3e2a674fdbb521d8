"""`cellslide evaluate`: score a model, the classical baseline, or predictions on disk against a labelled data set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cellslide.cli import grouped
from cellslide.cli.classify import decision_options
from cellslide.cli.options import (
    config_option,
    infer_options,
    model_options,
    settings_of,
    tile_options,
    tta_option,
    verbosity_options,
)
from cellslide.cli.typed import dataset_mpp_option, dataset_organ_option, image_progress, map_class_option
from cellslide.config import TileConfig
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.evaluate.report import EvalReport

CLASSICAL = "classical"
# Flags that a classifier alone understands, and what they are where nobody gives them.
TYPING_FLAGS = {"detector": None, "organ": None, "gate": None, "tau": None, "gamma": None, "thresholds": None,
                "abstain": None, "prior": None, "taxonomy": None}  # fmt: skip
OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER_IN = click.Path(exists=True, file_okay=False, path_type=Path)


@grouped.define()
@click.argument("dataset", type=click.Path(exists=True, path_type=Path), metavar="DATASET_DIR|SAMPLES.csv")
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
    help="How a data set is scored: pannuke, conic, conic-cellvta (its 2 x 2 tiles), consep (7 classes joined to 4), "
    "monuseg, nuinsseg, brca-m2c, promptnucseg, ocelot, puma (10 classes joined to 3), puma-10, or optimal.  "
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
@click.option("--fold", metavar="K/N", help="SAMPLES.csv: split by patient as `train fusion --fold` does.")
@click.option(
    "--min-transcripts", type=click.IntRange(0), default=1000, show_default=True,
    help="SAMPLES.csv: tiles with fewer are left out.",
)  # fmt: skip
@click.option("--tokens", type=click.Path(file_okay=False, path_type=Path), help="SAMPLES.csv: folder of the counts.")
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

    DATASET_DIR holds manifest.csv with images, masks (instance labels) or points, or is PanNuke, CoNIC,
    CoNSeP, MoNuSeg, OCELOT, PUMA, NuInsSeg or NuClass's cells as they are distributed. `--model classical` is the
    baseline without training: haematoxylin, Otsu, watershed. A classifier types the annotated points, by every rule.
    SAMPLES.csv (slide, bundle, patient, split) scores weights of `train fusion` beside the baselines.

    \b
    Example:
      cellslide evaluate data/tnbc --json scores.json
      cellslide evaluate --model classical data/tnbc
      cellslide evaluate --predictions out data/tnbc --split val
      cellslide evaluate --predictions points data/brca-m2c --protocol brca-m2c
      cellslide evaluate --model ID data/pannuke --split fold3 --protocol pannuke
      cellslide evaluate --model CLASSIFIER data/typed --split val --reliability diagram.png
      cellslide evaluate --model CLASSIFIER data/typed --nuclei detected
      cellslide evaluate --weights runs/fusion samples.csv --split test --json genes.json
    """
    if dataset.is_file():
        return _evaluate_genes(dataset, model, weights, split, json_file, flags)
    if predictions is not None and (model is not None or weights is not None):
        raise UsageError("--predictions: scores what is on disk, so it goes without --model and --weights")
    if model == CLASSICAL and weights is not None:
        raise UsageError(f"--weights: --model {CLASSICAL} has none")
    from cellslide import api
    from cellslide.classify.rule_settings import RuleSettings
    from cellslide.store.atomic import write_text

    for name in ("fold", "min_transcripts", "tokens"):
        flags.pop(name)
    typing = {name: flags.pop(name) for name in TYPING_FLAGS}
    tta, task = flags.pop("tta"), "classify" if nuclei is not None else api.task_of(model, weights)
    _check_flags(task if predictions is None else None, nuclei, typing, reliability)
    if tta and (task == "classify" or predictions is not None or model == CLASSICAL):
        raise UsageError(
            "--tta: is for models of outlines; leave it out with --predictions, a classifier or the baseline"
        )
    if task == "classify" and nuclei != "detected" and (per_image is not None or protocol is not None):
        flag = "--protocol" if per_image is None else "--per-image"
        raise UsageError(f"{flag}: given nuclei are typed where they are; use it with --nuclei detected")
    for file in (json_file, per_image):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    network = partial(api.load_model, model, weights=weights, task=task or "segment", **flags)
    finder = partial(api.load_model, typing.pop("detector"), task="segment", **flags)
    with image_progress(no_progress) as progress:
        report = api.evaluate(
            predictions or (CLASSICAL if model == CLASSICAL else network), dataset,
            split=split, protocol=protocol, mpp=mpp, limit=limit, class_map=class_map,
            tiles=TileConfig(tile_size, overlap), tta=tta, nuclei=nuclei or "given", detector=finder,
            organ=typing.pop("organ"), rule=settings_of(RuleSettings, typing),
            per_image=per_image, reliability=reliability, progress=progress,
        )  # fmt: skip
    if json_file is not None:
        write_text(json_file, report.to_json())
    _show(report)


def _evaluate_genes(
    samples: Path, model: str | None, weights: Path | None, split: str | None, json_file: Path | None,
    flags: Mapping[str, Any],
) -> None:  # fmt: skip
    """Score weights of `train fusion` or `pretrain clip` on the slides of a table."""
    from cellslide.api import evaluate_genes
    from cellslide.genes.evaluate import lines_of
    from cellslide.store.atomic import write_text

    report = evaluate_genes(
        samples, weights=weights, model=model, split=split or "test", fold=flags["fold"], device=flags["device"],
        min_transcripts=flags["min_transcripts"], tokens=flags["tokens"],
    )  # fmt: skip
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(json_file, json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n")
    for line in lines_of(report):
        click.echo(line)


def _check_flags(task: str | None, nuclei: str | None, typing: Mapping[str, Any], reliability: Path | None) -> None:
    """Raise UsageError for flags of a classifier where there is none, and for a diagram of detected nuclei."""
    given = {**typing, "reliability": reliability, "nuclei": nuclei}
    names = [f"--{name}" for name, value in given.items() if value != TYPING_FLAGS.get(name)]
    if task != "classify" and names:
        raise UsageError(f"{', '.join(names)}: only for a classifier, named with --model or --weights")
    if reliability is not None and nuclei == "detected":
        raise UsageError("--reliability: is drawn of given nuclei, so it goes without --nuclei detected")


def _show(report: EvalReport) -> None:
    from rich.console import Console

    for table in report.tables():
        Console().print(table)
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
