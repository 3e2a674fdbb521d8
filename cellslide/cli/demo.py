"""`cellslide demo`: the main job on a slide that needs no download, with the model that ships."""

from __future__ import annotations

from pathlib import Path

import click

from cellslide.cli import grouped
from cellslide.cli.many import choose_slides, do_slides
from cellslide.cli.options import FOLDER, device_option, run_options

DETAIL_PX = 800


@grouped.define()
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
    """Find and type the nuclei with the networks that ship, for the classifier's first organ; return the exit code."""
    from cellslide.batch.executor import Inline
    from cellslide.batch.work import ClassifyWork, SegmentWork, SlideWork
    from cellslide.config import ClassifyConfig, InferConfig, OutputConfig, SegmentConfig
    from cellslide.weights import Manifest

    infer, written, shipped = InferConfig(device=device), OutputConfig(overwrite=True), Manifest.load()
    typed = None
    if (name := shipped.defaults.get("classify")) is not None:
        organs = shipped.entry(name).organs
        typed = ClassifyWork(ClassifyConfig(organ=organs[0] if organs else None, infer=infer, output=written))
    work = SlideWork(SegmentWork(SegmentConfig(infer=infer, output=written)), typed)
    targets = choose_slides([str(path)], output)
    return do_slides(work, targets, Inline(device), output, log_json=log_json, no_progress=no_progress)


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
