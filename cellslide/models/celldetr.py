"""CellDETR: a deformable detector of nuclei, and a decoder that looks inside each box only (the representation).

Published twice: one-stage with a ResNet-50 and the representation decoder (Apache-2.0), and before it two-stage with a
Swin, typed by the detection head itself. Both, and small variants, are configurations of the same code.

Boxes are (cx, cy, w, h) in 0..1 of the valid image until `forward` turns them to xyxy in pixels of the tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellslide.models.celldetr_config import CellDETRConfig
from cellslide.models.celldetr_layout import own_names
from cellslide.models.detr import DeformableDetr, DetrOutput, Found
from cellslide.models.detr_layers import DecoderLayer, Memory, class_head, draw_layers
from cellslide.models.detr_slots import GLOBAL_BOX, Slots, contrastive_slots, parallel_slots

__all__ = [
    "GLOBAL_BOX",
    "CellDETR",
    "CellDETRConfig",
    "DetrOutput",
    "Found",
    "Represented",
    "Slots",
    "contrastive_slots",
    "parallel_slots",
]

# Windows of a large image go through the network by so many, so that memory does not grow with the image.
WINDOWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Represented:
    """Embeddings (B, N, d) of boxes, and class logits (B, N, C), or the projections (B, N, P) of `contrast`."""

    embedding: Tensor
    logits: Tensor


class RepresentationDecoder(nn.Module):
    """Looks at each box from inside: a first layer without self-attention, then the others (CellDETR, 3.1 and 3.2)."""

    def __init__(self, config: CellDETRConfig) -> None:
        super().__init__()
        sizes = (config.hidden_dim, config.ffn_dim, config.n_levels, config.n_heads, config.n_points, config.dropout)
        # Published with this spelling; its self-attention is in the checkpoints and is never used.
        self.inital_layer = DecoderLayer(*sizes, constrained=True)
        self.layers = nn.ModuleList(DecoderLayer(*sizes, constrained=True) for _ in range(config.repr_layers - 1))
        draw_layers(self)
        for idle in (self.inital_layer.self_attn, self.inital_layer.norm2):
            idle.requires_grad_(False)

    def forward(
        self, x: Tensor, positions: Tensor, boxes: Tensor, memory: Memory, mask: Tensor | None, placed: bool
    ) -> Tensor:
        x = self.inital_layer.look(x, positions, boxes, memory)
        for layer in self.layers:
            x = layer.look(layer.compare(x, positions if placed else None, mask), positions, boxes, memory)
        return x


class CellDETR(nn.Module):
    """Detector and representation decoder.

    forward: x float (B, 3, H, W), normalised, sides of any size -> `boxes` (B, Q, 4) xyxy in pixels of x, `scores`
    (B, Q), 0 for a query that is not kept, `embedding` (B, Q, d), and `class_prob` (B, Q, K) where nuclei are typed.
    """

    def __init__(self, config: CellDETRConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_dim
        self.detr = DeformableDetr(config)
        if config.repr_layers:
            self.decouple_decoder = RepresentationDecoder(config)
            self.decouple_class_embed = class_head(dim, config.num_classes) if config.num_classes else nn.Identity()
            self.wh_project = nn.Linear(2, dim)
            self.xy_project = nn.Linear(2, dim)
            if config.projection:
                self.contrastive_project = nn.Sequential(
                    nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim // 2)
                )
        self.register_load_state_dict_pre_hook(_take_own_names)

    @property
    def n_types(self) -> int:
        """How many classes `forward` gives."""
        return self.config.n_types

    @property
    def embedding_dim(self) -> int:
        """Length of the embeddings that `forward` gives."""
        return self.config.hidden_dim

    def detect(self, x: Tensor, mask: Tensor | None = None) -> DetrOutput:
        """Find boxes in `x` (B, 3, H, W); `mask` bool (B, H, W) is True at padding, and boxes are of what it leaves."""
        return self.detr(x, mask)

    def represent(self, output: DetrOutput, boxes: Tensor, mask: Tensor | None = None) -> Represented:
        """Look inside `boxes` (B, N, 4); `mask` bool (B, N, N), True where a row may not see a column."""
        embedding = self._embed(output, boxes, mask, self.config.placed)
        return Represented(embedding, self.decouple_class_embed(embedding).float())

    def contrast(self, output: DetrOutput, slots: Slots) -> Represented:
        """Look inside the boxes of `contrastive_slots`, without their places in self-attention, and project.

        Returns embeddings (B, N, d) and projections (B, N, d / 2) as `logits`; their losses are the trainer's.
        """
        embedding = self._embed(output, slots.boxes, slots.mask, placed=False)
        return Represented(embedding, self.contrastive_project(embedding).float())

    def _embed(self, output: DetrOutput, boxes: Tensor, mask: Tensor | None, placed: bool) -> Tensor:
        boxes = boxes.detach()
        content, positions = self.wh_project(boxes[..., 2:]), self.xy_project(boxes[..., :2])
        return self.decouple_decoder(content, positions, boxes, output.memory, mask, placed)

    def forward_sequential(self, x: Tensor, mask: Tensor | None = None) -> tuple[DetrOutput, Represented]:
        """Find boxes and look inside all of them, without a mask (CellDETR, A.1)."""
        output = self.detect(x, mask)
        return output, self.represent(output, output.boxes)

    def forward_parallel(
        self,
        x: Tensor,
        boxes: Sequence[Tensor] | None = None,
        threshold: float | None = None,
        mask: Tensor | None = None,
    ) -> tuple[DetrOutput, Slots, Represented]:
        """Find boxes, and look inside the given ones (N_i, 4) of each image, or those found above `threshold`."""
        output = self.detect(x, mask)
        if boxes is None:
            limit = self.config.score_threshold if threshold is None else threshold
            boxes = [b[k] for b, k in zip(output.boxes, output.logits[..., 0].sigmoid() > limit, strict=True)]
        slots = parallel_slots(boxes, self.config.global_boxes)
        return output, slots, self.represent(output, slots.boxes, slots.mask)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = self.config.window_px
        whole = not size or max(x.shape[-2:]) <= size
        return self._find(x) if whole else self._find_in_windows(x)

    def _find(self, x: Tensor) -> dict[str, Tensor]:
        h, w = int(x.shape[-2]), int(x.shape[-1])
        x, mask = _pad_to_32(x)
        output = self.detect(x, mask)
        boxes = _to_xyxy(output.boxes) * output.boxes.new_tensor([w, h, w, h])
        return {"boxes": boxes, **self._score(output)}

    def _find_in_windows(self, x: Tensor) -> dict[str, Tensor]:
        """Find in overlapping windows; each keeps the centres that are nearer to its middle than to a neighbour's."""
        size, stride = self.config.window_px, self.config.stride_px
        rows, columns = (_spans(int(n), size, stride) for n in x.shape[-2:])
        windows = torch.cat(
            [x[:, :, r.start : r.start + size, c.start : c.start + size] for r in rows for c in columns]
        )
        # An exported network takes any number of images, so the number of parts cannot depend on it.
        together = torch.compiler.is_exporting()
        parts = [self._find(part) for part in ([windows] if together else windows.split(WINDOWS_AT_ONCE))]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        # B images after each other for each window.
        per = {name: t.unflatten(0, (len(rows) * len(columns), x.shape[0])) for name, t in found.items()}
        at = x.new_tensor([[c.start, r.start, c.start, r.start] for r in rows for c in columns])
        low = x.new_tensor([[c.low, r.low] for r in rows for c in columns])[:, None, None]
        high = x.new_tensor([[c.high, r.high] for r in rows for c in columns])[:, None, None]
        per["boxes"] = per["boxes"] + at[:, None, None]
        centres = (per["boxes"][..., :2] + per["boxes"][..., 2:]) / 2
        own = ((centres >= low) & (centres < high)).all(-1)
        per["scores"] = torch.where(own, per["scores"], torch.zeros_like(per["scores"]))
        return {name: t.transpose(0, 1).flatten(1, 2) for name, t in per.items()}

    def _score(self, output: DetrOutput) -> dict[str, Tensor]:
        config = self.config
        detected = output.logits[..., config.first_class :].sigmoid()
        score = detected.amax(-1)
        keep = score > config.score_threshold
        if config.query_fraction < 1:
            keep = keep & _best(score, round(config.query_fraction * score.shape[1]))
        if not config.repr_layers:
            embedding, types = output.hidden, detected
        else:
            represented = self._represent_kept(output, keep)
            embedding, types = represented.embedding, represented.logits.sigmoid()
        found = {"embedding": embedding.float()}
        if config.n_types:
            score = types.amax(-1)
            found["class_prob"] = types / types.sum(-1, keepdim=True).clamp(min=1e-12)
        return {"scores": torch.where(keep, score, torch.zeros_like(score)), **found}

    def _represent_kept(self, output: DetrOutput, keep: Tensor) -> Represented:
        if self.config.mode == "sequential":
            return self.represent(output, output.boxes)
        slots = parallel_slots([b[k] for b, k in zip(output.boxes, keep, strict=True)], self.config.global_boxes)
        seen = self.represent(output, slots.boxes, slots.mask)
        embedding = seen.embedding.new_zeros(*keep.shape, seen.embedding.shape[-1])
        logits = seen.logits.new_zeros(*keep.shape, seen.logits.shape[-1])
        for i, count in enumerate(slots.counts):
            embedding[i, keep[i]] = seen.embedding[i, :count]
            logits[i, keep[i]] = seen.logits[i, :count]
        return Represented(embedding, logits)


