"""A network for inference alone: batch norms become part of the convolutions before them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(module: nn.Module) -> nn.Module:
    """Return a network in eval mode without the batch norms that stand right behind a convolution.

    What it gives differs by rounding. A pair is known by its order in a Sequential, or by the names of residual
    networks (`conv1`, `bn1`); any other batch norm stays. Other weights are shared with `module`, which stays as it is,
    and which is returned where nothing is to be done.
    """
    if not any(True for parent in module.modules() for _ in _pairs(parent)):
        return module.eval()
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    module = copy.deepcopy(module, shared).eval()
    for parent in list(module.modules()):
        for conv, norm in list(_pairs(parent)):
            setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
            setattr(parent, norm, nn.Identity())
    return module


def _pairs(parent: nn.Module) -> Iterator[tuple[str, str]]:
    names = [name for name, _ in parent.named_children()]
    if isinstance(parent, nn.Sequential):
        candidates = list(zip(names[:-1], names[1:], strict=True))
    else:
        candidates = [(name, f"bn{name[4:]}") for name in names if name.startswith("conv")]
    for conv, norm in candidates:
        # Not isinstance: a subclass may do more than its name says, as a norm with an activation does.
        if type(getattr(parent, conv)) is nn.Conv2d and type(getattr(parent, norm, None)) is nn.BatchNorm2d:
            yield conv, norm
