"""Deformable DETR: a backbone of timm, an encoder, and a decoder that refines boxes; one stage or two.

Boxes are (cx, cy, w, h) in 0..1 of the valid image. Names of modules are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# backbones makes timm importable, so it stands first.
from cellslide.errors import short
from cellslide.models.backbones import restore_constants, timm
from cellslide.models.celldetr_config import CellDETRConfig
from cellslide.models.detr_layers import (
    BoxMlp,
    DecoderLayer,
    EncoderLayer,
    FrozenBatchNorm2d,
    Memory,
    box_positions,
    class_head,
    draw_layers,
    inverse_sigmoid,
    sine_positions,
    token_centres,
)

SwinTransformerBlock = timm.models.swin_transformer.SwinTransformerBlock

# Where sizes begin, as logits: an eighth of the image.
SMALL = -2.0


@dataclass(frozen=True, slots=True)
class Found:
    """Boxes (B, N, 4) and logits (B, N, k) of one decoder layer, or of the encoder's proposals."""

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True, slots=True)
class DetrOutput:
    """What the detection decoder says: the last layer, the ones before it (`aux`), the encoder's memory.

    hidden     (B, Q, d) of the last layer.
    proposals  of every token, two-stage only.
    """

    logits: Tensor
    boxes: Tensor
    aux: tuple[Found, ...]
    hidden: Tensor
    memory: Memory
    proposals: Found | None = None

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) of each level of the memory."""
        return self.memory.shapes


class PaddedSwinBlock(SwinTransformerBlock):
    """A block of timm's that pads a map to whole windows before it shifts them, as the original and all detectors do.

    timm shifts first, which gives other windows wherever the map is not a multiple of the window.
    """

    def _attn(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        below, right = -h % self.window_size[0], -w % self.window_size[1]
        attended: Tensor = super()._attn(F.pad(x, (0, 0, 0, right, 0, below)))
        return attended[:, :h, :w]


class DetrBackbone(nn.Module):
    """timm's network, read at the wanted strides; `norms` are named by the place of the map in the network."""

    def __init__(self, config: CellDETRConfig) -> None:
        super().__init__()
        args = _timm_args(config)
        with torch.device("meta"):
            reductions = timm.create_model(config.backbone, **args).feature_info.reduction()
        missing = [s for s in config.strides if s not in reductions]
        if missing:
            raise ValueError(f"backbone {config.backbone}: has strides {reductions}, not {missing}")
        wanted = [reductions.index(s) for s in config.strides]
        self.body = timm.create_model(config.backbone, out_indices=wanted, **args)
        restore_constants(self.body)
        for part in self.body.modules():
            if isinstance(part, FrozenBatchNorm2d):
                # timm starts the last norm of a residual block at zero, where a frozen one would stay.
                nn.init.ones_(part.weight)
            if isinstance(part, SwinTransformerBlock):
                part.__class__ = PaddedSwinBlock
        self.channels = tuple(self.body.feature_info.channels())
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        named = {str(i): nn.LayerNorm(c) for i, c in zip(wanted, self.channels, strict=True)}
        self.norms = nn.ModuleDict(named) if config.feature_norm else None

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [m if self.channels_last else m.permute(0, 2, 3, 1) for m in self.body(x)]
        if self.norms is not None:
            maps = [norm(m) for norm, m in zip(self.norms.values(), maps, strict=True)]
        return [m.permute(0, 3, 1, 2) for m in maps]


def _timm_args(config: CellDETRConfig) -> dict[str, Any]:
    if not timm.is_model(config.backbone):
        raise ValueError(f"backbone {short(config.backbone)}: not an architecture of timm")
    args: dict[str, Any] = {"features_only": True, "pretrained": False}
    if config.norm == "frozen":
        args["norm_layer"] = FrozenBatchNorm2d
    if config.backbone.startswith("swin_"):
        # As published: images of any size, and windows that stay whole where the map is smaller.
        args |= {"strict_img_size": False, "always_partition": True}
    return args | dict(config.backbone_args)


