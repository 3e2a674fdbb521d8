"""Put the result of a training run into the package: half-precision weights, and the facts for `weights_manifest.yaml`.

    python ship.py runs/small ../../cellslide/data/nuclei-small.safetensors

Prints `sha256`, `size_bytes` and `config`, which go into the manifest's entry with the measured scores. Scores are
measured on the file that this writes, not on the one that training left.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import click
import torch
import yaml
from safetensors.torch import load_file, save_file


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
def main(run: Path, target: Path) -> None:
    """Write the weights of training folder RUN to TARGET in half precision."""
    entry = yaml.safe_load((run / "model.yaml").read_text(encoding="utf-8"))
    state = load_file(run / "model.safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()}, target)
    data = target.read_bytes()
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data), "config": entry["config"]}
    click.echo(yaml.safe_dump(facts, sort_keys=False, default_flow_style=None))


if __name__ == "__main__":
    main()
