"""What a CellDETR is made of, as a manifest or a recipe names it. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["sequential", "parallel"]


@dataclass(frozen=True, slots=True)
class CellDETRConfig:
    """Sizes of a CellDETR; the defaults are the published ones for PanNuke.

    backbone         timm's name; `strides` says which of its maps are taken, `backbone_args` go to timm.
    norm             "frozen": batch norms of the backbone are constants; "own": as timm builds them (train from
                     scratch); feature_norm: a layer norm behind each map, as Swin has.
    n_levels         levels of the transformer; those beyond the backbone's are strided convolutions.
    two_stage        queries start at the best proposals of the encoder instead of learned places.
    det_classes      logits of the detection head: 1 is nucleus or not.
    first_class      the first of them that means a nucleus: 1 where logit 0 was never trained.
    num_classes      nucleus types of the representation decoder; 0 without types.
    repr_layers      its layers, the first without self-attention; 0 leaves it out: the detection head types.
    global_boxes     boxes of the whole image that stand with the nuclei in parallel mode.
    projection       contrastive head on the embeddings.
    placed           self-attention between embeddings knows where the boxes are; false where only contrast taught them.
    mode             how `forward` runs: "sequential" represents all queries, "parallel" those that were kept.
    score_threshold  detection score above which a query is kept.
    proposal_size    width of the proposals of the first level, in 0..1; doubles with each level.
    query_fraction   share of the queries that may be kept, best first; 1 keeps all above the threshold.
    window_px        larger images are cut into windows of this edge, 0 leaves them whole: a detector knows sizes as
                     shares of what it was trained on. `window_stride_px` apart, 0 is three quarters of it.
    """

    backbone: str = "resnet50"
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    strides: tuple[int, ...] = (4, 8, 16, 32)
    norm: Literal["frozen", "own"] = "frozen"
    feature_norm: bool = False
    hidden_dim: int = 256
    n_heads: int = 8
    n_points: int = 4
    n_levels: int = 4
    enc_layers: int = 6
    dec_layers: int = 3
    ffn_dim: int = 1024
    dropout: float = 0.1
    num_queries: int = 900
    two_stage: bool = False
    proposal_size: float = 0.05
    det_classes: int = 1
    first_class: int = 0
    num_classes: int = 5
    repr_layers: int = 3
    global_boxes: int = 50
    projection: bool = False
    placed: bool = True
    mode: Mode = "sequential"
    score_threshold: float = 0.4
    query_fraction: float = 1.0
    window_px: int = 0
    window_stride_px: int = 0

    def __post_init__(self) -> None:
        # A manifest gives lists.
        object.__setattr__(self, "strides", tuple(self.strides))
        if self.hidden_dim % self.n_heads or self.hidden_dim % 4:
            raise ValueError(f"hidden_dim {self.hidden_dim}: must be a multiple of 4 and of n_heads {self.n_heads}")
        if self.n_levels < len(self.strides):
            raise ValueError(f"n_levels {self.n_levels}: fewer than the {len(self.strides)} maps of the backbone")
        if self.mode not in ("sequential", "parallel"):
            raise ValueError(f"mode {str(self.mode)[:60]!r}: must be sequential or parallel")
        if self.mode == "parallel" and self.repr_layers and self.global_boxes < 1:
            raise ValueError("global_boxes 0: must be at least 1 in parallel mode, an image may have no box of its own")
        if not 0 <= self.first_class < self.det_classes:
            raise ValueError(f"first_class {self.first_class}: must be below det_classes {self.det_classes}")
        if self.repr_layers and self.det_classes != 1:
            raise ValueError("det_classes: must be 1 where a representation decoder types the nuclei")
        if not 0 < self.query_fraction <= 1:
            raise ValueError(f"query_fraction {self.query_fraction}: must be in (0, 1]")
        if not 0 <= self.stride_px <= self.window_px:
            raise ValueError(f"window_stride_px {self.window_stride_px}: must be at most window_px {self.window_px}")

    @property
    def stride_px(self) -> int:
        """How far apart windows stand, in pixels."""
        return self.window_stride_px or 3 * self.window_px // 4

    @property
    def n_types(self) -> int:
        """How many classes `forward` gives, background not among them."""
        typed_by_head = self.det_classes - self.first_class
        return self.num_classes if self.repr_layers else (typed_by_head if typed_by_head > 1 else 0)
