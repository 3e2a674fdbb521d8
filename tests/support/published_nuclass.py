"""Small NuClass models and files in the published layouts. Shared by tests; this is no test file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cellslide.models.nuclass import NuClass, NuClassConfig

# The published backbones with other sizes: what is left of them is the structure, and so the names.
UNI = {"embed_dim": 128, "depth": 2, "num_heads": 2, "img_size": 28}
DINO = {"embed_dim": 64, "depth": 2, "num_heads": 1}
SIZES: dict[str, Any] = {
    "local": {"name": "uni2_h", "args": UNI},
    "context": {"name": "dinov3_vitl16", "args": DINO},
    "organ_width": 8, "film_width": 12, "head_width": 16, "proj_width": 10, "gate_width": 6, "gate_hidden": [7, 5],
}  # fmt: skip
# A model of our own: any backbones of timm.
OWN: dict[str, Any] = {
    **SIZES,
    "local": {"name": "resnet10t", "args": {"channels": [8, 8, 16, 16], "stem_width": 8}, "pool": "avg"},
    "context": {
        "name": "vit_tiny_patch16_224",
        "args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        "pool": "cls",
    },
    "learned_unknown": True,
}
LAYER_TO_HF = (
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"\.gamma_([12])$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.fc1\.", ".mlp.up_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
)


def small_model(changes: Mapping[str, Any] | None = None, classes: int = 3, organs: int = 2, seed: int = 0) -> NuClass:
    """Return a small NuClass in eval mode whose every parameter is random, FiLM and biases too."""
    module = NuClass(NuClassConfig.of({**SIZES, **(changes or {})}, classes, organs))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def to_hf(state: Mapping[str, Tensor], layer: str = "layer") -> dict[str, Tensor]:
    """Return DINOv3 tensors under the names of transformers; `layer` is "layer" or, since version 5, "model.layer"."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in LAYER_TO_HF:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^blocks\.", f"{layer}.", name)
        if name.endswith(".attn.qkv.weight"):
            stem = name.removesuffix(".attn.qkv.weight")
            renamed |= {f"{stem}.attention.{w}_proj.weight": t for w, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            renamed[name] = tensor
    return renamed


def gate_state(module: NuClass, layer: str = "layer") -> dict[str, Tensor]:
    """Return a model's tensors as the gate's published checkpoint has them."""
    prefix = "modelB.dino_model."
    state = module.state_dict()
    dino = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return rest | {prefix + name: tensor for name, tensor in to_hf(dino, layer).items()}


def local_state(module: NuClass) -> dict[str, Tensor]:
    """Return path local as its own published checkpoint has it, FiLM under its old names."""
    state = {n.removeprefix("modelA."): t for n, t in module.state_dict().items() if n.startswith("modelA.")}
    return {name.replace("tissue_film.net.", "tissue_film."): tensor for name, tensor in state.items()}


def global_state(module: NuClass) -> dict[str, Tensor]:
    """Return path global as its own published checkpoint has it, with what only training needs."""
    names = (
        (r"^modelA\.(feat_norm|tissue_film|head)\.", r"a_\1."),
        (r"^modelA\.tissue_embedder\.", "a_tissue_embed."),
        (r"^modelB\.head\.", "head_B."),
        (r"^modelB\.", ""),
    )
    state: dict[str, Tensor] = {}
    for name, tensor in gate_state(module).items():
        if name.startswith(("modelA.uni_encoder.", "gate_")):
            continue
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    wide = 2 * module.config.proj_width + 1
    spare = {"gate_mlp.0.weight": (256, wide), "gate_mlp.0.bias": (256,), "gate_mlp.2.weight": (1, 256),
             "gate_mlp.2.bias": (1,), "ctx_film_uni.net.0.weight": (4, 4)}  # fmt: skip
    return state | {name: torch.zeros(shape) for name, shape in spare.items()}


def images(side: int, count: int = 3, seed: int = 1) -> Tensor:
    """Return random images (count, 3, side, side)."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
