"""Checkpoints of MUSE: which names are the backbone's, what the tensors tell of its sizes, and what a load changes.

A published file is {"teacher": state} with the backbone below `module.backbone.` and DINO's heads beside it. Detectors
and pretraining write the same backbone below `backbone.`, or alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cellslide.errors import WeightsError
from cellslide.models.muse import MuseBackbone, resample_positions

State = Mapping[str, Tensor]

# Tried in turn: the first below which there is a backbone is taken, and what stands beside it is left out.
PREFIXES = ("module.backbone.", "backbone.", "module.", "")
# Tensors that every MUSE backbone has, and those of what else is known to stand in such files.
MARK = "decoder.hyper_feats.conv_list.0.layer.0.weight"
POSITIONS = "encoder.encoder.pos_embed"
BACKBONES = ("muse", "muse_vit_s", "muse_vit_b", "muse_r50")
HEADS = re.compile(r"^(?:head|dino_head|nulo_head|mask_head|linear|fc|classifier)\.")
# Residual networks of timm by their blocks a stage; those with bottlenecks have a third convolution.
RESNETS = {
    (False, (1, 1, 1, 1)): "resnet10t", (False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34",
    (True, (2, 2, 2, 2)): "resnet26", (True, (3, 4, 6, 3)): "resnet50", (True, (3, 4, 23, 3)): "resnet101",
}  # fmt: skip
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
    named = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in named.items() if prefix or not HEADS.match(name)}


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
    from cellslide.models.checkpoint import read_tensors

    state, content = read_tensors(path)
    return with_positions(backbone_state(state, str(path)), img_size, published="teacher" in content)


def fill_backbone(backbone: nn.Module, path: Path) -> None:
    """Put the backbone of a file into `backbone`, a `MuseBackbone`, strictly; its mode (train or eval) stays.

    Raises WeightsError that lists every missing, unexpected and misshapen tensor.
    """
    from cellslide.models.checkpoint import check_fit

    if not isinstance(backbone, MuseBackbone):
        raise TypeError(f"{type(backbone).__name__} is no MuseBackbone")
    config = backbone.config
    state = read_backbone(path, config.img_size if config.is_vit else None)
    check_fit(backbone.state_dict(), state, f"{path} does not fit the MUSE backbone")
    backbone.load_state_dict(state)


def config_of(state: State, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that a backbone's tensors (own names) tell, as `MuseConfig.of` reads them.

    told  the file's flat config: names the encoder of a network that its tensors do not tell, and for a ViT the number
    of heads and the blocks that feed the decoder; else heads are of 64 channels, and the four blocks end equal runs.
    Raises KeyError for the tensor or the key that is missing.
    """
    joined = [int(state[f"decoder.decoder{i}.first_block.layer.0.weight"].shape[1]) for i in (1, 2, 3)]
    w1, w2, w3 = (int(state[f"decoder.decoder{i}.first_block.layer.0.weight"].shape[0]) for i in (1, 2, 3))
    widths = [w1, w2, w3, joined[2] - w3]
    if POSITIONS not in state:
        return {"encoder": told.get("encoder") or _resnet(state), "widths": widths}
    vit = _vit(state, told)
    d = vit["embed_dim"]
    return {"encoder": vit} if widths == [d // 4, d // 2, d, 2 * d] else {"encoder": vit, "widths": widths}


def guess_arch(state: State) -> str | None:
    """Return the architecture of a MUSE, of a detector made of one, of a DPA-P2PNet; None for tensors of others."""
    if "backbone.neck1.fpn_convs.0.conv.weight" in state:
        return "dpa_p2pnet"
    if prefix_of(state) is None:
        return None
    return "muse_points" if "head.deform_layer.layers.0.weight" in state else "muse"


def _vit(state: State, told: Mapping[str, Any]) -> dict[str, Any]:
    dim, _, patch, _ = (int(n) for n in state["encoder.encoder.patch_embed.proj.weight"].shape)
    depth = _count(state, r"encoder\.encoder\.blocks\.(\d+)\.")
    return {
        "name": "vit",
        "embed_dim": dim,
        "depth": depth,
        "heads": told.get("heads") or told.get("encoder.heads") or max(dim // 64, 1),
        "patch": patch,
        "img_size": math.isqrt(state[POSITIONS].shape[1] - 1) * patch,
        "extract_layers": told.get("extract_layers")
        or told.get("encoder.extract_layers")
        or [depth * i // 4 - 1 for i in range(1, 5)],
    }


def _resnet(state: State) -> str:
    stages = tuple(_count(state, rf"encoder\.encoder\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    name = RESNETS.get(("encoder.encoder.layer1.0.conv3.weight" in state, stages))
    if name is None:
        raise KeyError("config key encoder")
    return name


def _count(state: State, pattern: str) -> int:
    return len({m[1] for name in state if (m := re.match(pattern, name))})


def detector_config_of(state: State, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a `MusePoints` that its tensors and the file's flat config tell, as its config's `of` reads.

    The distance of the proposals is in no tensor: `head.space_px` of `told`, else 8. Raises KeyError as `config_of`.
    """
    backbone = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    head = {
        "n_classes": int(state["head.cls_head.layers.3.bias"].shape[0]) - 1,
        "hidden": int(state["head.conv.bias"].shape[0]),
        "space_px": int(told.get("head.space_px", 8)),
        "aux_mask": "head.mask_head.0.weight" in state,
        "embedding": bool(told.get("head.embedding", False)),
        "keep": told.get("head.keep", "argmax"),
    }
    return {**config_of(backbone, told), "head": head}


def dpa_config_of(state: State, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a DPA-P2PNet; ConvNeXts of timm are known by their blocks and channels.

    Raises KeyError as `config_of`.
    """
    stages = [_count(state, rf"backbone\.backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in range(4)]
    width = int(state["backbone.neck.lateral_convs.0.conv.weight"].shape[1])
    encoder = told.get("encoder") or CONVNEXTS.get((width, *stages))
    if encoder is None:
        raise KeyError("config key encoder")
    return {
        "encoder": encoder,
        "n_classes": int(state["cls_head.layers.3.bias"].shape[0]) - 1,
        "hidden": int(state["conv.bias"].shape[0]),
        "space_px": int(told.get("space_px", 8)),
        "n_levels": _count(state, r"backbone\.neck\.fpn_convs\.(\d+)\."),
    }


# How the sizes of each architecture are read from a checkpoint's tensors and flat config.
SIZES: dict[str, Callable[[State, Mapping[str, Any]], dict[str, Any]]] = {
    **dict.fromkeys(BACKBONES, config_of),
    "muse_points": detector_config_of,
    "dpa_p2pnet": dpa_config_of,
}
