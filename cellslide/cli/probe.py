"""`cellslide probe`: what vectors of nuclei know of their classes, by neighbours and by a linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellslide.cli import grouped
from cellslide.cli.embed import reading_options
from cellslide.cli.options import model_options, settings_of, verbosity_options
from cellslide.cli.typed import dataset_mpp_option
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.embed.probe import Labelled
    from cellslide.evaluate.dataset import Sample
    from cellslide.types import Float32, Float64

OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers with commas") from None


@grouped.define()
@click.argument("source", type=click.Path(exists=True, path_type=Path), metavar="DATASET_DIR|FILE.npz")
@model_options
@dataset_mpp_option
@reading_options
@click.option(
    "--k", "neighbours", default="10,20,100,200,500", show_default=True, callback=_numbers, help="Neighbours asked."
)
@click.option("--epochs", type=int, default=100, show_default=True, help="Epochs of the linear layer.")
@click.option("--save", "save_file", type=OUTPUT_FILE, metavar="FILE.npz", help="Keep the vectors for another probe.")
@click.option("--json", "json_file", type=OUTPUT_FILE, metavar="FILE", help="Write the scores as JSON.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
@verbosity_options
def command(
    source: Path, neighbours: tuple[int, ...], epochs: int, save_file: Path | None, json_file: Path | None,
    **flags: Any,
) -> None:  # fmt: skip
    """Probe a MUSE backbone on a data set with typed nuclei: KNN and a linear layer, the backbone left as it is.

    Learns from the split train, chooses on val, tests on test; where there is no test, val is tested and nothing
    chosen. FILE.npz are vectors that --save kept.

    \b
    Examples:
      cellslide probe data/brca-m2c --model muse-vit-s-512 --read-mpp 0.5
      cellslide probe data/brca-m2c --weights runs/muse/model.safetensors --save vectors.npz --json probe.json
      cellslide probe vectors.npz --k 10,50
    """
    from rich.console import Console

    from cellslide.embed.probe import ProbeConfig, probe, save

    config = ProbeConfig(neighbours=neighbours, epochs=epochs, seed=flags["seed"])
    model, labelled = _read(source, flags)
    if save_file is not None:
        save_file.parent.mkdir(parents=True, exist_ok=True)
        save(save_file, labelled)
    report = probe(labelled, model, source.resolve().name, config)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(report.to_json(), encoding="utf-8")
    Console().print(report.table())


def _read(source: Path, flags: dict[str, Any]) -> tuple[str, Labelled]:
    """Return the name of the model and the vectors: of a file, or read from the images of a data set."""
    from cellslide.embed.probe import load

    if source.is_dir():
        return _embed(source, flags)
    if flags["model"] is not None or flags["weights"] is not None:
        raise UsageError(f"{source}: its vectors are read already, so it goes without --model and --weights")
    return source.name, load(source)


def _embed(source: Path, flags: dict[str, Any]) -> tuple[str, Labelled]:
    from cellslide.cli.typed import tracked
    from cellslide.config import EmbedConfig, InferConfig
    from cellslide.embed import embed_array, open_embedder
    from cellslide.embed.probe import gather
    from cellslide.evaluate.layouts.registry import open_dataset
    from cellslide.evaluate.report import pixel_size
    from cellslide.weights.muse import load_muse

    data, mpp = open_dataset(source), flags.pop("mpp")
    for sample in data.samples:  # Before a network is loaded for nothing.
        pixel_size(sample, mpp)
    config = settings_of(EmbedConfig, flags, infer=settings_of(InferConfig, flags))
    embedder = open_embedder(load_muse(config.model, config.weights), config)

    def read(sample: Sample, size: float, xy: Float64) -> Float32:
        return embed_array(embedder, sample.load_image(), size, xy)

    return embedder.weights_id, gather(data, read, mpp, tracked(data, flags["no_progress"]))
