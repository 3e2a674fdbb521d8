"""What the gate sees of cells, computed once from frozen paths and kept in a file: a gate then trains in a minute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cellslide.models.nuclass import NuClass
from cellslide.store.atomic import beside
from cellslide.train.framework import precision_of
from cellslide.train.loaders import DrawSampler, start_worker
from cellslide.train.nuclass.cells import CellCrops, CellDataset, CellImage, exact_loader, normalise
from cellslide.train.nuclass.recipe import NuClassRecipe


class FeatureBatch(NamedTuple):
    """Cells as the gate sees them, float32: local (B, D) after FiLM, fused (B, 2P); label int64 (B,)."""

    local: Tensor
    fused: Tensor
    label: Tensor


def kept_features(
    folder: Path, name: str, model: NuClass, images: Sequence[CellImage], recipe: NuClassRecipe, workers: int = 0
) -> FeatureBatch:
    """Return the features of all cells of `images` from `folder/name.safetensors`, or compute and write them.

    "train" takes `recipe.gate.views` augmented passes, other names the cells as they are. A file made with other
    weights, crops or cells is replaced.
    """
    if not images:
        return FeatureBatch(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64))
    views = recipe.gate.views if name == "train" else 0
    key = feature_key(model, images, recipe, views)
    path = folder / f"{name}.safetensors"
    found = _read(path, key)
    if found is None:
        batches = _augmented(images, recipe, views, workers) if views else exact_loader(images, recipe, True, workers)
        found = compute_features(model, batches, recipe)
        with beside(path) as scratch:
            save_file(found._asdict(), scratch, {"key": key})
    return found


def feature_key(model: NuClass, images: Sequence[CellImage], recipe: NuClassRecipe, views: int) -> str:
    """Return a hash of all that features depend on."""
    paths = {n: t.contiguous() for n, t in model.state_dict().items() if n.startswith(("modelA.", "modelB."))}
    keys: tuple[str, ...] = ("mpp", "local", "context", "classes", "organs", "mean", "std", "precision")
    if views:
        keys += ("seed", "augment", "unknown_organ_p", "jitter_px", "context_training")
    plain = recipe.as_dict()
    said = {"views": views, **{k: plain[k] for k in keys}}
    digest = hashlib.sha256(save(paths))
    digest.update(json.dumps(said, sort_keys=True).encode())
    for image in images:
        digest.update(f"{image.name} {image.organ}".encode())
        digest.update(image.xy.tobytes() + image.label.tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> FeatureBatch | None:
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        return FeatureBatch(*(file.get_tensor(name) for name in FeatureBatch._fields))


def _augmented(images: Sequence[CellImage], recipe: NuClassRecipe, views: int, workers: int) -> Iterable[CellCrops]:
    dataset = CellDataset(images, recipe, context=True)
    draws = range(views * len(dataset.row_of))
    return DataLoader(
        dataset, recipe.batch_size, sampler=draws, num_workers=workers, worker_init_fn=start_worker
    )  # fmt: skip


@torch.no_grad()
def compute_features(model: NuClass, batches: Iterable[CellCrops], recipe: NuClassRecipe) -> FeatureBatch:
    """Return the features of all cells of `batches`, on the device where `model` is, in evaluation mode."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    made: list[FeatureBatch] = []
    with _precision(recipe, device):
        for batch in batches:
            local_image, context = (normalise(x.to(device), recipe) for x in (batch.local, batch.context))
            local = model.local_path(local_image, batch.organ.to(device))
            u = local.raw if model.shares_backbone else None
            fused = model.global_path(local_image, model.context_vector(context), u).fused
            made.append(FeatureBatch(local.features.float().cpu(), fused.float().cpu(), batch.label))
    model.train(training)
    return FeatureBatch(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def _precision(recipe: NuClassRecipe, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_of(recipe, device.type) == "bf16-mixed")


class FeatureSteps(Dataset[FeatureBatch]):
    """Whole batches by step number; every cell comes once before any comes again, in an order drawn anew."""

    def __init__(self, features: FeatureBatch, recipe: NuClassRecipe) -> None:
        self.features, self.recipe = features, recipe

    def __getitem__(self, step: int) -> FeatureBatch:
        """Return the batch of a step counted from 0 over the whole run."""
        size, n = self.recipe.batch_size, len(self.features.label)
        turn, place = np.divmod(np.arange(step * size, (step + 1) * size), n)
        rows = np.empty(size, np.int64)
        for t in np.unique(turn):
            order = np.random.default_rng([self.recipe.seed, 3, int(t)]).permutation(n)
            rows[turn == t] = order[place[turn == t]]
        index = torch.from_numpy(rows)
        return FeatureBatch(*(column[index] for column in self.features))


def feature_loaders(
    train: FeatureBatch, val: FeatureBatch, recipe: NuClassRecipe, first_epoch: int = 0
) -> tuple[DataLoader[FeatureBatch], DataLoader[FeatureBatch]]:
    """Return the loaders of training steps and of the validation cells in one batch."""
    sampler = DrawSampler(recipe.epoch_steps)
    sampler.set_epoch(first_epoch)
    steps = DataLoader(FeatureSteps(train, recipe), batch_size=None, sampler=sampler)
    whole: Any = [val] if len(val.label) else []
    return steps, DataLoader(whole, batch_size=None)
