"""`cellslide demo`: the main job on a slide that needs no download, with the model that ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellslide.cli.options import FOLDER, device_option, run_options

if TYPE_CHECKING:
    from cellslide.batch.run import SlideOutcome
    from cellslide.classify.targets import Target
    from cellslide.cli.many import RunOutput
    from cellslide.config import SegmentConfig

DETAIL_PX = 800


@click.command()
@click.option(
    "-o", "--output", type=FOLDER, default=Path("cellslide-demo"), show_default=True,
    help="Folder for the slide and the results.",
)  # fmt: skip
@click.option("--download", is_flag=True, help="Use OpenSlide's CC0 test slide (1.9 MB from openslide.cs.cmu.edu).")
@device_option
@run_options
def command(output: Path, download: bool, device: str, no_progress: bool, log_json: bool) -> int:
    """Segment a demonstration slide, type its nuclei, draw them, and say where to look.

    The slide is painted by cellslide itself, so this works offline and needs no account. On two cores it takes
    less than three minutes. It writes to the output folder only, and begins anew each time.

    \b
    Example:
      cellslide demo
      cellslide demo -o demo-out --download
    """
    path = get_slide(output, download)
    click.echo(f"slide       {path}", err=log_json)
    code = process(path, output, device, no_progress, log_json)
    if code == 0:
        point_out(path, output / path.stem, to_stderr=log_json)
    return code


def get_slide(output: Path, download: bool) -> Path:
    """Paint or download the slide into the output folder and return its path; raises CellslideError without network."""
    from cellslide.slides import painted as demo

    if download:
        path = output / "CMU-1-Small-Region.svs"
        demo.fetch_sample(path)
    else:
        path = output / "demo-slide.tif"
        demo.make_slide(path)
    return path


def process(path: Path, output: Path, device: str, no_progress: bool, log_json: bool) -> int:
    """Segment the slide with the model that ships, and type its nuclei if a classifier ships; return the exit code."""
    from cellslide.cli.many import finish, ledger_for, telling, to_targets
    from cellslide.cli.segment import run
    from cellslide.config import InferConfig, OutputConfig, SegmentConfig
    from cellslide.slides.inputs import expand_slides
    from cellslide.weights import Manifest

    config = SegmentConfig(infer=InferConfig(device=device), output=OutputConfig(overwrite=True))
    targets = to_targets(expand_slides([path]), output)
    tell = telling(log_json, no_progress, ledger_for(targets, output))
    typed = "classify" in Manifest.load().defaults
    return finish(run_both(targets, config, tell) if typed else run(targets, config, [device], None, tell), tell)


def run_both(targets: list[Target], config: SegmentConfig, tell: RunOutput) -> list[SlideOutcome]:
    """Segment the slide and type its nuclei with the classifier that ships, for its first organ."""
    from cellslide.classify.columns import Rule
    from cellslide.classify.decision import DecisionConfig
    from cellslide.cli import classify, run
    from cellslide.config import ClassifyConfig

    classifier = classify.load(ClassifyConfig(infer=config.infer, output=config.output))
    spec = classifier.spec
    rule = Rule(DecisionConfig(), spec.calibration, tuple(c.name for c in spec.classes))
    organ_of = classify.organ_finder(spec, spec.organs[0] if spec.organs else None)
    return run.run(targets, config, classifier, rule, organ_of, None, tell)


def point_out(path: Path, folder: Path, to_stderr: bool) -> None:
    """Draw the overlays and print where everything is."""
    from cellslide.report.overlay import densest_region, render_overlay
    from cellslide.slides.slide import open_slide

    table = folder / "cells.zarr"
    with open_slide(path) as slide:
        whole = render_overlay(slide, table, folder / "overlay.png")
        detail = densest_region(slide.info, table, DETAIL_PX)
        close = render_overlay(slide, table, folder / "overlay-detail.png", detail)
    for line in (
        f"report      {folder / 'report.html'}",
        f"look at     {whole}",
        f"close up    {close}",
        f"in QuPath   open {path}, then drag {folder / 'cells.geojson.gz'} onto it",
        f"in Python   spatialdata.read_zarr({str(table)!r})",
        f"the record  {folder / 'run.json'}",
    ):
        click.echo(line, err=to_stderr)
