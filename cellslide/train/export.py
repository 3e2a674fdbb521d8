"""Writing a trained model: safetensors, its manifest entry, a card of what made it; and reading one to begin with."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import yaml
from safetensors.torch import save
from torch import Tensor

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import MANIFEST
from cellslide.models.checkpoint import read_tensors
from cellslide.store.atomic import beside
from cellslide.train.data import ImageSet
from cellslide.train.recipe import RunLength
from cellslide.types import ClassSpec
from cellslide.weights.manifest import ENTRY_FILE, Task, TrainedOn, Triple, WeightsEntry

WEIGHTS = "model.safetensors"
CARD = "card.json"
LICENCE = "Apache-2.0"
COLORS = ((255, 0, 0), (34, 221, 77), (35, 92, 236), (254, 255, 0), (255, 159, 68), (35, 255, 255))

# Writes a state dict as a model into a folder, with the metrics and the step that it comes from.
ModelWriter = Callable[[Path, Mapping[str, Tensor], Mapping[str, float], int], None]
Metrics = Mapping[str, float]


class Norm(Protocol):
    """Mean and standard deviation of a network's images."""

    @property
    def mean(self) -> Triple: ...
    @property
    def std(self) -> Triple: ...


def model_writer(
    recipe: RunLength, data: Sequence[Mapping[str, Any]], entry_of: Callable[[Metrics], WeightsEntry], **said: Any
) -> ModelWriter:
    """Return what writes weights, their manifest entry, and a card with the metrics, `said`, the recipe and `data`."""

    def write(folder: Path, state: Mapping[str, Tensor], metrics: Metrics, step: int) -> None:
        card = {"metrics": dict(metrics), "step": step, **said, "recipe": recipe.as_dict(), "data": data}
        write_files(folder, state, entry_of(metrics), card)

    return write


def write_files(folder: Path, state: Mapping[str, Tensor], entry: WeightsEntry, card: Mapping[str, Any]) -> None:
    """Write `model.safetensors`, `model.yaml` (one manifest entry) and `card.json` to `folder`, each by a rename.

    The entry gets the hash and the size of the weights; the card holds it too.
    """
    data = save({name: value.detach().cpu().contiguous() for name, value in state.items()})
    _replace(folder / WEIGHTS, data)
    known = replace(entry, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)).as_dict()
    _replace(folder / ENTRY_FILE, yaml.safe_dump(known, sort_keys=False).encode())
    _replace(folder / CARD, json.dumps({"entry": known, **card}, indent=1).encode())


def weights_in(path: Path) -> Path:
    """Return the file of weights that a path means: itself, or that of a run's folder; UsageError if there is none."""
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{path}: no such file of weights")
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of weights, or of a run's folder, without Lightning's prefix.

    Raises UsageError if there is no file, WeightsError if it holds no tensors or would run code.
    """
    state, _ = read_tensors(weights_in(path))
    return {name.removeprefix("model."): value for name, value in state.items()}


def trained_entry(
    recipe: RunLength, task: Task, arch: str, norm: Norm, seen: Iterable[tuple[str, Path]], metrics: Metrics
) -> WeightsEntry:
    """Return what the manifest entries of all trainings have in common; each adds its own by `replace`.

    seen  the data sets that were learned from, by name and folder.
    """
    scores = {name[4:]: round(value, 4) for name, value in metrics.items() if name.startswith("val/")}
    return WeightsEntry(
        id=recipe.id,
        task=task,
        arch=arch,
        licence=LICENCE,
        file=WEIGHTS,
        mpp=recipe.mpp,
        mean=norm.mean,
        std=norm.std,
        trained_on=tuple(TrainedOn(name, "; ".join(licences(path))) for name, path in seen),
        metrics={"validation": scores} if scores else {},
    )


def drawn_from(sets: Iterable[ImageSet[Any, Any]]) -> list[tuple[str, Path]]:
    """Return name and folder of the sets that train."""
    return [(s.name, s.path) for s in sets if s.trains]


def class_specs(names: Sequence[str]) -> tuple[ClassSpec, ...]:
    """Return classes with their colours, those of PanNuke first."""
    return tuple(ClassSpec(name, COLORS[k % len(COLORS)]) for k, name in enumerate(names))


def licences(path: Path) -> list[str]:
    """Return the licences that a data set's manifest names, sorted."""
    with (path / MANIFEST).open(newline="", encoding="utf-8-sig") as file:
        return sorted({row["licence"] for row in csv.DictReader(file) if row.get("licence")})


def used(images: ImageSet[Any, Any], told: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    """Return what a card says of a data set; `told` gives that of the images that train, or validate."""
    return {
        "name": images.name,
        "weight": images.weight,
        "licences": licences(images.path),
        "train": told(images.train),
        "val": told(images.val),
        "val_images": [image.name for image in images.val],
    }


def _replace(path: Path, data: bytes) -> None:
    with beside(path) as scratch:
        scratch.write_bytes(data)
