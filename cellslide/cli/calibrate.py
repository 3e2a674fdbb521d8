"""`cellslide calibrate`: fit on labelled nuclei how far the probabilities of a classifier can be believed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli import grouped
from cellslide.cli.classify import torch_options
from cellslide.cli.options import config_option, model_options, verbosity_options
from cellslide.cli.typed import dataset_mpp_option, dataset_organ_option, image_progress, map_class_option

if TYPE_CHECKING:
    from cellslide.evaluate.calibration import CalibrationReport

OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER_IN = click.Path(exists=True, file_okay=False, path_type=Path)


@grouped.define()
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
    from cellslide.api import calibrate, load_model

    with image_progress(no_progress) as progress:
        report = calibrate(
            partial(load_model, model, weights=weights, task="classify", **infer), dataset,
            split=split, organ=organ, mpp=mpp, class_map=class_map, target=target, unseen=unseen, out=output,
            reliability=reliability, progress=progress,
        )  # fmt: skip
    _show(report)


def _show(report: CalibrationReport) -> None:
    from cellslide.classify.decision import default_gate

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    found, gain, paths = report.calibration, report.gain, ("local", "global", "mix")
    lines = [
        f"{report.n} nuclei; temperature " + ", ".join(f"{p} {getattr(found, f'temperature_{p}'):.3f}" for p in paths)
    ]
    rule = "local path" if default_gate(found) == "local" else "mix"
    lines.append(
        f"ECE of the {rule}: {number(gain.before)} before, {number(gain.after)} after, {number(gain.crossed)} where "
        "one half of the images is calibrated by the other"
    )
    if found.paths == "local":
        lines.append("the mix gains less than a point of macro F1: the local path alone runs by default (--paths both)")
    accepts = f"tau {found.tau:g}, gamma {found.gamma:g}" if found.safe_accepts else "its baseline alone"
    lines.append(f"safe gate: {accepts if found.reliability_local else 'not fitted, the global path did not run'}")
    floors = ", ".join(
        f"{name} {t:.2f}" for name, t in zip(report.classes, found.thresholds or (), strict=True) if t > 0
    )
    lines.append(f"thresholds: {floors or 'none'}; abstain below {number(found.abstain)}")
    lines.append(f"written to {report.path}")
    click.echo("\n".join(lines))
