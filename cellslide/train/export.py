"""Writing a trained model: safetensors, its manifest entry, and a card of what made it."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import save
from torch import Tensor

from cellslide.evaluate.dataset import MANIFEST
from cellslide.train.data import TrainImage, TrainSet
from cellslide.train.recipe import Recipe

WEIGHTS = "model.safetensors"


def write_model(
    folder: Path,
    state: Mapping[str, Tensor],
    recipe: Recipe,
    sets: Sequence[TrainSet],
    metrics: Mapping[str, float],
    step: int,
) -> None:
    """Write the three files of a segmentation model to `folder`."""
    card = {"metrics": dict(metrics), "step": step, "recipe": recipe.as_dict(), "data": [_used(s) for s in sets]}
    write_files(folder, state, lambda sha256, size: manifest_entry(recipe, sets, metrics, sha256, size), card)


def write_files(
    folder: Path, state: Mapping[str, Tensor], entry_of: Callable[[str, int], dict[str, Any]], card: Mapping[str, Any]
) -> None:
    """Write `model.safetensors`, `model.yaml` (one manifest entry) and `card.json` to `folder`, each by a rename.

    entry_of  gives the entry from the weights' sha256 and size in bytes; the card holds it too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: value.detach().cpu().contiguous() for name, value in state.items()})
    _replace(folder / WEIGHTS, data)
    entry = entry_of(hashlib.sha256(data).hexdigest(), len(data))
    _replace(folder / "model.yaml", yaml.safe_dump(entry, sort_keys=False).encode())
    _replace(folder / "card.json", json.dumps({"entry": entry, **card}, indent=1).encode())


def manifest_entry(
    recipe: Recipe, sets: Sequence[TrainSet], metrics: Mapping[str, float], sha256: str, size_bytes: int
) -> dict[str, Any]:
    """Return the entry of `weights_manifest.yaml` for these weights."""
    model = recipe.model
    return {
        "id": recipe.id,
        "task": "segment",
        "arch": model.arch,
        "config": dict(model.config),
        "file": WEIGHTS,
        "sha256": sha256,
        "size_bytes": size_bytes,
        "licence": "Apache-2.0",
        "gated": False,
        "mpp": recipe.mpp,
        "tile_px": 512,
        "mean": list(model.mean),
        "std": list(model.std),
        "classes": [{"name": name, "color": list(color_of(i))} for i, name in enumerate(model.classes)],
        "organs": [],
        "trained_on": [{"dataset": s.name, "licence": "; ".join(licences(s.path))} for s in sets if s.trains],
        "metrics": {
            "validation": {name[4:]: round(value, 4) for name, value in metrics.items() if name.startswith("val/")}
        },
        "decode": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe.decode).items()},
        "citation": "CellVTA, Yang et al. 2025 (architecture); weights trained from scratch with cellslide",
    }


COLORS = ((255, 0, 0), (34, 221, 77), (35, 92, 236), (254, 255, 0), (255, 159, 68), (35, 255, 255))


def color_of(index: int) -> tuple[int, int, int]:
    """Return a class colour, those of PanNuke first."""
    return COLORS[index % len(COLORS)]


def licences(path: Path) -> list[str]:
    """Return the licences that a data set's manifest names, sorted."""
    with (path / MANIFEST).open(newline="", encoding="utf-8-sig") as file:
        return sorted({row["licence"] for row in csv.DictReader(file) if row.get("licence")})


def _used(train_set: TrainSet) -> dict[str, Any]:
    counts = {part: {"images": len(items), "nuclei": sum(_count(i) for i in items)}
              for part, items in (("train", train_set.train), ("val", train_set.val))}  # fmt: skip
    return {"name": train_set.name, "weight": train_set.weight, "licences": licences(train_set.path), **counts,
            "val_images": [item.name for item in train_set.val]}  # fmt: skip


def _count(item: TrainImage) -> int:
    return len(np.unique(item.labels[item.labels > 0]))


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)
