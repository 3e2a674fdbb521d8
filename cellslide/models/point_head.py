"""A head that finds nuclei as points, after DPA-P2PNet, and the detector that it makes of a MUSE backbone.

MUSE's own head was never released: this one is ours on MUSE's map. Sampling, heads and rules are those of DPA-P2PNet
(PromptNucSeg's prompter), whose published layout is `cellslide.models.dpa_p2pnet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cellslide.errors import short
from cellslide.models.muse import STRIDE_PX, Aligned, MuseBackbone, MuseConfig, MuseFeatures, sample_points

Keep = Literal["argmax", "all"]


@dataclass(frozen=True, slots=True)
class PointHeadConfig:
    """Sizes of a point head.

    space_px   distance of the proposals in input pixels: 8 at 0.25 um/px, 4 at 0.5.
    aux_mask   a mask of nuclei is learned beside the points.
    embedding  the detector also gives the map's feature at each point.
    keep       which points count, see `found_points`.
    """

    n_classes: int = 3
    hidden: int = 256
    space_px: int = 8
    aux_mask: bool = False
    embedding: bool = False
    keep: Keep = "argmax"

    def __post_init__(self) -> None:
        if self.keep not in get_args(Keep):
            raise ValueError(f"head: keep {short(self.keep)} must be one of {', '.join(get_args(Keep))}")
        if self.n_classes < 1 or self.hidden < 1 or self.space_px < 1:
            raise ValueError("head: n_classes, hidden and space_px must be at least 1")


@dataclass(frozen=True, slots=True)
class PointOutput:
    """What a point head says: Q proposals, row by row.

    points  (B, Q, 2), x and y in input pixels, not clipped.
    logits  (B, Q, C + 1), background last.
    mask    logits (B, 1, h, w) of nuclei at the stride of the finest map, or None.
    """

    points: Tensor
    logits: Tensor
    mask: Tensor | None = None


class PointHead(nn.Module):
    """Proposals on a grid, moved, regressed and typed. forward: maps (B, in_channels, h, w), the finest at stride 4.

    in_channels  channels of each map; n_maps of them are read, each at twice the stride of the one before.
    """

    def __init__(
        self, in_channels: int, n_classes: int, hidden: int, space_px: int, aux_mask: bool = False, n_maps: int = 1,
        aligned: Aligned = "corners",
    ) -> None:  # fmt: skip
        super().__init__()
        self.space_px, self.aligned = space_px, aligned
        self.deform_layer = PointMlp(in_channels, hidden, 2)
        self.conv = nn.Conv2d(n_maps * in_channels, hidden, 3, padding=1)
        self.reg_head = PointMlp(hidden, hidden, 2)
        self.cls_head = PointMlp(hidden, hidden, n_classes + 1)
        self.mask_head = mask_head(in_channels, hidden) if aux_mask else None
        # Untrained, a proposal stays where the grid puts it.
        nn.init.zeros_(self.deform_layer.layers[-1].weight)
        nn.init.zeros_(self.deform_layer.layers[-1].bias)

    def forward(self, feature_map: Tensor, size: tuple[int, int]) -> PointOutput:
        """Return the points found on a picture of `size` (H, W) in input pixels."""
        points, logits = self.regress((feature_map,), size)
        return PointOutput(points, logits, None if self.mask_head is None else self.mask_head(feature_map))

    def regress(self, maps: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return points (B, Q, 2) and logits (B, Q, C + 1) from the maps at strides 4, 8, and so on."""
        grid = proposals(size, self.space_px, maps[0].device)
        # Not len(): the exporter would take the batch of its example for the only one.
        start = grid.flatten(0, 1).expand(maps[0].shape[0], -1, -1)
        # Places are kept in float32: half precision cannot tell neighbouring pixels of a large tile apart.
        moved = start + self.deform_layer(sample_points(maps[0], start, STRIDE_PX, self.aligned)).float()
        read = [sample_points(level, moved, STRIDE_PX * 2**i, self.aligned) for i, level in enumerate(maps)]
        cells = torch.cat(read, dim=-1).transpose(1, 2).unflatten(2, grid.shape[:2])
        features = self.conv(cells).flatten(2).transpose(1, 2)
        return moved + self.reg_head(features).float(), self.cls_head(features)


