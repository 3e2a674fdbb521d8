"""`cellslide genes`: genes that were not measured, predicted from a slide and its transcripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellslide.cli import grouped
from cellslide.cli.options import device_option, model_options, output_option, verbosity_options


@grouped.define()
@click.argument("slide", type=click.Path(exists=True, path_type=Path), metavar="SLIDE")
@output_option
@model_options
@click.option(
    "--transcripts",
    type=click.Path(exists=True, path_type=Path),
    metavar="BUNDLE",
    help="Xenium output of the same section; weights of morphology alone need none.",
)
@click.option(
    "--alignment",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Matrix or landmarks (.csv), or regions (.geojson), where none stands beside the slide.",
)
@click.option("--mpp", type=float, metavar="F", help="Pixel size of the slide in µm, over what its file says.")
@click.option(
    "--level",
    type=click.Choice(["tile", "token"]),
    default="tile",
    show_default=True,
    help="token: also a map by patch (18 µm), of weights that were trained for it.",
)
@click.option(
    "--missing-genes",
    type=click.Choice(["error", "zero"]),
    default="error",
    show_default=True,
    help="What a gene is that the weights read and the bundle lacks.",
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Tiles per forward pass.")
@device_option
@click.option("--no-progress", is_flag=True, help="No progress bar.")
@verbosity_options
def command(slide: Path, output: Path, missing_genes: str, no_progress: bool, **given: Any) -> None:  # fmt: skip
    """Predict genes of SLIDE with weights of `cellslide train fusion`.

    Writes genes.zarr (maps by tile, opened by spatialdata), genes.html to look at, and, where `segment` has found
    nuclei, obsm["genes"] of cells.zarr: the map's values at their places. Values are log1p counts of a tile. Where the
    bundle holds the predicted genes too, the true maps and the correlations stand beside.

    \b
    Example:
      cellslide genes he_image.ome.tif --weights runs/fusion --transcripts outs -o out
    """
    from cellslide.api import predict_genes
    from cellslide.cli.typed import image_progress
    from cellslide.progress import Watch

    with image_progress(no_progress) as progress:
        found = predict_genes(slide, output, zero_missing=missing_genes == "zero", watch=Watch(progress), **given)
    click.echo(f"{found.genes} genes on {found.tiles:,} tiles; {found.nuclei:,} nuclei have their values")
    if found.scores is not None and found.scores.spearman is not None:
        click.echo(f"measured too: rank correlation {found.scores.spearman:.3f}, squared error {found.scores.mse:.3f}")