class _Layers(nn.Module):
    """A list of layers under the name `layers`."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Transformer(nn.Module):
    """Encoder and detection decoder of Deformable DETR."""

    def __init__(self, config: CellDETRConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        sizes = (dim, config.ffn_dim, config.n_levels, config.n_heads, config.n_points, config.dropout)
        self.level_embed = nn.Parameter(torch.randn(config.n_levels, dim))
        self.encoder = _Layers([EncoderLayer(*sizes) for _ in range(config.enc_layers)])
        self.decoder = _Layers([DecoderLayer(*sizes) for _ in range(config.dec_layers)])
        if config.two_stage:
            self.enc_output, self.enc_output_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
            self.pos_trans, self.pos_trans_norm = nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim)
        else:
            self.reference_points = nn.Linear(dim, 2)

    def encode(self, maps: Sequence[Tensor], mask: Tensor | None) -> Memory:
        """Return the memory of `maps` (B, d, H, W); `mask` bool (B, H, W) of the image, True at padding."""
        shapes = tuple((int(m.shape[2]), int(m.shape[3])) for m in maps)
        paddings = [_padding_at(mask, maps[0].shape[0], shape, maps[0].device) for shape in shapes]
        ratios = torch.stack([_valid_ratio(p) for p in paddings], dim=1)
        positions = torch.cat(
            [sine_positions(p, m.shape[1]) + e for p, m, e in zip(paddings, maps, self.level_embed, strict=True)], dim=1
        )
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        padding = None if mask is None else torch.cat([p.flatten(1) for p in paddings], dim=1)
        memory = Memory(tokens, shapes, ratios, padding)
        centres = token_centres(shapes, ratios)
        for layer in self.encoder.layers:
            tokens = layer(tokens, positions, centres, memory)
        return Memory(tokens, shapes, ratios, padding)


def _padding_at(mask: Tensor | None, batch: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    if mask is None:
        return torch.zeros(batch, *shape, dtype=torch.bool, device=device)
    return F.interpolate(mask[None].float(), size=shape)[0].to(torch.bool)


def _valid_ratio(padding: Tensor) -> Tensor:
    _, h, w = padding.shape
    return torch.stack([(~padding[:, 0]).sum(1).float() / w, (~padding[:, :, 0]).sum(1).float() / h], dim=-1)


class DeformableDetr(nn.Module):
    """Backbone, transformer and the heads of each decoder layer; boxes are refined layer by layer."""

    def __init__(self, config: CellDETRConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_dim
        backbone = DetrBackbone(config)
        self.transformer = Transformer(config)
        # With two stages the last heads are those of the proposals.
        n_heads = config.dec_layers + int(config.two_stage)
        self.class_embed = nn.ModuleList(class_head(dim, config.det_classes) for _ in range(n_heads))
        # A first reference that is a point says nothing of the size.
        sizes = [0.0 if config.two_stage else SMALL, *[0.0] * (n_heads - 1)]
        self.bbox_embed = nn.ModuleList(BoxMlp(dim, size) for size in sizes)
        if not config.two_stage:
            self.query_embed = nn.Embedding(config.num_queries, 2 * dim)
        self.input_proj = nn.ModuleList(_input_projections(backbone.channels, dim, config.n_levels))
        self.backbone = nn.ModuleList([backbone])
        draw_layers(self.transformer)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> DetrOutput:
        # Sizes by shape and never by len(), which an export would take for a constant.
        memory = self.transformer.encode(self._levels(x), mask)
        proposals: Found | None = None
        if self.config.two_stage:
            proposals, reference, positions, queries = self._propose(memory)
        else:
            embed = self.query_embed.weight.expand(x.shape[0], -1, -1)
            positions, queries = embed.chunk(2, dim=-1)
            reference = self.transformer.reference_points(positions).float().sigmoid()
        layers, hidden = self._decode(queries, positions, reference, memory)
        return DetrOutput(layers[-1].logits, layers[-1].boxes, tuple(layers[:-1]), hidden, memory, proposals)

    def _levels(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone[0](x)
        levels = [proj(m) for proj, m in zip(self.input_proj, maps, strict=False)]
        deepest = maps[-1]
        for proj in list(self.input_proj)[len(maps) :]:
            deepest = proj(deepest)
            levels.append(deepest)
        return levels

    def _decode(self, x: Tensor, positions: Tensor, reference: Tensor, memory: Memory) -> tuple[list[Found], Tensor]:
        found = []
        heads = zip(self.transformer.decoder.layers, self.class_embed, self.bbox_embed, strict=False)
        for layer, classify, regress in heads:
            x = layer(x, positions, reference, memory)
            delta = regress(x).float()
            known = inverse_sigmoid(reference)
            # A first reference may be a point, which says nothing of the size.
            boxes = (delta + F.pad(known, (0, 4 - known.shape[-1]))).sigmoid()
            found.append(Found(classify(x).float(), boxes))
            reference = boxes.detach()
        return found, x

    def _propose(self, memory: Memory) -> tuple[Found, Tensor, Tensor, Tensor]:
        """Return the proposals of all tokens, and reference, position and content of the best of them."""
        net, config = self.transformer, self.config
        grid = self._grid(memory)
        valid = ((grid > 0.01) & (grid < 0.99)).all(-1, keepdim=True)
        if memory.padding is not None:
            valid = valid & ~memory.padding[..., None]
        tokens = net.enc_output_norm(net.enc_output(memory.tokens.masked_fill(~valid, 0.0)))
        start = torch.logit(grid).masked_fill(~valid, math.inf)
        logits = self.class_embed[-1](tokens).float()
        coords = self.bbox_embed[-1](tokens).float() + start
        n = min(config.num_queries, logits.shape[1])
        best = logits[..., 0].topk(n, dim=1).indices
        reference = coords.detach().sigmoid().gather(1, best[..., None].expand(-1, -1, 4))
        content = net.pos_trans_norm(net.pos_trans(box_positions(reference, config.hidden_dim // 2)))
        positions, queries = content.chunk(2, dim=-1)
        return Found(logits, coords.sigmoid()), reference, positions, queries

    def _grid(self, memory: Memory) -> Tensor:
        centres = token_centres(memory.shapes, memory.valid_ratios)
        sizes = [
            torch.full((h * w,), self.config.proposal_size * 2.0**level, device=centres.device)
            for level, (h, w) in enumerate(memory.shapes)
        ]
        return torch.cat([centres, torch.cat(sizes)[None, :, None].expand(centres.shape[0], -1, 2)], dim=-1)


def _input_projections(channels: Sequence[int], dim: int, n_levels: int) -> list[nn.Module]:
    groups = math.gcd(32, dim)
    convolutions = [nn.Conv2d(c, dim, 1) for c in channels]
    width = channels[-1]
    for _ in range(n_levels - len(channels)):
        convolutions.append(nn.Conv2d(width, dim, 3, stride=2, padding=1))
        width = dim
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    return [nn.Sequential(convolution, nn.GroupNorm(groups, dim)) for convolution in convolutions]
