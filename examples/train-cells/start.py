"""Write a backbone to start from: an EfficientNet-Lite as published, its blocks as a model of outlines trained them.

What found nuclei has seen more of them than a classifier's training will, so its encoder is the better beginning. Its
last layer, which outlines do not need, comes from the published file.

    python start.py efficientnet-lite0-57934424.pth runs/outlines -o start.safetensors
"""

from __future__ import annotations

from pathlib import Path

import click
import timm
from safetensors.torch import save_file

from cellslide.models.backbones import to_timm
from cellslide.models.checkpoint import check_fit
from cellslide.train.export import read_state

ENCODER = "encoder."


@click.command()
@click.argument("published", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("outlines", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--network", default="tf_efficientnet_lite0", show_default=True)
def main(published: Path, outlines: Path, output: Path, network: str) -> None:
    """Join PUBLISHED weights with the encoder of the model OUTLINES."""
    backbone = timm.create_model(network, num_classes=0)
    state = dict(to_timm(read_state(published), backbone))
    trained = {
        name.removeprefix(ENCODER): value for name, value in read_state(outlines).items() if name.startswith(ENCODER)
    }
    state |= {name: value.float() if value.is_floating_point() else value for name, value in trained.items()}
    check_fit(backbone.state_dict(), state, f"{outlines}: does not fit {network}")
    save_file({name: value.contiguous() for name, value in state.items()}, output)
    click.echo(f"{len(trained)} of {len(state)} tensors from {outlines}")


if __name__ == "__main__":
    main()
