"""Backbones through timm: built by name and never from the network, read as one vector, filled from published files.

A backbone is timm's own module, so that its parameters keep timm's names; what is added here are functions on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cellslide.errors import MissingDependencyError, short
from cellslide.models.state_dict import rename
from cellslide.models.torchvision_ops import declare_torchvision_operators

declare_torchvision_operators()

try:
    import timm
    import timm.layers
except ModuleNotFoundError as error:
    raise MissingDependencyError(f"timm cannot be imported: {error}; reinstall cellslide") from error

State = Mapping[str, Tensor]
Pool = Literal["cls", "mean", "avg"]

# What timm is told, so that tokens are normalised before they are pooled wherever we pool ourselves.
_TIMM_POOL = {"cls": "token", "mean": "token", "avg": "avg"}
# Layers that a configuration may name, since a YAML file holds no classes.
_MLP_LAYERS = {"mlp": "Mlp", "swiglu": "SwiGLU", "swiglu_packed": "SwiGLUPacked", "glu": "GluMlp"}


@dataclass(frozen=True, slots=True)
class BackboneConfig:
    """A backbone by name (a preset of ours or any of timm's), changes to its arguments, and how it becomes one vector.

    pool  "cls" the class token, "mean" the mean of the patch tokens without registers, both after the last norm;
          "avg" what the network's own head averages, for any architecture; None: what the preset does, else "avg".
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    pool: Pool | None = None

    def __post_init__(self) -> None:
        if self.pool is not None and self.pool not in get_args(Pool):
            raise ValueError(f"pool {short(self.pool)}: must be one of {', '.join(get_args(Pool))}")

    @property
    def resolved_pool(self) -> Pool:
        """How features are pooled."""
        preset = PRESETS.get(self.name)
        return self.pool or (preset.pool if preset else "avg")


@dataclass(frozen=True, slots=True)
class Preset:
    """A published backbone: timm's name, arguments, pooling; `mask_token`: holds one, of use in pretraining only."""

    timm_name: str
    args: Mapping[str, Any]
    pool: Pool
    mask_token: bool = False


PRESETS = {
    "uni2_h": Preset(
        "vit_giant_patch14_224",
        {
            "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "mlp_layer": "swiglu_packed", "act_layer": "silu",
            "reg_tokens": 8, "dynamic_img_size": True,
        },
        "cls",
    ),
    # With biases of q and v, and with the mask token, all tensors of the published file have a place.
    "dinov3_vitl16": Preset("vit_large_patch16_dinov3_qkvb", {}, "cls", mask_token=True),
}  # fmt: skip


def create_backbone(name: str, args: Mapping[str, Any] | None = None, pool: Pool | None = None) -> nn.Module:
    """Build a backbone without its classifier, weights untrained; `name` is a preset or an architecture of timm.

    Raises ValueError for a name that timm does not have, TypeError for arguments that the architecture does not take.
    """
    config = BackboneConfig(name, args or {}, pool)
    preset = PRESETS.get(name, Preset(name, {}, "avg"))
    if not timm.is_model(preset.timm_name):
        near = get_close_matches(name, [*PRESETS, *timm.list_models()], n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"backbone {short(name)}: neither {', '.join(PRESETS)} nor an architecture of timm{hint}")
    wanted = {"global_pool": _TIMM_POOL[config.resolved_pool], **preset.args, **config.args}
    if isinstance(wanted.get("mlp_layer"), str):
        wanted["mlp_layer"] = _mlp_layer(wanted["mlp_layer"])
    try:
        backbone: nn.Module = timm.create_model(preset.timm_name, pretrained=False, num_classes=0, **wanted)
    except AssertionError as error:
        # timm checks its arguments by asserting.
        raise ValueError(f"backbone {name} with pool {config.resolved_pool}: {error}") from error
    if preset.mask_token:
        backbone.mask_token = nn.Parameter(torch.zeros(1, 1, width_of(backbone)))
    if config.resolved_pool != "avg" and prefix_tokens(backbone) == 0:
        raise ValueError(f"backbone {name}: has no class token, so pool must be avg, not {config.resolved_pool}")
    return backbone


def _mlp_layer(name: str) -> type[nn.Module]:
    if name not in _MLP_LAYERS:
        raise ValueError(f"mlp_layer {short(name)}: must be one of {', '.join(_MLP_LAYERS)}")
    layer: type[nn.Module] = getattr(timm.layers, _MLP_LAYERS[name])
    return layer


def width_of(backbone: nn.Module) -> int:
    """Return D, the length of the vector that a backbone gives."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)


def prefix_tokens(backbone: nn.Module) -> int:
    """Return how many class and register tokens stand before the patches; 0 for a convolutional network."""
    return int(getattr(backbone, "num_prefix_tokens", 0))


def patch_px(backbone: nn.Module) -> int:
    """Return the edge of a patch in input pixels; 1 for a network that takes any size."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    return int(size if isinstance(size, int) else size[0])


def features(backbone: nn.Module, x: Tensor, pool: Pool) -> Tensor:
    """Return one vector (B, D) for each image of `x` float (B, 3, H, W), normalised."""
    out = backbone.forward_features(x)
    if pool == "cls":
        return out[:, 0]
    if pool == "mean":
        return out[:, prefix_tokens(backbone) :].mean(dim=1)
    return backbone.forward_head(out, pre_logits=True)


def tokens(backbone: nn.Module, x: Tensor) -> Tensor:
    """Return what stands at each place of the images: (B, N, D), patches row by row, class and registers left out."""
    out = backbone.forward_features(x)
    if out.ndim == 3:
        return out[:, prefix_tokens(backbone) :]
    channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
    return out.flatten(1, 2) if channels_last else out.flatten(2).transpose(1, 2)


def depths(backbone: nn.Module) -> dict[str, int]:
    """Return for each parameter's name how many blocks stand between it and the head: 0 is next to the head.

    timm's own grouping, for convolutional networks too (their blocks inside the stages).
    """
    from timm.models import group_parameters

    layer = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    # The mask token is in no group of timm's, which gives it one of its own after the last.
    last = max(place for name, place in layer.items() if name != "mask_token")
    return {name: max(int(last - layer[name]), 0) for name, _ in backbone.named_parameters()}


def build_empty(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a module without memory for its weights, which are about to be replaced; drawing them takes long.

    Where a module cannot restore the constants that are in no state dict, it is built as usual.
    """
    with torch.device("meta"):
        module = make()
    return module if restore_constants(module) else make()


def restore_constants(module: nn.Module) -> bool:
    """Compute what is in no state dict and lost its values on the meta device; False where a part cannot."""
    for part in module.modules():
        lost = [name for name in part._non_persistent_buffers_set if _is_meta(part._buffers.get(name))]
        if not lost:
            continue
        restore = getattr(part, "init_non_persistent_buffers", None)
        if restore is None:
            return False
        for name in lost:
            part._buffers[name] = torch.empty_like(part._buffers[name], device="cpu")
        restore()
    return True


def _is_meta(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


# Names of DINOv3's tensors in transformers ("layer.N", since version 5 "model.layer.N") and in Meta's own files, and
# timm's for them. The rope's periods and the bias mask are constants.
_LAYER = r"^(?:model\.)?layer\.(\d+)\."
HF_DINOV3 = (
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (_LAYER + r"attention\.([qkv])_proj\.weight$", r"blocks.\1.attn.\2_weight"),
    (_LAYER + r"attention\.([qkv])_proj\.bias$", r"blocks.\1.attn.\2_bias"),
    (_LAYER + r"attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (_LAYER + r"layer_scale([12])\.lambda1$", r"blocks.\1.gamma_\2"),
    (_LAYER + r"mlp\.up_proj\.", r"blocks.\1.mlp.fc1."),
    (_LAYER + r"mlp\.down_proj\.", r"blocks.\1.mlp.fc2."),
    (_LAYER + r"(norm[12]\.)", r"blocks.\1.\2"),
    (r"^model\.(norm\.)", r"\1"),
)
META_DINOV3 = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
)
_META_CONSTANTS = re.compile(r"(^rope_embed\.|\.bias_mask$)")
_DINOV3_ABSENT_IS_ZERO = re.compile(r"(^mask_token$|\.attn\.[qv]_bias$)")


def is_hf_dinov3(state: State) -> bool:
    """Tell whether names are those of transformers' DINOv3."""
    return "embeddings.register_tokens" in state


# Names inside a block of an EfficientNet in the files of efficientnet-pytorch, and timm's for them: a block without
# expansion has two batch norms, one with it three.
_PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDED_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
_AROUND_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LAST_LAYERS = ("conv_head.", "bn2.", "classifier.")


def is_efficientnet(state: State) -> bool:
    """Tell whether names are those of efficientnet-pytorch, in which EfficientNet-Lite is published."""
    return "_conv_stem.weight" in state


def holds_network(state: State, network: nn.Module) -> bool:
    """Tell whether a file holds a convolutional network of timm by itself, under timm's names or the published ones."""
    return is_efficientnet(state) or next(iter(network.state_dict())) in state


def efficientnet_to_timm(state: State, backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an EfficientNet-Lite under timm's names.

    Its blocks are counted through, timm's within stages; stages and last layers that `backbone` was built without are
    left out. Raises KeyError for a name that no EfficientNet-Lite has.
    """
    expanded = {name.split(".")[1] for name in state if "._expand_conv." in name}
    stages = _stages(state)
    own = {name.split(".")[1] for name in backbone.state_dict() if name.startswith("blocks.")}
    found = {}
    for name, tensor in state.items():
        if name.startswith("_blocks."):
            _, block, part, leaf = name.split(".")
            names = _EXPANDED_BLOCK if block in expanded else _PLAIN_BLOCK
            stage, place = stages[int(block)]
            if str(stage) in own:
                found[f"blocks.{stage}.{place}.{names[part]}.{leaf}"] = tensor
        else:
            part, leaf = name.split(".")
            found[f"{_AROUND_BLOCKS[part]}.{leaf}"] = tensor
    kept = set(backbone.state_dict())
    return {name: t for name, t in found.items() if name in kept or not name.startswith(_LAST_LAYERS)}


def _stages(state: State) -> list[tuple[int, int]]:
    """Return (stage, place in it) of each block: a stage begins where the number of channels that comes out changes."""
    n = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("_blocks."))
    widths = [int(state[f"_blocks.{i}._project_conv.weight"].shape[0]) for i in range(n)]
    places: list[tuple[int, int]] = []
    for i, width in enumerate(widths):
        stage, place = places[-1] if places else (-1, 0)
        places.append((stage, place + 1) if i and width == widths[i - 1] else (stage + 1, 0))
    return places


def to_timm(state: State, backbone: nn.Module) -> dict[str, Tensor]:
    """Return a backbone's tensors under timm's names: DINOv3 of transformers or Meta, EfficientNet-Lite, else as they
    are.

    Biases and a mask token that a DINOv3 file leaves out are zero; where `backbone` has no place for them, zero biases
    and the mask token are left out, as is the classifier of a timm file.
    """
    if is_efficientnet(state):
        return efficientnet_to_timm(state, backbone)
    if is_hf_dinov3(state):
        found = _join_qkv(rename(state, HF_DINOV3))
    elif "storage_tokens" in state:
        kept = {name: tensor for name, tensor in state.items() if not _META_CONSTANTS.search(name)}
        found = _split_bias(rename(kept, META_DINOV3))
    else:
        found = _without_classifier(state, backbone)
    own = {name: tensor for name, tensor in backbone.named_parameters() if _DINOV3_ABSENT_IS_ZERO.search(name)}
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in own.items() if name not in found}
    # Only the biases and the mask token of a backbone with registers may be absent: others were trained with theirs.
    found |= zeros if "reg_token" in found else {}
    if "mask_token" in found:
        found["mask_token"] = found["mask_token"].reshape(1, 1, -1)
    return {name: tensor for name, tensor in found.items() if name in own or not _is_spare(name, tensor)}


def _is_spare(name: str, tensor: Tensor) -> bool:
    """Tell whether a backbone without a place for this tensor of DINOv3 gives the same vectors."""
    return name == "mask_token" or (bool(_DINOV3_ABSENT_IS_ZERO.search(name)) and not tensor.any())


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".q_weight")
        parts = [state.get(f"{stem}.{letter}_weight") for letter in "qkv"]
        if stem != name and all(part is not None for part in parts):
            joined[f"{stem}.qkv.weight"] = torch.cat(parts)
        elif not re.search(r"\.attn\.[kv]_weight$", name) and not (name.endswith(".k_bias") and not tensor.any()):
            joined[name] = tensor
    return joined


def _split_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    split = {}
    for name, tensor in state.items():
        stem = name.removesuffix("qkv.bias")
        if stem == name:
            split[name] = tensor
        else:
            # Meta masks the third of k, whatever stands there.
            split[f"{stem}q_bias"], _, split[f"{stem}v_bias"] = tensor.chunk(3)
    return split


def _without_classifier(state: State, backbone: nn.Module) -> dict[str, Tensor]:
    named = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (named,) if isinstance(named, str) else tuple(named)
    own = set(backbone.state_dict())
    # A network of features alone has no layers after its last stage.
    ends = _LAST_LAYERS if "conv_stem.weight" in own else ()
    return {
        name: tensor
        for name, tensor in state.items()
        if name in own or not (name.startswith(ends) or any(name in (f"{n}.weight", f"{n}.bias") for n in names))
    }


def vit_args(state: State) -> dict[str, Any]:
    """Return the arguments of a ViT that its tensors, named by timm or transformers, tell; heads are of 64 channels.

    Raises KeyError for the tensor that is missing.
    """
    hf = is_hf_dinov3(state)
    patch = state["embeddings.patch_embeddings.weight" if hf else "patch_embed.proj.weight"]
    pattern = re.compile(_LAYER if hf else r"^blocks\.(\d+)\.")
    depth = len({m[1] for name in state if (m := pattern.match(name))})
    dim = int(patch.shape[0])
    found = {"embed_dim": dim, "depth": depth, "num_heads": max(dim // 64, 1), "patch_size": int(patch.shape[-1])}
    if "pos_embed" in state:
        found["img_size"] = math.isqrt(state["pos_embed"].shape[1]) * found["patch_size"]
        found["reg_tokens"] = int(state["reg_token"].shape[1])
    return found
