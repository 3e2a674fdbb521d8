"""Convolutional networks of timm as pyramids of maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def conv_network(name: str, strides: Sequence[int]) -> tuple[nn.Module, list[int], tuple[int, ...]]:
    """Return a network of timm without what stands after its map at the last stride, the indices of its maps at
    `strides`, and their channels.

    Raises ValueError if timm has no such network or it has no such maps.
    """
    # timm takes a second to import, which those who read checkpoints of other models need not wait for.
    from cellslide.models.backbones import create_backbone

    network = create_backbone(name)
    info = list(getattr(network, "feature_info", []))
    place = {level["reduction"]: i for i, level in enumerate(info)}
    if not set(strides) <= set(place) or not hasattr(network, "forward_intermediates"):
        *first, last = map(str, strides)
        raise ValueError(f"encoder {str(name)[:60]!r}: has no maps at strides {', '.join(first)} and {last}")
    indices = [place[stride] for stride in strides]
    network.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    return network, indices, tuple(int(info[i]["num_chs"]) for i in indices)