class PointMlp(nn.Module):
    """Linear, ReLU, dropout, linear."""

    def __init__(self, c_in: int, hidden: int, c_out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(c_in, hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, c_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def mask_head(c_in: int, hidden: int, border: int = 0) -> nn.Sequential:
    """Return the layers that give a mask's logits; `border` widens the last map by as many pixels on each side."""
    return nn.Sequential(
        nn.Conv2d(c_in, hidden, 3, padding=1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, 1, 1, padding=border),
    )


def proposals(size: tuple[int, int], space_px: int, device: torch.device) -> Tensor:
    """Return a grid of points (rows, columns, 2), x and y in input pixels, `space_px` apart, the first at half that."""
    rows, cols = (torch.arange(-(-n // space_px), device=device) * space_px + space_px / 2 for n in size)
    y, x = torch.meshgrid(rows, cols, indexing="ij")
    return torch.stack([x, y], dim=-1)


def found_points(
    output: PointOutput,
    size: tuple[int, int],
    score: Literal["foreground", "class"] = "foreground",
    keep: Keep = "argmax",
) -> dict[str, Tensor]:
    """Return points, clipped to the picture's pixels, with scores and class probabilities.

    points (B, Q, 2), scores (B, Q), class_prob (B, Q, C) with rows that sum to 1.
    score  "foreground" the probability that it is no background, "class" that of the best class, as DPA-P2PNet.
    keep   "argmax" scores 0 where no class beats the background, as DPA-P2PNet; "all" leaves it to the threshold, so
           that a nucleus is found whose class is in doubt.
    """
    prob = output.logits.float().softmax(dim=-1)
    classes, background = prob[..., :-1], prob[..., -1]
    best = classes.amax(dim=-1)
    value = best if score == "class" else 1 - background
    last = output.points.new_tensor([size[1] - 1, size[0] - 1])
    points = torch.minimum(output.points.clamp(min=0), last)
    if keep == "argmax":
        value = value * (best > background)
    # Where the background has it all the row would be 0 / 0.
    class_prob = classes / classes.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return {"points": points, "scores": value, "class_prob": class_prob}


@dataclass(frozen=True, slots=True)
class MusePointsConfig:
    """A MUSE backbone and its point head."""

    backbone: MuseConfig = field(default_factory=MuseConfig)
    head: PointHeadConfig = field(default_factory=PointHeadConfig)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> MusePointsConfig:
        """Return the sizes that plain values give: those of `MuseConfig.of` beside `head`, a mapping.

        Raises TypeError for keys that are not known, ValueError for values that are not possible.
        """
        values = dict(config)
        head = PointHeadConfig(**(values.pop("head", None) or {}))
        return cls(MuseConfig.of(values), head)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that `of` reads back."""
        return self.backbone.as_dict() | {"head": asdict(self.head)}


class MusePoints(nn.Module):
    """A MUSE backbone with a point head: finds nuclei as points of `n_types` classes.

    forward: float (B, 3, H, W), normalised, edges multiples of 32 -> what `found_points` gives, and `embedding`
    (B, Q, D) where the head is configured so.
    """

    def __init__(self, config: MusePointsConfig) -> None:
        super().__init__()
        self.config = config
        head = config.head
        self.backbone = MuseBackbone(config.backbone)
        self.head = PointHead(
            self.backbone.dim, head.n_classes, head.hidden, head.space_px, head.aux_mask,
            aligned=config.backbone.aligned,
        )  # fmt: skip

    @property
    def n_types(self) -> int:
        """How many classes `forward` gives."""
        return self.config.head.n_classes

    @property
    def embedding_dim(self) -> int:
        """Length of the embeddings that `forward` gives, 0 for none."""
        return self.backbone.dim if self.config.head.embedding else 0

    def raw(self, x: Tensor) -> PointOutput:
        """Return what the head says before any decision, as training needs it."""
        return self.head(self.backbone(x).map, size_of(x))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features: MuseFeatures = self.backbone(x)
        # The mask beside the points is for training only.
        output = PointOutput(*self.head.regress((features.map,), size_of(x)))
        found = found_points(output, size_of(x), keep=self.config.head.keep)
        if self.config.head.embedding:
            found["embedding"] = self.backbone.nucleus_features(features.map, found["points"])
        return found


def build(config: Mapping[str, Any]) -> MusePoints:
    """Build a point detector, `config` as `MusePointsConfig.of` reads it; raises TypeError or ValueError."""
    return MusePoints(MusePointsConfig.of(config))


def size_of(x: Tensor) -> tuple[int, int]:
    """Return the size (H, W) of a batch of pictures."""
    return int(x.shape[-2]), int(x.shape[-1])
