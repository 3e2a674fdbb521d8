"""`cellslide embed`: give every nucleus a feature vector, read by a MUSE backbone at its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
)

if TYPE_CHECKING:
    from cellslide.batch.run import SlideOutcome
    from cellslide.classify.targets import Target
    from cellslide.config import EmbedConfig
    from cellslide.embed import Embedder
    from cellslide.progress import Watch

from cellslide.cli.classify import bring_cells, cells_options
from cellslide.cli.many import RunOutput, finish, ledger_for, one_by_one, telling

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


@click.command()
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
@run_options
def command(
    slides: tuple[str, ...], output: Path, no_progress: bool, log_json: bool, **settings: Any
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
    from cellslide.classify.targets import expand_targets

    config = to_config(settings)
    targets = expand_targets(slides, output)
    embedder = load(config)
    if settings["cells"] is not None:
        targets = [_with_cells(targets, settings)]
    tell = telling(log_json, no_progress, ledger_for(targets, output, slides))
    return finish(_run(targets, embedder, tell), tell)


def to_config(flags: dict[str, Any]) -> EmbedConfig:
    """Return the settings that the flags give; raises UsageError for values out of range."""
    from cellslide.config import EmbedConfig, InferConfig

    infer = InferConfig(**{name: flags[name] for name in ("device", "batch_size", "precision", "seed")})
    names = ("model", "weights", "mpp", "allow_fluorescence", "read_mpp", "field_px", "to", "overwrite")
    return EmbedConfig(**{name: flags[name] for name in names if name in flags}, infer=infer)


def load(config: EmbedConfig) -> Embedder:
    """Return the backbone that the flags name, on its device."""
    from cellslide.embed import open_embedder
    from cellslide.weights.muse import load_muse

    return open_embedder(load_muse(config.model, config.weights), config)


def _with_cells(targets: list[Target], flags: dict[str, Any]) -> Target:
    """Make the cell table of the one slide from `--cells`; returns the slide."""
    from cellslide.config import ClassifyConfig, OutputConfig

    names = ("mpp", "allow_fluorescence", "cells", "cells_unit", "cells_mpp", "alignment", "alignment_direction")
    output = OutputConfig(overwrite=flags["overwrite"])
    return bring_cells(targets, ClassifyConfig(**{name: flags[name] for name in names}, output=output))


def _run(targets: list[Target], embedder: Embedder, tell: RunOutput) -> list[SlideOutcome]:
    from cellslide.batch.run import embed_slides

    def work(stream: Iterator[Target], watch: Watch) -> Iterator[SlideOutcome]:
        return embed_slides(stream, embedder, watch)

    return one_by_one(targets, work, tell, None, lambda _: True)
