"""NuClass: a local path that looks at a nucleus, a global path that also sees its surroundings, and a gate between.

Source: the NuClass paper, sections 3.1 to 3.3, and its public code; where they differ the code's sizes are taken, since
published weights have them. Modules are named as in a published gate checkpoint: `modelA.` local, `modelB.` global,
`uni_encoder` and `dino_model` the backbones whatever they are. The gate g is the weight of the global path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cellslide.errors import UsageError
from cellslide.models.backbones import BackboneConfig, create_backbone, depths, features, patch_px, width_of
from cellslide.models.nuclass_config import NuClassConfig

Part = Literal["local_backbone", "local_head", "global_backbone", "context_backbone", "global_head", "gate"]

N_STATISTICS = 8
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class LocalOut:
    """What the local path says: features (B, D) after FiLM, logits (B, K), raw (B, D) as the backbone gave it."""

    features: Tensor
    logits: Tensor
    raw: Tensor


@dataclass(frozen=True, slots=True)
class GlobalOut:
    """What the global path says: fused (B, 2 * proj_width), crop first, and logits (B, K)."""

    fused: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class NuClassOutput:
    """Both paths and the gate (B,) of one pass; what belongs to the global path is None where there is none."""

    logits_local: Tensor
    features_local: Tensor
    logits_global: Tensor | None = None
    fused: Tensor | None = None
    gate: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """Mixed probabilities (B, K): p = (1 - g) p_local + g p_global (eq. 15)."""
        local = self.logits_local.float().softmax(dim=1)
        if self.logits_global is None or self.gate is None:
            return local
        return torch.lerp(local, self.logits_global.float().softmax(dim=1), self.gate.float()[:, None])


def _head(n_in: int, config: NuClassConfig) -> nn.Sequential:
    drop = config.head_dropout
    first, second = nn.Linear(n_in, config.head_width), nn.Linear(config.head_width, config.num_classes)
    return nn.Sequential(nn.Dropout(drop), first, nn.SiLU(), nn.Dropout(drop), second)


def _projection(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(n_in), nn.Linear(n_in, n_out))


class OrganFilm(nn.Module):
    """Organ embedding to scale and shift of D features (eq. 2); begins as no change."""

    def __init__(self, n_in: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_in, hidden), nn.SiLU(), nn.Linear(hidden, 2 * dim))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        gamma, beta = self.net(embedding).chunk(2, dim=-1)
        return gamma, beta


class PathLocal(nn.Module):
    """Backbone, LayerNorm, organ FiLM, head (section 3.1)."""

    def __init__(self, config: NuClassConfig) -> None:
        super().__init__()
        self.pool = config.local.resolved_pool
        self.uni_encoder = create_backbone(config.local.name, config.local.args, config.local.pool)
        dim = width_of(self.uni_encoder)
        self.feat_norm = nn.LayerNorm(dim)
        self.unknown_row = config.num_organs if config.learned_unknown else None
        if config.organ_rows:
            self.tissue_embedder = nn.Embedding(config.organ_rows, config.organ_width)
            self.tissue_film = OrganFilm(config.organ_width, config.film_width, dim)
        self.head = _head(dim, config)

    def encode(self, x: Tensor) -> Tensor:
        """Return the backbone's vector (B, D) of crops `x` (B, 3, h, w)."""
        return features(self.uni_encoder, x, self.pool)

    def modulate(self, raw: Tensor, organ: Tensor) -> Tensor:
        """Return LN(raw) * (1 + gamma) + beta (eq. 3); an organ of -1 takes the learned row, or modulates nothing."""
        normed = self.feat_norm(raw)
        if not hasattr(self, "tissue_film"):
            return normed
        known = organ >= 0
        unknown_row = 0 if self.unknown_row is None else self.unknown_row
        gamma, beta = self.tissue_film(self.tissue_embedder(torch.where(known, organ, unknown_row)))
        if self.unknown_row is None:
            gamma, beta = gamma * known[:, None], beta * known[:, None]
        return normed * (1 + gamma) + beta

    def classify(self, raw: Tensor, organ: Tensor) -> LocalOut:
        """Return the path's answer from the backbone's vectors `raw` (B, D), which may have been stored."""
        modulated = self.modulate(raw, organ)
        return LocalOut(modulated, self.head(modulated), raw)

    def forward(self, x: Tensor, organ: Tensor) -> LocalOut:
        return self.classify(self.encode(x), organ)


