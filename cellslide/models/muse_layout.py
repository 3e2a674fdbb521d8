"""Checkpoints of MUSE: which names are the backbone's, the sizes that the tensors give, and what a load changes.

A published file is {"teacher": state} with the backbone below `module.backbone.` and DINO's heads beside it. Detectors
and pretraining write the same backbone below `backbone.`, or alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cellslide.errors import WeightsError
from cellslide.models.checkpoint import check_fit, read_tensors
from cellslide.models.muse import MuseBackbone, resample_positions
from cellslide.models.state_dict import below, count, resnet_of

State = Mapping[str, Tensor]

# Tried in turn: the first below which there is a backbone is taken, and what stands beside it is left out.
PREFIXES = ("module.backbone.", "backbone.", "module.", "")
# Tensors that every MUSE backbone has, and those of what else is known to stand in such files.
MARK = "decoder.hyper_feats.conv_list.0.layer.0.weight"
POSITIONS = "encoder.encoder.pos_embed"
HEADS = re.compile(r"^(?:head|dino_head|nulo_head|mask_head|linear|fc|classifier)\.")
# ConvNeXts of timm by the channels of their first stage and their blocks a stage.
CONVNEXTS = {
    (40, 2, 2, 6, 2): "convnext_atto", (48, 2, 2, 6, 2): "convnext_femto", (64, 2, 2, 6, 2): "convnext_pico",
    (80, 2, 2, 8, 2): "convnext_nano", (96, 3, 3, 9, 3): "convnext_tiny", (96, 3, 3, 27, 3): "convnext_small",
    (128, 3, 3, 27, 3): "convnext_base",
}  # fmt: skip


def prefix_of(state: State) -> str | None:
    """Return what stands before the backbone's names, or None where the tensors hold no MUSE backbone."""
    return next((prefix for prefix in PREFIXES if prefix + MARK in state), None)


def backbone_state(state: State, where: str) -> dict[str, Tensor]:
    """Return a backbone's tensors under its own names, from a file's state dict; heads beside it are left out.

    Raises WeightsError, beginning with `where`, when the tensors hold no MUSE backbone.
    """
    prefix = prefix_of(state)
    if prefix is None:
        raise WeightsError(f"{where}: no MUSE backbone in it; a published one has names below module.backbone.")
    return {n: t for n, t in below(state, prefix).items() if prefix or not HEADS.match(n)}


