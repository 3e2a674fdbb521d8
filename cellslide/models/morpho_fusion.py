"""Morpho-molecular fusion: a ViT on an H&E tile and an MLP on transcripts, joined before or after the blocks.

Martinelli et al. 2026, section 2 and tables A.1 and A.3; names of tensors and numbers are those of their code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cellslide.models.backbones import create_backbone, prefix_tokens, width_of
from cellslide.models.fusion_config import FusionConfig

LEAST_NORM = 1e-5
# CLIP's: the temperature begins at 0.07, and likeness is multiplied by 100 at most.
START_TEMPERATURE, MOST_SCALE = 0.07, 100.0


@dataclass(frozen=True, slots=True)
class FusionOutput:
    """z (B, D) the joint vector, y (B, T) log1p counts of the tile, token_y (B, N, T) those of each patch or None."""

    z: Tensor
    y: Tensor
    token_y: Tensor | None = None


class MorphoFusion(nn.Module):
    """The network: `backbone` joins both modalities, `head` is one linear layer on the joint vector."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = FusionBackbone(config)
        if config.contrast:
            self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / START_TEMPERATURE)]))
        else:
            self.head = LinearHead(self.backbone.dim_out, len(config.genes_out))
        self.token_head = LinearHead(self.backbone.dim, len(config.genes_out)) if config.token_head else None

    def forward(self, image: Tensor | None, expression: Tensor | None) -> FusionOutput:
        """Predict from normalised tiles (B, 3, S, S) and log1p counts: (B, N, G) row by row, (B, G) for `by_tile`."""
        joined = self.backbone(image, expression)
        tokens = None if self.token_head is None else self.token_head(joined.patches)
        return FusionOutput(joined.z, self.head(joined.z), tokens)

    def contrast(self, image: Tensor, expression: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the vectors of both modalities (B, d), each of length 1, and what their likeness is multiplied by."""
        vectors = self.backbone.modality_vectors(image, expression)
        a, b = (nn.functional.normalize(v.float(), dim=1) for v in vectors)
        return a, b, self.logit_scale.exp().clamp(max=MOST_SCALE)


@dataclass(frozen=True, slots=True)
class Joined:
    """z (B, D), and the patches (B, N, d) after the blocks where there are any."""

    z: Tensor
    patches: Tensor | None = None


class FusionBackbone(nn.Module):
    """Both encoders and what joins them. Norms, token and alpha are there in every variant, as published.

    dim      length d of a token; dim_out  length of the joint vector.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.expr_dim
        if config.reads_image:
            self.morph_encoder = create_backbone(config.vit, config.vit_args, "cls")
            self.dim = width_of(self.morph_encoder)
            if prefix_tokens(self.morph_encoder) != 1:
                raise ValueError(f"vit {config.vit}: needs one class token and no registers")
        if config.reads_genes:
            self.expr_encoder = ExpressionEncoder(len(config.genes_in), config.expr_dim, config.expr_layers)
            if config.reads_image:
                self.expr_to_morph_proj = nn.Linear(config.expr_dim, self.dim)
        self.fusion_alpha = nn.Parameter(torch.zeros(1), requires_grad=config.gate)
        self.modality_token = nn.Parameter(torch.zeros(1, self.dim))
        self.ln_morph, self.ln_expr = nn.LayerNorm(self.dim), nn.LayerNorm(self.dim)
        self.dim_out = 2 * self.dim if config.variant.startswith("late_concat") else self.dim

    def forward(self, image: Tensor | None, expression: Tensor | None) -> Joined:
        """Return the joint vector; raises ValueError where a modality that the variant reads is missing."""
        config = self.config
        if (config.reads_image and image is None) or (config.reads_genes and expression is None):
            raise ValueError(f"{config.variant}: needs {'an image' if image is None else 'transcripts'}")
        if not config.reads_image:
            found = self.expr_encoder(expression)
            return Joined(found if config.by_tile else found.mean(1))
        if config.variant == "morph_only":
            return self._blocks(self.morph_encoder._pos_embed(self.morph_encoder.patch_embed(image)))
        expr = self.expr_to_morph_proj(self.expr_encoder(expression))
        return self._early(image, expr) if config.variant.startswith("early") else self._late(image, expr)

    def _early(self, image: Tensor, expr: Tensor) -> Joined:
        vit = self.morph_encoder
        patches = vit.patch_embed(image)
        if self.config.variant == "early_add":
            return self._blocks(vit._pos_embed(patches + self._gated(match_norms(expr, patches))))
        # Both sequences get the same positions; one class token stands for both.
        n = patches.shape[1]
        joined = self._blocks(torch.cat([vit._pos_embed(patches), vit._pos_embed(expr)[:, 1:]], dim=1))
        assert joined.patches is not None
        return Joined(joined.z, joined.patches[:, :n])

    def _late(self, image: Tensor, expr: Tensor) -> Joined:
        vit = self.morph_encoder
        z = self._blocks(vit._pos_embed(vit.patch_embed(image))).z
        image_z, expr_z = self.ln_morph(z), self.ln_expr(expr if self.config.by_tile else expr.mean(1))
        if self.config.variant.startswith("late_concat"):
            return Joined(torch.cat([image_z, expr_z], dim=1))
        return Joined(image_z + self._gated(expr_z))

    def _gated(self, expr: Tensor) -> Tensor:
        return torch.tanh(self.fusion_alpha) * expr if self.config.gate else expr

    def _blocks(self, tokens: Tensor) -> Joined:
        vit = self.morph_encoder
        x = vit.norm(vit.blocks(vit.norm_pre(vit.patch_drop(tokens))))
        return Joined(x[:, 0], x[:, 1:])

    def modality_vectors(self, image: Tensor, expression: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of both modalities before they are joined, (B, d) each, for contrast (CLIP)."""
        expr = self.expr_to_morph_proj(self.expr_encoder(expression))
        vit = self.morph_encoder
        return self._blocks(vit._pos_embed(vit.patch_embed(image))).z, expr if self.config.by_tile else expr.mean(1)


def match_norms(expr: Tensor, patches: Tensor) -> Tensor:
    """Return E_i |P_i| / |E_i| of each token in float32; a vector of no length stays nothing."""
    wide = expr.float()
    norm = wide.norm(dim=-1, keepdim=True)
    scaled = wide * (patches.float().norm(dim=-1, keepdim=True) / norm.clamp_min(LEAST_NORM))
    return torch.where(norm > LEAST_NORM, scaled, torch.zeros_like(scaled)).to(expr.dtype)


class ExpressionEncoder(nn.Module):
    """An MLP on log1p counts: (…, G) -> (…, width)."""

    def __init__(self, genes: int, width: int, hidden: int) -> None:
        super().__init__()
        sizes = [genes, *[width] * (hidden + 1)]
        layers = [[nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.1)] for a, b in zip(sizes, sizes[1:], strict=False)]
        self.head = nn.Sequential(*(layer for block in layers for layer in block), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the vectors of tokens or tiles."""
        return self.head(x)


class LinearHead(nn.Module):
    """One linear layer, named as published."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(width, out))

    def forward(self, z: Tensor) -> Tensor:
        """Return (…, out)."""
        return self.head(z)


def build(config: Mapping[str, Any]) -> MorphoFusion:
    """Build the network from plain containers; raises TypeError or ValueError for what it does not take."""
    genes = {name: tuple(map(str, config.get(name) or ())) for name in ("genes_in", "genes_out")}
    return MorphoFusion(FusionConfig(**{**config, **genes}))
