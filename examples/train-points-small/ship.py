"""Write a point detector's weights in half precision and print what its entry in the manifest needs.

    python ship.py runs/points ../../cellslide/data/points-small.safetensors --odds 1,1,2,0.7

`--odds` multiplies the odds of the classes, in their order, and of background: logarithms are added to the last bias.
They are a choice, to be made on validation images (`try_odds.py`); the printed metrics are those before.
The auxiliary mask stays in the file, so that a later training may start from it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import click
import torch
import yaml
from safetensors.torch import load_file, save_file

BIAS = "head.cls_head.layers.3.bias"
FACTS = (
    "id", "task", "arch", "config", "sha256", "size_bytes", "mpp", "mean", "std", "classes", "detect", "trained_on",
    "metrics",
)  # fmt: skip


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--score-threshold", type=click.FloatRange(0, 1), help="Replaces the recipe's.")
@click.option("--odds", help="Factors of the classes and background, with commas.")
def main(run: Path, target: Path, score_threshold: float | None, odds: str | None) -> None:
    """Write the best weights of training folder RUN to TARGET in half precision."""
    state = load_file(run / "model.safetensors")
    if odds:
        state[BIAS] = state[BIAS] + torch.tensor([float(x) for x in odds.split(",")]).log()
    halves = {name: value.half() if value.dtype == torch.float32 else value for name, value in state.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(halves, target)
    entry = yaml.safe_load((run / "model.yaml").read_text(encoding="utf-8"))
    data = target.read_bytes()
    entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    if score_threshold is not None:
        entry["detect"]["score_threshold"] = score_threshold
    click.echo(yaml.safe_dump({key: entry[key] for key in FACTS}, sort_keys=False, default_flow_style=None))


if __name__ == "__main__":
    main()