def canonical_state(state: State, content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Return the backbone in all that a file holds; a published one gets new positions, as in every load of its code.

    Raises WeightsError when the tensors hold no MUSE backbone.
    """
    return with_positions(backbone_state(state, where), None, published="teacher" in content)


def with_positions(state: State, img_size: int | None, published: bool) -> dict[str, Tensor]:
    """Return a ViT's tensors with the position embedding for `img_size` pixels; None: what it stands for already.

    A `published` file is resampled whatever its size, since every load by the published code does so and its features
    are those of the resampled values. Others only where the size differs. A network without positions is left alone.
    """
    table = state.get(POSITIONS)
    if table is None:
        return dict(state)
    patch = int(state["encoder.encoder.patch_embed.proj.weight"].shape[-1])
    side = math.isqrt(table.shape[1] - 1) if img_size is None else img_size // patch
    if not published and 1 + side**2 == table.shape[1]:
        return dict(state)
    return {**state, POSITIONS: resample_positions(table.float(), (side, side))}


def read_backbone(path: Path, img_size: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of the backbone in a file: published, pretrained here, or a detector's.

    Raises WeightsError when the file is not readable or holds none.
    """
    state, content = read_tensors(path)
    return with_positions(backbone_state(state, str(path)), img_size, published="teacher" in content)


def fill_backbone(backbone: nn.Module, path: Path) -> None:
    """Put the backbone of a file into `backbone`, a `MuseBackbone`, strictly; its mode (train or eval) stays.

    Raises WeightsError that lists every missing, unexpected and misshapen tensor.
    """
    if not isinstance(backbone, MuseBackbone):
        raise TypeError(f"{type(backbone).__name__} is no MuseBackbone")
    config = backbone.config
    state = read_backbone(path, config.img_size if config.is_vit else None)
    check_fit(backbone.state_dict(), state, f"{path} does not fit the MUSE backbone")
    backbone.load_state_dict(state)


def config_of(state: State, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a backbone by its tensors (own names), as `MuseConfig.of` reads them.

    given  the file's flat config: names the encoder of a network that its tensors do not name, and for a ViT the number
    of heads and the blocks that feed the decoder; else heads are of 64 channels, and the four blocks end equal runs.
    Raises KeyError for the tensor or the key that is missing.
    """
    joined = [int(state[f"decoder.decoder{i}.first_block.layer.0.weight"].shape[1]) for i in (1, 2, 3)]
    w1, w2, w3 = (int(state[f"decoder.decoder{i}.first_block.layer.0.weight"].shape[0]) for i in (1, 2, 3))
    widths = [w1, w2, w3, joined[2] - w3]
    if POSITIONS not in state:
        encoder = given.get("encoder") or resnet_of(below(state, "encoder.encoder."), least_stages=4)
        if encoder is None:
            raise KeyError("config key encoder")
        return {"encoder": encoder, "widths": widths}
    vit = _vit(state, given)
    d = vit["embed_dim"]
    return {"encoder": vit} if widths == [d // 4, d // 2, d, 2 * d] else {"encoder": vit, "widths": widths}


def is_dpa_p2pnet(state: State) -> bool:
    """Return whether these tensors are a DPA-P2PNet's."""
    return "backbone.neck1.fpn_convs.0.conv.weight" in state


def is_detector(state: State) -> bool:
    """Return whether these tensors are those of a point detector made of a MUSE."""
    return prefix_of(state) is not None and "head.deform_layer.layers.0.weight" in state


def is_backbone(state: State) -> bool:
    """Return whether these tensors hold a MUSE, and no detector of ours."""
    return prefix_of(state) is not None and not is_detector(state) and not is_dpa_p2pnet(state)


def _vit(state: State, given: Mapping[str, Any]) -> dict[str, Any]:
    dim, _, patch, _ = (int(n) for n in state["encoder.encoder.patch_embed.proj.weight"].shape)
    depth = count(state, r"encoder\.encoder\.blocks\.(\d+)\.")
    return {
        "name": "vit",
        "embed_dim": dim,
        "depth": depth,
        "heads": given.get("heads") or given.get("encoder.heads") or max(dim // 64, 1),
        "patch": patch,
        "img_size": math.isqrt(state[POSITIONS].shape[1] - 1) * patch,
        "extract_layers": given.get("extract_layers")
        or given.get("encoder.extract_layers")
        or [depth * i // 4 - 1 for i in range(1, 5)],
    }


def detector_config_of(state: State, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a `MusePoints` by its tensors and the file's flat config, as its config's `of` reads.

    The distance of the proposals is in no tensor: `head.space_px` of `given`, else 8. Raises KeyError as `config_of`.
    """
    head = {
        "n_classes": int(state["head.cls_head.layers.3.bias"].shape[0]) - 1,
        "hidden": int(state["head.conv.bias"].shape[0]),
        "space_px": int(given.get("head.space_px", 8)),
        "aux_mask": "head.mask_head.0.weight" in state,
        "embedding": bool(given.get("head.embedding", False)),
        "keep": given.get("head.keep", "argmax"),
    }
    return {**config_of(below(state, "backbone."), given), "head": head}


def dpa_config_of(state: State, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a DPA-P2PNet; ConvNeXts of timm are known by their blocks and channels.

    Raises KeyError as `config_of`.
    """
    stages = [count(state, rf"backbone\.backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in range(4)]
    width = int(state["backbone.neck.lateral_convs.0.conv.weight"].shape[1])
    encoder = given.get("encoder") or CONVNEXTS.get((width, *stages))
    if encoder is None:
        raise KeyError("config key encoder")
    return {
        "encoder": encoder,
        "n_classes": int(state["cls_head.layers.3.bias"].shape[0]) - 1,
        "hidden": int(state["conv.bias"].shape[0]),
        "space_px": int(given.get("space_px", 8)),
        "n_levels": count(state, r"backbone\.neck\.fpn_convs\.(\d+)\."),
    }
