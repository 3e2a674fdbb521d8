"""Put the result of training runs into the package: half-precision weights, and the facts for `weights_manifest.yaml`.

    python ship.py runs/sixth runs/seventh ../../cellslide/data/nuclei-small.safetensors

Of several runs that began with the same weights, the mean is written: it keeps most of what each has learned. Prints
`sha256`, `size_bytes` and `config`, which go into the manifest's entry with the measured scores. Scores are measured on
the file that this writes, not on the one that training left.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import click
import torch
import yaml
from safetensors.torch import load_file, save_file


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
def main(runs: tuple[Path, ...], target: Path) -> None:
    """Write the mean of the weights of training folders RUNS to TARGET in half precision."""
    entry = yaml.safe_load((runs[-1] / "model.yaml").read_text(encoding="utf-8"))
    state = mean_state([load_file(run / "model.safetensors") for run in runs])
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()}, target)
    data = target.read_bytes()
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data), "config": entry["config"]}
    click.echo(yaml.safe_dump(facts, sort_keys=False, default_flow_style=None))


def mean_state(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of float tensors, key by key; counters are those of the last run."""
    last = states[-1]
    for state in states:
        if state.keys() != last.keys():
            raise click.ClickException("the runs hold different networks")
    return {k: torch.stack([s[k] for s in states]).mean(dim=0) if v.is_floating_point() else v for k, v in last.items()}


if __name__ == "__main__":
    main()
