"""The variants of morpho-molecular fusion and their sizes (Martinelli et al. 2026, tables A.1, A.3); no torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cellslide.errors import short

Variant = Literal[
    "early_add", "early_concat", "late_add_token", "late_concat_token", "late_add_tile", "late_concat_tile",
    "morph_only", "expr_only_token", "expr_only_tile",
]  # fmt: skip
TilePool = Literal["mean", "sum"]


@dataclass(frozen=True, slots=True)
class FusionConfig:
    """A variant of the paper, and its sizes.

    genes_in, genes_out  names of the genes that are read and of those that are predicted.
    vit, vit_args        a plain ViT of timm with a class token, and changes to its arguments (img_size, patch_size).
    expr_dim, expr_layers  width of the MLP on transcripts, and its hidden layers; the paper's code has 32 and 1.
    gate       early_add and late_add only: expression enters by tanh(alpha), alpha learned from 0 (the discussion).
    token_head predicts the genes of each patch too, where patches pass the blocks; our own addition.
    contrast   no head: both vectors are compared (CLIP), with a temperature that is learned.
    tiles      how tiles are read, for who reads slides: stride (patches), pool and least_qv; the network needs none.
    """

    genes_in: tuple[str, ...]
    genes_out: tuple[str, ...]
    variant: Variant = "early_add"
    vit: str = "vit_small_patch16_224"
    vit_args: Mapping[str, Any] = field(default_factory=dict)
    expr_dim: int = 32
    expr_layers: int = 1
    gate: bool = False
    token_head: bool = False
    contrast: bool = False
    tiles: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant {short(self.variant)}: must be one of {', '.join(get_args(Variant))}")
        if not (self.genes_out or self.contrast) or (self.reads_genes and not self.genes_in):
            raise ValueError("genes_in and genes_out: name at least one gene each")
        if self.contrast and not self.variant.startswith("late"):
            raise ValueError(f"contrast: compares the vectors of late variants, not of {self.variant}")
        if self.gate and not self.variant.endswith(("add", "add_token", "add_tile")):
            raise ValueError(f"gate: is for variants that add, not {self.variant}")
        if self.token_head and not self.variant.startswith(("early", "morph")):
            raise ValueError(f"token_head: no patch of {self.variant} passes the blocks with all that it reads")

    @property
    def reads_image(self) -> bool:
        """Whether the variant looks at the H&E tile."""
        return not self.variant.startswith("expr")

    @property
    def reads_genes(self) -> bool:
        """Whether the variant reads transcripts."""
        return self.variant != "morph_only"

    @property
    def by_tile(self) -> bool:
        """Whether transcripts come as one vector a tile, not one a patch."""
        return self.variant.endswith("tile")
