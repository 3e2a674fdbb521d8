"""Published CellDETR checkpoints, as data: which names are whose, and the sizes that the tensors give.

Two works share the layout of Deformable DETR. The first (MIDL 2024) holds the detector alone, with a Swin under its
original names; the second holds it below `detr.`, and the representation decoder beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cellslide.errors import WeightsError
from cellslide.models.state_dict import below, count, resnet_of

State = Mapping[str, Tensor]

BODY = "detr.backbone.0.body."
DECODER = "decouple_decoder."
# The decoder holds the heads a second time, for its own use; a Swin's index of positions is a constant.
LEFT_OUT = re.compile(
    r"^(?:detr\.)?(?:transformer\.decoder\.(?:bbox_embed|class_embed)\.|backbone\.0\.body\..*relative_position_index$)"
)
# The original Swin merges patches at the end of a stage, timm at the beginning of the next.
SWIN_MERGE = re.compile(rf"^{re.escape(BODY)}layers\.(\d+)\.downsample\.")
SWIN_RENAMES = (
    (re.compile(rf"^{re.escape(BODY)}layers\.(\d+)\."), BODY + r"layers_\1."),
    (re.compile(rf"^{re.escape(BODY)}norm(\d+)\."), r"detr.backbone.0.norms.\1."),
)
DETECTOR = re.compile(r"^(?:transformer|class_embed|bbox_embed|query_embed|input_proj|backbone)\b")
MARK = "transformer.encoder.layers.0.self_attn.sampling_offsets.weight"

# Swins of timm by channels, blocks of the third stage, and window.
SWINS = {
    (96, 6, 7): "swin_tiny_patch4_window7_224",
    (96, 18, 7): "swin_small_patch4_window7_224",
    (128, 18, 7): "swin_base_patch4_window7_224",
    (128, 18, 12): "swin_base_patch4_window12_384",
    (192, 18, 7): "swin_large_patch4_window7_224",
    (192, 18, 12): "swin_large_patch4_window12_384",
}
POINTS = 4
# What is in no tensor of the first work: the proposals, by the layers of the decoder; the share that may be kept.
PROPOSALS = {3: 600, 6: 900}
QUERY_FRACTION = 1 / 3
TRAINING_PX = 256


def is_celldetr(state: State) -> bool:
    """Return whether these tensors are a CellDETR's, of either work or written here."""
    return MARK in state or f"detr.{MARK}" in state


def canonical_state(state: State, content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Return the tensors of a file under the names of `CellDETR`."""
    return own_names(state)


def own_names(state: State) -> dict[str, Tensor]:
    """Return the tensors under the names of `CellDETR`; aliases and constants are left out."""
    return {_own(name): tensor for name, tensor in state.items() if not LEFT_OUT.match(name)}


def _own(name: str) -> str:
    name = f"detr.{name}" if DETECTOR.match(name) else name
    name = SWIN_MERGE.sub(lambda m: f"{BODY}layers_{int(m[1]) + 1}.downsample.", name)
    for pattern, new in SWIN_RENAMES:
        name = pattern.sub(new, name)
    return name


def config_of(state: State, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the builder's configuration of a checkpoint's tensors (own names).

    given  the file's flat config; it may name the number of proposals, which is published otherwise.
    Attention has 4 points a level, as published. Raises KeyError for the tensor that is missing, WeightsError for a
    backbone that is of no published size.
    """
    net = "detr.transformer."
    levels, dim = map(int, state[f"{net}level_embed"].shape)
    weights = state[f"{net}encoder.layers.0.self_attn.attention_weights.weight"]
    two_stage = f"{net}enc_output.weight" in state
    dec_layers = count(state, rf"{net}decoder\.layers\.(\d+)\.")
    return {
        **_backbone_of(state),
        "hidden_dim": dim,
        "n_levels": levels,
        "n_points": POINTS,
        "n_heads": len(weights) // (levels * POINTS),
        "enc_layers": count(state, rf"{net}encoder\.layers\.(\d+)\."),
        "dec_layers": dec_layers,
        "ffn_dim": len(state[f"{net}encoder.layers.0.linear1.weight"]),
        "two_stage": two_stage,
        "num_queries": _queries(given, dec_layers) if two_stage else len(state["detr.query_embed.weight"]),
        "window_px": TRAINING_PX,
        **_heads_of(state),
    }


def _heads_of(state: State) -> dict[str, Any]:
    """Return what types the nuclei: the representation decoder, else the detection head, whose labels begin at 1."""
    det_classes = len(state["detr.class_embed.0.weight"])
    if not any(name.startswith(DECODER) for name in state):
        typed = det_classes > 1
        return {
            "det_classes": det_classes,
            "first_class": int(typed),
            "repr_layers": 0,
            "num_classes": 0,
            "query_fraction": QUERY_FRACTION if typed else 1.0,
        }
    types = state.get("decouple_class_embed.weight")
    return {
        "det_classes": det_classes,
        "repr_layers": 1 + count(state, rf"{DECODER}layers\.(\d+)\."),
        "num_classes": 0 if types is None else len(types),
        "projection": "contrastive_project.0.weight" in state,
        # The published code trains no other.
        "mode": "parallel",
    }


def _backbone_of(state: State) -> dict[str, Any]:
    body = below(state, BODY)
    inputs = [int(w.shape[1]) for name, w in _sorted_inputs(state) if w.shape[-1] == 1]
    if "patch_embed.proj.weight" in body:
        dim = len(body["patch_embed.proj.weight"])
        table = body["layers_0.blocks.0.attn.relative_position_bias_table"]
        window = (round(len(table) ** 0.5) + 1) // 2
        key = (dim, count(body, r"layers_2\.blocks\.(\d+)\."), window)
        named = SWINS.get(key)
        norm = {"norm": "own", "feature_norm": any(n.startswith("detr.backbone.0.norms.") for n in state)}
    else:
        dim = len(body["conv1.weight"]) * (4 if "layer1.0.conv3.weight" in body else 1)
        named = resnet_of(body)
        norm = {"norm": "own" if "bn1.num_batches_tracked" in body else "frozen"}
    if named is None:
        raise WeightsError(
            "its backbone is no ResNet or Swin of a published size; describe it in a model.yaml beside it"
        )
    return {"backbone": named, "strides": tuple(4 * c // dim for c in inputs), **norm}


def _sorted_inputs(state: State) -> list[tuple[str, Tensor]]:
    found = {int(m[1]): name for name in state if (m := re.match(r"detr\.input_proj\.(\d+)\.0\.weight$", name))}
    return [(found[i], state[found[i]]) for i in sorted(found)]


def _queries(given: Mapping[str, Any], dec_layers: int) -> int:
    named = given.get("model.num_queries")
    return named if isinstance(named, int) else PROPOSALS.get(dec_layers, max(PROPOSALS.values()))
