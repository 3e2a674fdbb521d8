"""An EfficientNet-Lite0 as it is published, with random weights."""

from __future__ import annotations

import timm
import torch

LITE = "tf_efficientnet_lite0"
# Parts of a block, by timm's name and the published one: the first block has no expansion.
PLAIN = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
EXPANDED = {
    "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1", "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}  # fmt: skip


def published_efficientnet(seed: int) -> dict[str, torch.Tensor]:
    """Return an EfficientNet-Lite0 under the names in which it is published, which count the blocks through."""
    torch.manual_seed(seed)
    network = timm.create_model(LITE)
    names: dict[str, str] = {}
    count = 0
    for stage, blocks in enumerate(network.blocks):
        for place, _ in enumerate(blocks):
            inner = PLAIN if stage == 0 else EXPANDED
            names |= {f"blocks.{stage}.{place}.{ours}": f"_blocks.{count}.{theirs}" for ours, theirs in inner.items()}
            count += 1
    names |= {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    state = {}
    for name, value in network.state_dict().items():
        part, _, leaf = name.rpartition(".")
        state[f"{names[part]}.{leaf}"] = torch.rand_like(value) if value.is_floating_point() else value
    return state
