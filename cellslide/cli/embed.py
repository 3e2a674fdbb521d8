"""`cellslide embed`: give every nucleus a feature vector, read by a MUSE backbone at its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellslide.cli import grouped
from cellslide.cli.classify import cells_options
from cellslide.cli.many import do_slides, plan_slides
from cellslide.cli.options import (
    batch_size_option,
    chain,
    device_option,
    fluorescence_option,
    model_options,
    output_option,
    precision_option,
    run_options,
    seed_option,
    settings_of,
)

reading_options = chain(
    click.option(
        "--read-mpp", type=float, metavar="F", help="Pixel size at which nuclei are read, µm.  [default: the weights']"
    ),
    click.option(
        "--field-px", type=int, metavar="N",
        help="Edge of the windows that the network sees, in those pixels; a multiple of 32.  [default: the weights']",
    ),
    device_option,
    batch_size_option("Windows per forward pass."),
    precision_option,
    seed_option,
)  # fmt: skip


@grouped.define()
@click.argument("slides", nargs=-1, required=True, metavar="SLIDES_OR_OUTPUTS...")
@output_option
@model_options
@cells_options
@click.option(
    "--to", type=click.Choice(["zarr", "parquet", "npz"]), default="zarr", show_default=True,
    help="Put the vectors into the cell table, or beside it with the cells' ids.",
)  # fmt: skip
@click.option("--mpp", type=float, metavar="F", help="Pixel size of the slides in µm, where their files do not tell.")
@fluorescence_option
@reading_options
@click.option("--overwrite", is_flag=True, help="Read anew what was read with other settings.")
@click.option("--dry-run", is_flag=True, help="List slides and what their folders hold, and stop.")
@run_options
def command(
    slides: tuple[str, ...], output: Path, dry_run: bool, no_progress: bool, log_json: bool, **settings: Any
) -> int:  # fmt: skip
    """Give the nuclei of slides vectors: SLIDES whose cells.zarr lies in -o DIR, or the folders that `segment` wrote.

    `obsm["embedding"]` of the table gains one vector a nucleus, read from the dense map of a MUSE backbone. The network
    sees windows on a fixed grid, so a nucleus gets the same vector whatever others come with it. --model and --weights
    take a backbone or a point detector made of one. The same command again goes on where it stopped.

    \b
    Examples:
      cellslide embed out/slide --model muse-vit-s-512
      cellslide embed slides/ -o out --weights backbone.pth --to parquet
      cellslide embed slide.svs -o out --cells nuclei.csv
    """
    from cellslide.batch.executor import Inline
    from cellslide.batch.work import EmbedWork, bring_cells
    from cellslide.classify.targets import expand_targets
    from cellslide.config import ClassifyConfig, EmbedConfig, InferConfig, OutputConfig

    config = settings_of(EmbedConfig, settings, infer=settings_of(InferConfig, settings))
    targets = expand_targets(slides, output)
    if settings["cells"] is not None and not dry_run:
        own = {"model": None, "weights": None, "output": OutputConfig(overwrite=config.overwrite)}
        targets = [bring_cells(targets, settings_of(ClassifyConfig, {**settings, **own}))]
    executor = Inline(config.infer.device)
    if dry_run:
        return plan_slides(EmbedWork(config), targets, config.infer.device, output)
    return do_slides(EmbedWork(config), targets, executor, output, slides, log_json=log_json, no_progress=no_progress)
