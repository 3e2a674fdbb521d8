"""Write the result of a nuclass-gate run in half precision, beside an entry that loads it, and print its facts.

    python ship.py runs/cells ../../cellslide/data/cells-breast-small.safetensors

The run's `shipped/` folder gets the same weights and a `model.yaml` for `calibrate` and `evaluate`, so that what is
calibrated and scored is what ships. Prints `sha256`, `size_bytes`, `config` and, once calibrated, `calibration` and
`safe_gate`, which go into the manifest's entry.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from safetensors.torch import load_file, save_file

FACTS = ("sha256", "size_bytes", "config", "classes", "organs", "calibration", "safe_gate")


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
def main(run: Path, target: Path) -> None:
    """Write the weights of training folder RUN to TARGET in half precision; run again after the calibration."""
    shipped = run / "shipped"
    shipped.mkdir(exist_ok=True)
    state = load_file(run / "model.safetensors")
    halves = {name: value.half() if value.dtype == torch.float32 else value for name, value in state.items()}
    for path in (shipped / "model.safetensors", target):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(halves, path)
    entry = described(run, shipped, target.read_bytes())
    (shipped / "model.yaml").write_text(yaml.safe_dump(entry, sort_keys=False), encoding="utf-8")
    facts = {key: entry[key] for key in FACTS if key in entry}
    click.echo(yaml.safe_dump(facts, sort_keys=False, default_flow_style=None))


def described(run: Path, shipped: Path, data: bytes) -> dict[str, Any]:
    """Return the entry of the run with the facts of the half-precision file, and its calibration if it has one."""
    entry: dict[str, Any] = yaml.safe_load((run / "model.yaml").read_text(encoding="utf-8"))
    entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    before = shipped / "model.yaml"
    if before.is_file():
        calibrated = yaml.safe_load(before.read_text(encoding="utf-8"))
        # A calibration of other weights would be worse than none.
        if calibrated.get("sha256") == entry["sha256"]:
            entry |= {key: calibrated[key] for key in ("calibration", "safe_gate") if key in calibrated}
    return entry


if __name__ == "__main__":
    main()
