"""`cellslide demo`: the main job on a slide that needs no download, with the model that ships."""

from __future__ import annotations

from pathlib import Path

import click

from cellslide.cli.options import FOLDER, device_option, run_options

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
    """Segment a demonstration slide, draw its nuclei, and say where to look.

    The slide is painted by cellslide itself, so this works offline and needs no account. On two cores it takes
    less than three minutes. It writes to the output folder only, and begins anew each time.

    \b
    Example:
      cellslide demo
      cellslide demo -o demo-out --download
    """
    path = get_slide(output, download)
    click.echo(f"slide       {path}", err=log_json)
    code = segment(path, output, device, no_progress, log_json)
    if code == 0:
        point_out(path, output / path.stem, to_stderr=log_json)
    return code


def get_slide(output: Path, download: bool) -> Path:
    """Paint or download the slide into the output folder and return its path; raises CellslideError without network."""
    from cellslide import demo

    if download:
        path = output / "CMU-1-Small-Region.svs"
        demo.fetch_sample(path)
    else:
        path = output / "demo-slide.tif"
        demo.make_slide(path)
    return path


def segment(path: Path, output: Path, device: str, no_progress: bool, log_json: bool) -> int:
    """Run `cellslide segment` on the slide with the model that ships; return the exit code."""
    from cellslide.cli import segment as cli_segment
    from cellslide.config import InferConfig, OutputConfig, SegmentConfig
    from cellslide.segmenter import open_segmenter
    from cellslide.slides import expand_slides
    from cellslide.weights import load_model

    config = SegmentConfig(infer=InferConfig(device=device), output=OutputConfig(overwrite=True))
    with open_segmenter(load_model(), config) as segmenter:
        outcomes = cli_segment.run(expand_slides([path]), segmenter, output, log_json, not no_progress)
    return cli_segment.finish(outcomes, log_json)


def point_out(path: Path, folder: Path, to_stderr: bool) -> None:
    """Draw the overlays and print where everything is."""
    from cellslide.overlay import densest_region, render_overlay
    from cellslide.slide import open_slide

    table = folder / "cells.zarr"
    with open_slide(path) as slide:
        whole = render_overlay(slide, table, folder / "overlay.png")
        detail = densest_region(slide.info, table, DETAIL_PX)
        close = render_overlay(slide, table, folder / "overlay-detail.png", detail)
    for line in (
        f"look at     {whole}",
        f"close up    {close}",
        f"in QuPath   open {path}, then drag {folder / 'cells.geojson.gz'} onto it",
        f"in Python   spatialdata.read_zarr({str(table)!r})",
        f"the record  {folder / 'run.json'}",
    ):
        click.echo(line, err=to_stderr)
