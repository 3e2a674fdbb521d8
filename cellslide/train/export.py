"""Writing a trained model: safetensors, its manifest entry, a card of what made it; and reading one to begin with."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from safetensors.torch import save
from torch import Tensor, nn

from cellslide.errors import UsageError
from cellslide.models.checkpoint import check_fit, read_tensors
from cellslide.models.registry import architecture_of
from cellslide.store.atomic import beside
from cellslide.train.data import licences
from cellslide.train.recipe import Recipe
from cellslide.train.task import Run, TrainingTask
from cellslide.weights.load import entry_beside
from cellslide.weights.manifest import ENTRY_FILE, Manifest, TrainedOn, WeightsEntry

WEIGHTS = "model.safetensors"
CARD = "card.json"
LICENCE = "Apache-2.0"
# Files of weights whose authors state a licence, by their names.
KNOWN_LICENCES = ((r"efficientnet[-_]?lite", "Apache-2.0"),)

log = logging.getLogger(__name__)

# Writes a state dict as a model into a folder, with the metrics and the step that it comes from.
ModelWriter = Callable[[Path, Mapping[str, Tensor], Mapping[str, float], int], None]
Metrics = Mapping[str, float]


def model_writer(task: TrainingTask, run: Run, data: Sequence[Mapping[str, Any]]) -> ModelWriter:
    """Return what writes weights, their manifest entry, and a card with the metrics, the recipe and `data`."""
    recipe = run.recipe
    seen = [TrainedOn(name, "; ".join(licences(path))) for name, path in task.seen(run.options, run.sets)]
    encoder = encoder_source(recipe)
    if encoder is not None:
        seen.append(encoder)
    said = {"encoder": asdict(encoder)} if encoder is not None else {}

    def write(folder: Path, state: Mapping[str, Tensor], metrics: Metrics, step: int) -> None:
        entry = trained_entry(recipe, task.entry(recipe, metrics), seen, metrics)
        card = {"metrics": dict(metrics), "step": step, **task.card, **said, "recipe": recipe.as_dict(), "data": data}
        write_files(folder, task.weights(state), entry, card)
        task.write_more(folder, state)

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


def load_start(model: nn.Module, path: Path) -> None:
    """Load weights to start from (a file, or the folder of a run); raises as `read_state`, and if they do not fit."""
    load_fitting(model, read_state(path), path)


def load_fitting(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Load tensors into a module; raises WeightsError that names `path` and every tensor that does not fit."""
    check_fit(module.state_dict(), state, f"{path}: does not fit")
    module.load_state_dict(dict(state))


def trained_entry(
    recipe: Recipe, own: Mapping[str, Any], seen: Sequence[TrainedOn], metrics: Metrics = MappingProxyType({})
) -> WeightsEntry:
    """Return the manifest entry of trained weights: `own` keys over those of the recipe's network."""
    own = {**recipe.network(), **own}
    architecture = architecture_of(own["arch"])
    scores = {name[4:]: round(value, 4) for name, value in metrics.items() if name.startswith("val/")}
    task = own.get("task", architecture.task)
    common = {
        "id": recipe.id,
        "task": task,
        "licence": LICENCE,
        "file": WEIGHTS,
        "mpp": recipe.mpp,
        "tile_px": (recipe.tile_px or architecture.tile_px) if task in ("segment", "detect") else None,
        "trained_on": tuple(seen),
        "metrics": {"validation": scores} if scores else {},
        "citation": f"{architecture.citation} (architecture); weights trained with cellslide",
    }
    return WeightsEntry(**{**common, **own})


def encoder_source(recipe: Recipe) -> TrainedOn | None:
    """Return the weights that the encoder starts from, with their licence: the recipe's, their entry's, or as known.

    Warns where nobody says it.
    """
    if recipe.encoder is None:
        return None
    weights, licence = recipe.encoder
    licence = licence or licence_of(weights)
    name = f"encoder weights {Path(weights).name}"
    if licence is None:
        log.warning("%s: licence not stated; set model.encoder_licence in --recipe", name)
    return TrainedOn(name, licence or "licence not stated")


def licence_of(weights: str) -> str | None:
    """Return the licence of a file of weights, of a run's folder, or of an id of the manifest; None if unknown."""
    path = Path(weights)
    entry = entry_beside(path / WEIGHTS if path.is_dir() else path) or Manifest.load().entries.get(weights)
    if entry is not None:
        return entry.licence
    return next((name for pattern, name in KNOWN_LICENCES if re.search(pattern, path.name, re.IGNORECASE)), None)


def _replace(path: Path, data: bytes) -> None:
    with beside(path) as scratch:
        scratch.write_bytes(data)
