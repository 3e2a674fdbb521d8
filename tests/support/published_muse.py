"""How the fixtures of MUSE and DPA-P2PNet were made, and checkpoints laid out as published ones.

Shared by the tests of these models; this is no test file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellslide.models.checkpoint import build_empty, load_strict
from tests.support.parity import recipe_state_dict

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A ViT and a residual network small enough to build in a test.
TINY_VIT: dict[str, Any] = {
    "encoder": {"name": "vit", "embed_dim": 32, "depth": 4, "heads": 2}, "extract_layers": [0, 1, 2, 3], "img_size": 64,
}  # fmt: skip
TINY_CONV: dict[str, Any] = {"encoder": "resnet10t", "widths": [8, 16, 32, 64]}
TINY_HEAD: dict[str, Any] = {"n_classes": 3, "hidden": 16, "space_px": 4}


def build(arch: str, config: Mapping[str, Any]) -> Any:
    """Return a network filled by the fixtures' recipe, in eval mode."""
    # Drawing the weights of the large ones, only to replace them, takes longer than the test.
    module = build_empty(arch, config)
    state = {
        name: torch.zeros_like(t, device="cpu") if t.is_meta else t for name, t in recipe_state_dict(module).items()
    }
    # This recipe scales the position embedding as any other tensor; the one of the older fixtures does not.
    for name in (name for name in state if name.endswith("pos_embed")):
        state[name] = state[name] * float(np.float32(1 / 0.2 / np.sqrt(np.prod(state[name].shape[1:]))))
    return load_strict(module, state, arch)


def fixture_input(height: int = 256, width: int = 256) -> Tensor:
    """Return the input of the fixtures, (1, 3, H, W), normalised as ImageNet's."""
    x = np.random.default_rng(0).random((1, 3, height, width), dtype=np.float32)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (MEAN, STD))
    return torch.from_numpy((x - mean) / std)


def write_teacher(path: Path, backbone: nn.Module) -> Path:
    """Write a backbone as it is published: below `module.backbone.` of `teacher`, with a head of DINO beside it."""
    state = {f"module.backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    torch.save({"teacher": state | {"module.head.last_layer.weight": torch.zeros(2, 2)}, "epoch": 3}, path)
    return path