class PathGlobal(nn.Module):
    """Crop and context side by side (section 3.2); with `share_backbone` the crop's vector comes from outside."""

    def __init__(self, config: NuClassConfig, context: BackboneConfig, crop_width: int) -> None:
        super().__init__()
        self.pool, self.context_pool = config.local.resolved_pool, context.resolved_pool
        if config.share_backbone:
            self.uni_encoder = None
        else:
            self.uni_encoder = create_backbone(config.local.name, config.local.args, config.local.pool)
        self.proj_uni = _projection(crop_width, config.proj_width)
        self.dino_model = create_backbone(context.name, context.args, context.pool)
        self.proj_ctx = _projection(width_of(self.dino_model), config.proj_width)
        self.head = _head(2 * config.proj_width, config)
        if config.local_aware_gate:
            self.gate_mlp = nn.Sequential(
                nn.Linear(2 * config.proj_width + 1, 256), nn.SiLU(), nn.Linear(256, 1), nn.Sigmoid()
            )

    def context_vector(self, context: Tensor) -> Tensor:
        """Return v (B, Dc) of contexts (B, 3, H, W) (eq. 6)."""
        return features(self.dino_model, context, self.context_pool)

    def fuse(self, u: Tensor, v: Tensor, context_scale: Tensor | float = 1.0) -> GlobalOut:
        """Return the path's answer from u (B, D) and v (B, Dc) (eqs 9, 10).

        context_scale  factor of the projected context, one for all or (B,): the warm-up's alpha, 0 for a dropped one.
        """
        wide = self.proj_ctx(v)
        if isinstance(context_scale, Tensor):
            context_scale = context_scale.to(wide.dtype).reshape(-1, 1)
        fused = torch.cat([self.proj_uni(u), wide * context_scale], dim=1)
        return GlobalOut(fused, self.head(fused))


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters of one part at one depth: 0 next to the part's output, growing towards its input."""

    part: Part
    depth: int
    parameters: tuple[nn.Parameter, ...]


