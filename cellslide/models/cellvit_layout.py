"""Published CellViT and CellVTA checkpoints: which of them a file is, and the sizes that its tensors give.

Head counts and the blocks that feed the decoder are in no shape: published ones are known; else `model.num_heads` and
`model.extract_layers` of the file's config count, then heads of 64 channels and four equal runs of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cellslide.errors import WeightsError
from cellslide.models.cellvit import PUBLISHED
from cellslide.models.state_dict import count

State = Mapping[str, Tensor]
BLOCKS = r"encoder\.blocks\.(\d+)\."
FC1, PATCHES = "encoder.blocks.0.mlp.fc1.weight", "encoder.patch_embed.proj.weight"


def is_cellvta(state: State) -> bool:
    """Return whether these tensors are a CellVTA's, with the published stem."""
    return "encoder.spm.stem.0.weight" in state


def is_cellvit(arch: str, state: State) -> bool:
    """Return whether these tensors are those of the CellViT called `arch`."""
    return _variant(state) == arch


def _variant(state: State) -> str | None:
    if "encoder.neck.0.weight" in state:
        width = state["encoder.pos_embed"].shape[-1] if "encoder.pos_embed" in state else 0
        sizes = {PUBLISHED[name].embed_dim: name for name in PUBLISHED if name.startswith("cellvit_sam")}
        return sizes.get(width, "cellvit_sam_h")
    if "encoder.reg_token" in state:
        return "cellvit_virchow2"
    if "encoder.blocks.0.ls1.gamma" in state:
        packed = len(state[FC1]) == 2 * state["encoder.blocks.0.mlp.fc2.weight"].shape[1]
        return "cellvit_virchow" if packed else "cellvit_uni"
    return "cellvit_256" if "encoder.pos_embed" in state else None


def cellvta_config(state: State, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a CellVTA; raises KeyError for the tensor that is missing."""
    dim, depth = len(state[PATCHES]), count(state, BLOCKS)
    run, layer = depth // 4, "encoder.interactions.0"
    table = {} if "encoder.pos_embed" in state else {"use_pos_embed": False}
    # Three levels of four points each in the injectors, as published; the rest of the rows are heads.
    heads = len(state[f"{layer}.injector.attn.attention_weights.weight"]) // 12
    return _common("cellvit_uni", state, config) | table | {
        "mlp_ratio": len(state[FC1]) / dim,
        "interaction_indexes": tuple((i * run, depth - 1 if i == 3 else (i + 1) * run - 1) for i in range(4)),
        "conv_inplane": len(state["encoder.spm.stem.0.weight"]),
        "deform_num_heads": heads,
        "deform_ratio": len(state[f"{layer}.injector.attn.value_proj.weight"]) / dim,
        "cffn_ratio": len(state[f"{layer}.extractor.ffn.fc1.weight"]) / dim,
        "n_extra_extractors": count(state, r"encoder\.interactions\.3\.extra_extractors\.(\d+)\."),
    }  # fmt: skip


def cellvit_config(arch: str, state: State, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of the CellViT called `arch`; raises KeyError for the tensor that is missing."""
    depth = count(state, BLOCKS)
    if "encoder.pos_embed" not in state:
        raise KeyError("encoder.pos_embed")
    found = _common(arch, state, config) | {
        "mlp_hidden": len(state[FC1 if FC1 in state else "encoder.blocks.0.mlp.lin1.weight"]),
        "extract_layers": _extract_layers(arch, config, depth),
        "regression_loss": len(state["nuclei_binary_map_decoder.decoder0_header.2.weight"]) == 4,
        "skip_widths": (state["decoder1.0.block.0.weight"].shape[1], state["decoder1.1.block.0.weight"].shape[1]),
    }
    if "encoder.reg_token" in state:
        found["n_registers"] = state["encoder.reg_token"].shape[1]
    if "encoder.neck.0.weight" in state:
        found |= {"neck_dim": len(state["encoder.neck.0.weight"]), **_windows(state, depth)}
    return found


def _common(arch: str, state: State, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of decoder and ViT; `arch` is the CellViT whose ViT it is."""
    tissue = "classifier_head" if "classifier_head.weight" in state else "encoder.head"
    branch, types = "hv_map_decoder", "nuclei_type_maps_decoder.decoder0_header.2.weight"
    last = state[f"{branch}.decoder3_upsampler.3.weight"]
    widths = (
        len(state.get(f"{branch}.decoder0_header.0.block.0.weight", ())),
        state[f"{branch}.decoder2_upsampler.2.weight"].shape[1],
        last.shape[1],
        last.shape[0],
    )
    dim, patch, depth = len(state[PATCHES]), state[PATCHES].shape[-1], count(state, BLOCKS)
    found = {
        "num_nuclei_classes": len(state.get(types, ())),
        "num_tissue_classes": len(state.get(f"{tissue}.weight", ())),
        "decoder_widths": tuple(map(int, widths)),
        "embed_dim": dim,
        "depth": depth,
        "num_heads": _heads(arch, state, config, dim, depth),
        "patch_size": patch,
    }
    table = state.get("encoder.pos_embed")
    if table is not None:
        prefix = 1 + (state["encoder.reg_token"].shape[1] if "encoder.reg_token" in state else 0)
        side = table.shape[1] if table.ndim == 4 else math.isqrt(table.shape[1] - prefix)
        found["img_size"] = side * patch
    return found


def _heads(arch: str, state: State, config: Mapping[str, Any], dim: int, depth: int) -> int:
    table = state.get("encoder.blocks.0.attn.rel_pos_h")
    if table is not None:
        return dim // int(table.shape[1])
    published = PUBLISHED[arch]
    if (published.embed_dim, published.depth) == (dim, depth):
        return published.num_heads
    named = config.get("model.num_heads")
    if isinstance(named, int) and named > 0 and dim % named == 0:
        return named
    return max(dim // 64, 1)


def _extract_layers(arch: str, config: Mapping[str, Any], depth: int) -> tuple[int, ...]:
    published = PUBLISHED[arch]
    if depth == published.depth:
        return published.extract_layers
    named = config.get("model.extract_layers")
    if isinstance(named, (list, tuple)) and len(named) == 4:
        return tuple(int(i) for i in named)
    return tuple(depth * i // 4 for i in range(1, 5))


def _windows(state: State, depth: int) -> dict[str, Any]:
    """Return SAM's window and its global blocks: those whose table spans the whole position grid."""
    whole = 2 * state["encoder.pos_embed"].shape[1] - 1
    lengths = [len(state[f"encoder.blocks.{i}.attn.rel_pos_h"]) for i in range(depth)]
    local = {length for length in lengths if length != whole}
    if len(local) > 1:
        raise WeightsError(f"relative positions of {len(local)} window sizes: not a SAM encoder")
    return {
        "global_attn_indexes": tuple(i for i, length in enumerate(lengths) if length == whole),
        "window_size": (local.pop() + 1) // 2 if local else 14,
    }