@dataclass(frozen=True, slots=True)
class _Span:
    """A window along one axis: where it starts, and the pixels [low, high) whose centres it keeps."""

    start: int
    low: float
    high: float


def _spans(length: int, size: int, stride: int) -> list[_Span]:
    """Return windows that cover `length`: `stride` apart, the last at the end; borders halve each overlap."""
    last = max(length - size, 0)
    starts = sorted({*range(0, last, stride), last})
    borders = [(right + left + size) / 2 for left, right in zip(starts, starts[1:], strict=False)]
    lows, highs = [-math.inf, *borders], [*borders, math.inf]
    return [_Span(*each) for each in zip(starts, lows, highs, strict=True)]


def _take_own_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Let published names load: only those of this module, since a parent may hold it."""
    theirs = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    state.update({prefix + name: tensor for name, tensor in own_names(theirs).items()})


def _best(score: Tensor, n: int) -> Tensor:
    best = torch.zeros_like(score, dtype=torch.bool)
    return best.scatter(1, score.topk(n, dim=1).indices, True)


def _to_xyxy(boxes: Tensor) -> Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _pad_to_32(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pad right and below to multiples of 32; the mask is None where nothing was padded."""
    h, w = int(x.shape[-2]), int(x.shape[-1])
    right, below = -w % 32, -h % 32
    if not right and not below:
        return x, None
    mask = torch.ones(x.shape[0], h + below, w + right, dtype=torch.bool, device=x.device)
    mask[:, :h, :w] = False
    return F.pad(x, (0, right, 0, below)), mask


def build(config: Mapping[str, Any]) -> CellDETR:
    """Build a CellDETR with `config` over the published sizes; raises TypeError or ValueError."""
    return CellDETR(CellDETRConfig(**config))