class NuClass(nn.Module):
    """Both paths and the fusion gate, or what of them `config` asks for."""

    def __init__(self, config: NuClassConfig | None = None) -> None:
        super().__init__()
        self.config = config or NuClassConfig()
        self.modelA = PathLocal(self.config)
        crop_width = width_of(self.modelA.uni_encoder)
        context = self.config.context
        self.modelB = None if context is None else PathGlobal(self.config, context, crop_width)
        self._has_gate = self.modelB is not None and self.config.gate
        if self._has_gate:
            self._add_gate(crop_width)

    def _add_gate(self, crop_width: int) -> None:
        config, drop = self.config, self.config.gate_dropout
        width, (first, second) = config.gate_width, config.gate_hidden
        self.gate_proj_A = nn.Sequential(*_projection(crop_width, width), nn.SiLU(), nn.Dropout(drop))
        self.gate_proj_B = nn.Sequential(*_projection(2 * config.proj_width, width), nn.SiLU(), nn.Dropout(drop))
        self.gate_mlp = nn.Sequential(
            nn.Linear(2 * width + N_STATISTICS, first), nn.SiLU(), nn.Dropout(drop),
            nn.Linear(first, second), nn.SiLU(), nn.Dropout(drop),
            nn.Linear(second, 1),
        )  # fmt: skip

    @property
    def has_global(self) -> bool:
        """Whether there is a global path."""
        return self.modelB is not None

    @property
    def has_gate(self) -> bool:
        """Whether there is a fusion gate; a global path without one decides alone."""
        return self._has_gate

    @property
    def shares_backbone(self) -> bool:
        """Whether one pass of the local backbone serves both paths."""
        return self.modelB is not None and self.modelB.uni_encoder is None

    @property
    def local_backbone(self) -> nn.Module:
        """Backbone that the local path reads the crop with."""
        return self.modelA.uni_encoder

    @property
    def global_backbone(self) -> nn.Module:
        """Backbone that the global path reads the crop with."""
        return self.modelA.uni_encoder if self.shares_backbone else self._global.uni_encoder

    @property
    def context_backbone(self) -> nn.Module:
        """Backbone that reads the context."""
        return self._global.dino_model

    @property
    def context_patch_px(self) -> int:
        """Edge of a context patch in the context's input pixels; 1 where any size goes."""
        return patch_px(self.context_backbone) if self.has_global else 1

    @property
    def _global(self) -> PathGlobal:
        if self.modelB is None:
            raise UsageError("these weights hold the local path only: use --paths local")
        return self.modelB

    def share_equal_backbones(self) -> None:
        """Drop the global path's crop backbone where it equals the local one, weight for weight: results stay."""
        own = None if self.modelB is None else self.modelB.uni_encoder
        if own is None:
            return
        theirs = self.modelA.uni_encoder.state_dict()
        if all(torch.equal(tensor, theirs[name]) for name, tensor in own.state_dict().items()):
            self._global.uni_encoder = None
            self.config = replace(self.config, share_backbone=True)

    def local_path(self, local: Tensor, organ: Tensor) -> LocalOut:
        """Return the local path's answer for crops (B, 3, h, w), normalised, and organs int64 (B,), -1 for unknown."""
        return self.modelA(local, organ)

    def context_vector(self, context: Tensor) -> Tensor:
        """Return v (B, Dc) of contexts (B, 3, H, W), normalised; raises UsageError without a global path."""
        return self._global.context_vector(context)

    def crop_vector(self, local: Tensor) -> Tensor:
        """Return u (B, D), the global path's own vector of the crops (eq. 5)."""
        own = self._global
        return self.modelA.encode(local) if own.uni_encoder is None else features(own.uni_encoder, local, own.pool)

    def global_path(
        self, local: Tensor | None, v: Tensor, u: Tensor | None = None, context_scale: Tensor | float = 1.0
    ) -> GlobalOut:
        """Return the global path's answer for crops and their context vectors `v` (B, Dc).

        u              the crops' vectors where they are known: those of the local path if `shares_backbone`.
        context_scale  see `PathGlobal.fuse`.
        """
        if u is None:
            if local is None:
                raise ValueError("global_path needs the crops or their vectors u")
            u = self.crop_vector(local)
        return self._global.fuse(u, v, context_scale)

    def gate_inputs(self, local_features: Tensor, fused: Tensor, logits_local: Tensor, logits_global: Tensor) -> Tensor:
        """Return what the gate's MLP reads (B, 2 * gate_width + 8): projections and statistics (eqs 16, 17)."""
        statistics = gate_statistics(logits_local.float().softmax(dim=1), logits_global.float().softmax(dim=1))
        first, second = self.gate_proj_A(local_features), self.gate_proj_B(fused)
        return torch.cat([first, second, statistics.to(first.dtype)], dim=1)

    def gate_logit(self, local_features: Tensor, fused: Tensor, logits_local: Tensor, logits_global: Tensor) -> Tensor:
        """Return the gate before its sigmoid (B,)."""
        return self.gate_mlp(self.gate_inputs(local_features, fused, logits_local, logits_global))[:, 0]

    def gate(self, local_features: Tensor, fused: Tensor, logits_local: Tensor, logits_global: Tensor) -> Tensor:
        """Return g (B,), 0..1, the weight of the global path (eq. 18); all 1 for weights without a gate."""
        if not self.has_gate:
            return torch.ones_like(logits_global[:, 0])
        return self.gate_logit(local_features, fused, logits_local, logits_global).sigmoid()

    def forward(self, local: Tensor, context: Tensor | None, organ: Tensor) -> NuClassOutput:
        first = self.local_path(local, organ)
        if not self.has_global or context is None:
            return NuClassOutput(first.logits, first.features)
        u = first.raw if self.shares_backbone else None
        second = self.global_path(local, self.context_vector(context), u)
        gate = self.gate(first.features, second.fused, first.logits, second.logits)
        return NuClassOutput(first.logits, first.features, second.logits, second.fused, gate)

    def parts(self) -> Iterator[tuple[Part, nn.Module]]:
        """Yield the parts that are trained or frozen as one, each once; heads include norms, FiLM and projections."""
        yield "local_backbone", self.modelA.uni_encoder
        yield "local_head", _rest(self.modelA, ("uni_encoder",))
        if self.modelB is not None:
            if self.modelB.uni_encoder is not None:
                yield "global_backbone", self.modelB.uni_encoder
            yield "context_backbone", self.modelB.dino_model
            yield "global_head", _rest(self.modelB, ("uni_encoder", "dino_model"))
        if self.has_gate:
            yield "gate", nn.ModuleList([self.gate_proj_A, self.gate_proj_B, self.gate_mlp])

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return all parameters by part and depth, for freezing and for layer-wise decay (rate * decay ** depth).

        A backbone's depths are its blocks, as timm groups them; all else is depth 0. Every parameter is in one group.
        """
        groups = []
        for part, module in self.parts():
            found: dict[int, list[nn.Parameter]] = {}
            depth = depths(module) if part.endswith("_backbone") else {}
            for name, parameter in module.named_parameters():
                found.setdefault(depth.get(name, 0), []).append(parameter)
            groups += [ParameterGroup(part, d, tuple(found[d])) for d in sorted(found)]
        return groups


def _rest(module: nn.Module, without: tuple[str, ...]) -> nn.ModuleList:
    return nn.ModuleList([child for name, child in module.named_children() if name not in without])


def gate_statistics(local: Tensor, global_: Tensor) -> Tensor:
    """Return the eight statistics (B, 8) of two rows of probabilities (B, K) (eq. 17).

    Largest probability of each, entropy of each over log K, margin of each between its first two, then the difference
    of the largest (global - local) and its size.
    """
    top_local, top_global = local.topk(2, dim=1).values, global_.topk(2, dim=1).values
    rho = top_global[:, 0] - top_local[:, 0]
    return torch.stack(
        [
            top_local[:, 0],
            top_global[:, 0],
            _entropy(local),
            _entropy(global_),
            top_local[:, 0] - top_local[:, 1],
            top_global[:, 0] - top_global[:, 1],
            rho,
            rho.abs(),
        ],
        dim=1,
    )


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(_TINY).log()).sum(dim=1) / math.log(p.shape[1])


def build(config: Mapping[str, Any]) -> NuClass:
    """Build a NuClass, `config` as `NuClassConfig.of` reads it; raises TypeError or ValueError."""
    return NuClass(NuClassConfig.of(config))
