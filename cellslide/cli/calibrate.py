"""`cellslide calibrate`: fit on labelled nuclei how far the probabilities of a classifier can be believed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli.classify import torch_options
from cellslide.cli.options import config_option, model_options, verbosity_options
from cellslide.cli.typed import dataset_mpp_option, dataset_organ_option, map_class_option
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.evaluate.calibration import Gain
    from cellslide.evaluate.paths import TypedCells
    from cellslide.types import Calibration, Int64
    from cellslide.weights.manifest import WeightsEntry

log = logging.getLogger(__name__)

OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER_IN = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("dataset", type=FOLDER_IN, metavar="DATASET_DIR")
@model_options
@click.option("--split", default="val", show_default=True, metavar="NAME", help="Split of the manifest to fit on.")
@dataset_organ_option
@dataset_mpp_option
@map_class_option
@click.option(
    "--target",
    type=float,
    default=0.9,
    show_default=True,
    metavar="F",
    help="Share of the accepted nuclei that shall be right; the abstain threshold is the least that reaches it.",
)
@click.option(
    "--unseen",
    is_flag=True,
    help="DATASET_DIR is of an organ that trained nothing: fit only how much more to abstain on such organs.",
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT_FILE,
    metavar="ENTRY.yaml",
    help="Manifest entry to write.  [default: model.yaml beside the weights]",
)
@click.option(
    "--reliability", type=OUTPUT_FILE, metavar="FILE.png", help="Draw a reliability diagram before and after."
)
@torch_options
@config_option
@click.option("--no-progress", is_flag=True, help="No progress bar.")
@verbosity_options
def command(
    dataset: Path, model: str | None, weights: Path | None, split: str, organ: str | None, mpp: float | None,
    class_map: dict[str, str], target: float, unseen: bool, output: Path | None, reliability: Path | None,
    no_progress: bool, **infer: Any,
) -> None:  # fmt: skip
    """Fit temperatures, the safe gate and thresholds of a classifier on the typed nuclei of DATASET_DIR.

    DATASET_DIR holds manifest.csv with images and points; take a split that trained nothing. The result goes into a
    manifest entry, from which `classify` and `evaluate` read it.

    \b
    Example:
      cellslide calibrate --weights runs/mine/model.safetensors data/mine --split val
      cellslide calibrate --model ID data/mine -o ENTRY.yaml --reliability before-after.png
      cellslide calibrate --weights runs/mine/model.safetensors data/other-organ --unseen --split train
    """
    from cellslide.classify import open_classifier
    from cellslide.cli import typed
    from cellslide.config import ClassifyConfig, InferConfig
    from cellslide.evaluate.calibration import FitConfig, class_labels, fit, fit_unseen, measure
    from cellslide.evaluate.dataset import read_dataset
    from cellslide.evaluate.score import ClassSet, dataset_classes
    from cellslide.weights.classifier import load_classifier

    config = FitConfig(target)
    if unseen and organ is not None:
        raise UsageError("--organ: an unseen organ has no row in the weights; leave it out with --unseen")
    organ = "unknown" if unseen else organ
    data = read_dataset(dataset, split)
    classes = ClassSet.of(dataset_classes(data), class_map)
    typed.require_classes(data, classes.names)
    loaded = load_classifier(model, weights)
    place = place_of(loaded.entry, output)
    infer_config = InferConfig(**infer)
    classifier = open_classifier(loaded, ClassifyConfig(model, weights, organ=organ, infer=infer_config))
    typed.warn_of_unknown_organs(data, loaded.spec, organ)
    cells = typed.gather_cells(data, classes, typed.predictor(classifier, organ), mpp, no_progress)
    names = tuple(c.name for c in loaded.spec.classes)
    cells = known_cells(cells, class_labels(cells.true_class, classes.names, classes.index(names)))
    if unseen:
        found = fit_unseen(loaded.spec.calibration, cells.probs, cells.true_class, config)
    else:
        found = fit(cells.probs, cells.true_class, len(names), config)
    write_entry(place, loaded.entry, found)
    if reliability is not None:
        _draw(reliability, cells, found)
    _show(place, names, found, measure(cells.probs, cells.true_class, cells.image, found), len(cells.image))


def known_cells(cells: TypedCells, labels: Int64) -> TypedCells:
    """Return the cells whose class the weights know, with that class; warns of the others, raises if all are."""
    from cellslide.evaluate.paths import TypedCells
    from cellslide.types import PathProbs

    known = labels >= 0
    if not known.any():
        raise UsageError("no nucleus has a class of the weights: say which is which with --map-class PREDICTED=TRUE")
    if not known.all():
        log.warning("%d nuclei have a class that the weights do not know; they are left out", int((~known).sum()))
    probs = PathProbs(cells.probs.local[known], cells.probs.global_[known], cells.probs.gate[known])
    return TypedCells(probs, labels[known], cells.image[known])


def place_of(entry: WeightsEntry, output: Path | None) -> Path:
    """Return where the entry is written; raises UsageError where the package's own manifest would be meant."""
    from cellslide.weights.manifest import ENTRY_FILE, PACKAGE

    if output is not None:
        return output
    if entry.root == PACKAGE or entry.file is None:
        raise UsageError(f"{entry.id} stands in the package's manifest: say where its entry goes with -o ENTRY.yaml")
    return entry.root / ENTRY_FILE


def write_entry(path: Path, entry: WeightsEntry, calibration: Calibration) -> None:
    """Write the entry with its new calibration, in one step."""
    from dataclasses import replace

    import yaml

    from cellslide.store.atomic import write_text
    from cellslide.weights.classifier import calibration_as_yaml

    values, safe_gate = calibration_as_yaml(calibration)
    entry = replace(entry, calibration=values, safe_gate=safe_gate)
    write_text(path, yaml.safe_dump(entry.as_dict(), sort_keys=False, allow_unicode=True))


def _draw(path: Path, cells: TypedCells, found: Calibration) -> None:
    from cellslide.classify.decision import decide
    from cellslide.evaluate.classification import reliability_bins
    from cellslide.evaluate.diagram import write_reliability
    from cellslide.types import Calibration

    panels = {}
    for title, calibration in (("before", Calibration()), ("after", found)):
        decision = decide(cells.probs, None, calibration)
        panels[title] = reliability_bins(decision.class_prob, decision.class_index == cells.true_class)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_reliability(path, panels)


def _show(path: Path, names: tuple[str, ...], found: Calibration, gain: Gain, n: int) -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    paths = ("local", "global", "mix")
    lines = [f"{n} nuclei; temperature " + ", ".join(f"{p} {getattr(found, f'temperature_{p}'):.3f}" for p in paths)]
    lines.append(
        f"ECE of the mix: {number(gain.before)} before, {number(gain.after)} after, {number(gain.crossed)} where "
        "one half of the images is calibrated by the other"
    )
    accepts = f"tau {found.tau:g}, gamma {found.gamma:g}" if found.safe_accepts else "its baseline alone"
    lines.append(f"safe gate: {accepts if found.reliability_local else 'not fitted, the global path did not run'}")
    floors = ", ".join(f"{name} {t:.2f}" for name, t in zip(names, found.thresholds or (), strict=True) if t > 0)
    lines.append(f"thresholds: {floors or 'none'}; abstain below {number(found.abstain)}")
    lines.append(f"written to {path}")
    click.echo("\n".join(lines))
