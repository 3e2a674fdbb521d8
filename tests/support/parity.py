"""How the published fixtures were made: weights filled from their names, an input from a fixed seed.

Shared by the parity tests of all models; this is no test file.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HEADS_ATOL = 2e-5
PYRAMID_ATOL = 2e-4


def weight_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 array that the recipe gives to the state-dict entry `name`."""
    w = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        return w * np.float32(0.2 if name.endswith("pos_embed") else 1 / math.sqrt(np.prod(shape[1:])))
    w = w * np.float32(0.05)
    if name.endswith("running_var"):
        return np.abs(w) + 1
    # Every one-dimensional `.weight` of these models belongs to a norm.
    return 1 + w if name.endswith(".weight") else w


def recipe_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return a state dict for `module` filled by the recipe; integer buffers as they are."""
    return {
        name: torch.from_numpy(np.asarray(weight_of(name, tuple(t.shape)))) if t.is_floating_point() else t
        for name, t in module.state_dict().items()
    }


def fill(module: nn.Module) -> nn.Module:
    """Fill `module` by the recipe and return it in eval mode."""
    module.load_state_dict(recipe_state_dict(module))
    return module.eval()


def recipe_input(height: int, width: int) -> Tensor:
    """Return the input of all fixtures, (1, 3, H, W), normalised with mean = std = 0.5."""
    x = np.random.default_rng(0).random((1, 3, height, width), dtype=np.float32)
    return torch.from_numpy((x - np.float32(0.5)) / np.float32(0.5))


def load_fixture(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the description and the arrays of one fixture."""
    folder = shared / "parity"
    with np.load(folder / f"{name}.npz") as arrays:
        return json.loads((folder / f"{name}.json").read_text()), dict(arrays)


def load_keys(shared: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Return state-dict names and shapes of a published model."""
    keys = json.loads((shared / "parity" / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in keys.get("keys", keys).items()}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return state-dict names and shapes of `module`."""
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def max_error(got: Tensor, want: np.ndarray) -> float:
    """Return the largest absolute difference; shapes must be equal."""
    if tuple(got.shape) != want.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, expected {want.shape}")
    return float(np.abs(got.detach().numpy() - want).max())
