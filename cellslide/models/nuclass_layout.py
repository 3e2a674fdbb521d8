"""Published NuClass checkpoints: which layout a file has, our names for its tensors, and the sizes that they give.

Three layouts are published: path local alone, path global alone, and the gate's, which holds both paths without what
only training needs and whose names are ours. All differences are tables here. A file of path global alone has one
crop backbone, which its own copy of path local reads too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from cellslide.errors import WeightsError
from cellslide.models.backbones import is_hf_dinov3, to_timm, vit_args
from cellslide.models.nuclass import NuClass
from cellslide.models.state_dict import below, rename

State = Mapping[str, Tensor]
Layout = Literal["local", "global", "gate"]

LOCAL_BACKBONE, GLOBAL_BACKBONE = "modelA.uni_encoder.", "modelB.uni_encoder."
CONTEXT_BACKBONE = "modelB.dino_model."

# What Lightning, torch.compile and parallel training put before names.
_WRAPPERS = ((r"(^|\.)_orig_mod\.", r"\1"),)
# FiLM was a plain sequence before it was a module with a `net`.
_FILM = ((r"(^|\.)((?:a_)?tissue_film)\.(\d)", r"\1\2.net.\3"),)
RENAMES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "gate": ((r"^modelB\.head_B\.", "modelB.head."),),
    "local": ((r"^(?:modelA\.)?(uni_encoder|feat_norm|tissue_embedder|tissue_film|head)\.", r"modelA.\1."),),
    "global": (
        (r"^uni_encoder\.", LOCAL_BACKBONE),
        (r"^a_(feat_norm|tissue_film|head)\.", r"modelA.\1."),
        (r"^a_tissue_embed\.", "modelA.tissue_embedder."),
        (r"^head_B\.", "modelB.head."),
        (r"^(proj_uni|proj_ctx|dino_model|gate_mlp)\.", r"modelB.\1."),
    ),
}
# Parts that no inference reads: a FiLM that the published code never calls and, beside a gate, the global path's copy
# of path local with the gate that it was trained by.
UNUSED: dict[Layout, str] = {
    "local": r"$^",
    "global": r"^ctx_film_uni\.",
    "gate": r"^modelB\.(a_\w+|gate_mlp|ctx_film_uni)\.",
}


def layout_of(state: State) -> Layout | None:
    """Return which published layout the names are of, or None for another model's."""
    names = set(state)
    if any(name.startswith("modelA.") for name in names):
        return "gate" if any(name.startswith("modelB.") for name in names) else "local"
    if any(name.startswith("head_B.") for name in names):
        return "global"
    return "local" if "feat_norm.weight" in names and "head.4.weight" in names else None


def is_nuclass(state: State) -> bool:
    """Return whether these tensors are a NuClass's, or those of one of its paths."""
    return layout_of(rename(state, _WRAPPERS)) is not None


def canonical_state(state: State, content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under the names of `NuClass`, those inside backbones as they are.

    Raises WeightsError for a file that is no NuClass.
    """
    state = rename(state, _WRAPPERS)
    layout = layout_of(state)
    if layout is None:
        raise WeightsError(
            f"{where}: no classifier: its tensors are neither those of a NuClass nor of one of its paths"
        )
    used = {name: tensor for name, tensor in state.items() if not re.match(UNUSED[layout], name)}
    return rename(rename(used, _FILM), RENAMES[layout])


def fit_backbones(module: NuClass, state: State) -> dict[str, Tensor]:
    """Return `state` with the tensors of each backbone under timm's names, ready for strict loading into `module`."""
    backbones = {LOCAL_BACKBONE: module.local_backbone}
    if module.has_global:
        backbones[CONTEXT_BACKBONE] = module.context_backbone
        if not module.shares_backbone:
            backbones[GLOBAL_BACKBONE] = module.global_backbone
    fitted = dict(state)
    for prefix, backbone in backbones.items():
        for name in [name for name in fitted if name.startswith(prefix)]:
            del fitted[name]
        fitted |= _fit(prefix, backbone, state)
    return fitted


def _fit(prefix: str, backbone: nn.Module, state: State) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in to_timm(below(state, prefix), backbone).items()}


def infer_config(state: State, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a published model, full or cut short, from the shapes of `canonical_state`.

    Raises KeyError for the tensor that is missing.
    """
    return _local_config(state) | (_global_config(state) if _has(state, "modelB.") else {"context": None})


def _has(state: State, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _local_config(state: State) -> dict[str, Any]:
    return {
        "local": {"name": "uni2_h", "args": vit_args(below(state, LOCAL_BACKBONE)), "pool": "cls"},
        "num_classes": state["modelA.head.4.weight"].shape[0],
        "num_organs": state["modelA.tissue_embedder.weight"].shape[0],
        "organ_width": state["modelA.tissue_embedder.weight"].shape[1],
        "film_width": state["modelA.tissue_film.net.0.weight"].shape[0],
        "head_width": state["modelA.head.1.weight"].shape[0],
    }


def _global_config(state: State) -> dict[str, Any]:
    context = below(state, CONTEXT_BACKBONE)
    if not (is_hf_dinov3(context) or "reg_token" in context or "storage_tokens" in context):
        raise KeyError(CONTEXT_BACKBONE + "embeddings.register_tokens")
    found: dict[str, Any] = {
        "context": {"name": "dinov3_vitl16", "args": vit_args(context), "pool": "cls"},
        "share_backbone": not _has(state, GLOBAL_BACKBONE),
        "proj_width": state["modelB.proj_uni.1.weight"].shape[0],
        "local_aware_gate": _has(state, "modelB.gate_mlp."),
        "gate": _has(state, "gate_mlp."),
    }
    if found["gate"]:
        hidden = state["gate_mlp.0.weight"].shape[0], state["gate_mlp.3.weight"].shape[0]
        found |= {"gate_width": state["gate_proj_A.1.weight"].shape[0], "gate_hidden": hidden}
    return found
