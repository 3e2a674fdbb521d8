"""Where in its picture a network looked for an answer: Grad-CAM on a backbone's last block, tokens or feature maps.

Selvaraju et al. 2017, eqs 1 and 2. A transformer that answers by its class token has no use for the patch tokens that
leave its last block, so their map is taken where that block reads them, after its first norm; one that averages the
patches has its map taken at the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cellslide.errors import CellslideError


@dataclass(slots=True)
class Seen:
    """What the last block of a backbone read and gave in one forward pass, ready for a gradient.

    read, given   tokens (B, N, C), or maps (B, C, h, w), (B, h, w, C) where `channels_last`.
    grid          rows and columns of the patches, of which `prefix` other tokens stand in front; (0, 0) for maps.
    """

    prefix: int = 0
    channels_last: bool = False
    grid: tuple[int, int] = (0, 0)
    read: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)

    def heat(self, score: Tensor) -> Tensor:
        """Return Grad-CAM (B, h, w) of `score` (B,), 0..1 by each map's own maximum; all 0 where nothing speaks for it.

        Raises CellslideError where the score does not depend on this backbone.
        """
        for tensor in (*self.given, *self.read):
            (slope,) = torch.autograd.grad(score.sum(), tensor, retain_graph=True, allow_unused=True)
            if slope is None:
                continue
            places, slopes = self._places(tensor.detach()), self._places(slope)
            if bool(slopes.any()):
                return _grad_cam(places, slopes)
        raise CellslideError("the answer does not depend on the last block of this backbone: no map can be made")

    def _places(self, tensor: Tensor) -> Tensor:
        """Return a tensor of this backbone as float32 (B, h, w, C)."""
        if tensor.ndim == 4:
            return (tensor if self.channels_last else tensor.permute(0, 2, 3, 1)).float()
        return tensor[:, self.prefix :].unflatten(1, self.grid).float()


def _grad_cam(places: Tensor, slopes: Tensor) -> Tensor:
    weight = slopes.mean(dim=(1, 2), keepdim=True)
    heat = (places * weight).sum(dim=-1).clamp(min=0)
    peak = heat.amax(dim=(1, 2), keepdim=True)
    return heat / torch.where(peak > 0, peak, torch.ones_like(peak))


@contextmanager
def watching(backbone: nn.Module) -> Iterator[Seen]:
    """Note what the last block of a timm backbone sees while this is entered; the graph begins at that block.

    Raises CellslideError for a network without one.
    """
    block = last_block(backbone)
    seen = Seen(getattr(backbone, "num_prefix_tokens", 0), getattr(backbone, "output_fmt", "NCHW") == "NHWC")
    hooks = [
        block.register_forward_pre_hook(lambda module, args: (_leaf(args[0]), *args[1:])),
        block.register_forward_hook(lambda module, args, out: seen.given.append(out)),
    ]
    embed, norm = getattr(backbone, "patch_embed", None), getattr(block, "norm1", None)
    if isinstance(embed, nn.Module):
        hooks.append(embed.register_forward_pre_hook(lambda module, args: _note_grid(seen, module, args[0])))
    if isinstance(norm, nn.Module):
        hooks.append(norm.register_forward_hook(lambda module, args, out: seen.read.append(out)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def last_block(backbone: nn.Module) -> nn.Module:
    """Return the last block of tokens, or the last stage of feature maps; raises CellslideError without one."""
    blocks = getattr(backbone, "blocks", None)
    if hasattr(backbone, "num_prefix_tokens") and isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        return blocks[-1]
    info: Any = getattr(backbone, "feature_info", None)
    if info:
        return backbone.get_submodule(info[-1]["module"])
    raise CellslideError(f"{type(backbone).__name__} has no last block to look at; it is no network of timm")


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _note_grid(seen: Seen, embed: Any, images: Tensor) -> None:
    size = getattr(embed, "patch_size", 1)
    height, width = (size, size) if isinstance(size, int) else size
    seen.grid = images.shape[-2] // height, images.shape[-1] // width
