"""The fusion networks against the published ones, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellslide.errors import WeightsError
from cellslide.models import build_model
from cellslide.models.morpho_fusion import MorphoFusion, match_norms
from tests.support.parity import fill, load_fixture

ATOL = 2e-5
NAME = "early_fusion_vit_small_224"
TINY = {"vit": "vit_tiny_patch16_224", "vit_args": {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}}
VARIANTS = (
    "early_add", "early_concat", "late_add_token", "late_concat_token", "late_add_tile", "late_concat_tile",
    "morph_only", "expr_only_token", "expr_only_tile",
)  # fmt: skip


def _genes(n: int) -> list[str]:
    return [f"G{k}" for k in range(n)]


def _published_input(config: dict[str, Any]) -> tuple[torch.Tensor, np.ndarray]:
    b, n, s, g = (config[k] for k in ("batch", "tokens", "img_size", "genes_in"))
    image = (np.random.default_rng(0).random((b, 3, s, s), np.float32) - 0.5) / 0.5
    counts = np.random.default_rng(1).poisson(np.random.default_rng(2).gamma(0.3, 1.0, (b, n, g))).astype(np.float64)
    counts[0, ::7] = 0
    return torch.from_numpy(image.astype(np.float32)), counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_numbers(shared: Path, variant: str) -> None:
    described, arrays = load_fixture(shared, NAME)
    config = described["config"]
    image, counts = _published_input(config)
    assert np.array_equal(counts.sum((1, 2)), arrays["counts_sum"])
    sizes = {"genes_in": _genes(config["genes_in"]), "genes_out": _genes(config["genes_out"])}
    model = fill(build_model("morpho_fusion", {"variant": variant, **sizes}))
    assert isinstance(model, MorphoFusion)
    shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
    assert shapes == described["state_dict"].get(variant, shapes)
    for part, wanted in (("backbone", "backbone_parameters"), ("head", "head_parameters")):
        n = sum(p.numel() for p in model.get_submodule(part).parameters())
        assert n == described["counts"][variant][wanted]
    by_tile = model.config.by_tile
    expression = torch.from_numpy(np.log1p(counts.mean(1) if by_tile else counts).astype(np.float32))
    with torch.inference_mode():
        found = model(image, expression)
    assert np.abs(found.z.numpy() - arrays[f"{variant}_z"]).max() < ATOL
    assert np.abs(found.y.numpy() - arrays[f"{variant}_y"]).max() < ATOL


def test_published_tokens(shared: Path) -> None:
    described, arrays = load_fixture(shared, NAME)
    image, counts = _published_input(described["config"])
    sizes = {"genes_in": _genes(380), "genes_out": _genes(100)}
    model: Any = fill(build_model("morpho_fusion", sizes))
    with torch.inference_mode():
        patches = model.backbone.morph_encoder.patch_embed(image)
        x = torch.from_numpy(np.log1p(counts).astype(np.float32))
        expr = model.backbone.expr_to_morph_proj(model.backbone.expr_encoder(x))
        scaled = match_norms(expr, patches)
        joined = model.backbone(image, x)
    every = torch.cat([joined.z[:, None], joined.patches], dim=1)
    for name, mine, step in (
        ("patch_tokens", patches, 5), ("expr_tokens", expr, 5), ("expr_scaled", scaled, 5),
        ("early_add_tokens", every, 7),
    ):  # fmt: skip
        assert np.abs(mine[:, ::step].numpy() - arrays[name]).max() < ATOL


def test_an_empty_vector_adds_nothing() -> None:
    patches, expr = torch.ones(1, 2, 4), torch.zeros(1, 2, 4)
    expr[0, 1, 0] = 3.0
    scaled = match_norms(expr, patches)
    assert not scaled[0, 0].any()
    assert scaled[0, 1].tolist() == [2.0, 0, 0, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_missing_modality_is_no_zero(variant: str) -> None:
    model: Any = build_model("morpho_fusion", {**TINY, "variant": variant, "genes_in": ["A"], "genes_out": ["B", "C"]})
    x = torch.zeros(2, 1) if model.config.by_tile else torch.zeros(2, 4, 1)
    found = model(torch.zeros(2, 3, 32, 32), x)
    assert found.y.shape == (2, 2)
    if model.config.reads_image:
        with pytest.raises(ValueError, match="an image"):
            model(None, x)
    if model.config.reads_genes:
        with pytest.raises(ValueError, match="transcripts"):
            model(torch.zeros(2, 3, 32, 32), None)


def test_gate_and_token_head() -> None:
    genes = {"genes_in": ["A", "B"], "genes_out": ["C"]}
    gated: Any = build_model("morpho_fusion", {**TINY, **genes, "gate": True, "token_head": True}).eval()
    image, x = torch.randn(1, 3, 32, 32), torch.rand(1, 4, 2)
    first = gated(image, x)
    assert first.token_y.shape == (1, 4, 1)
    assert torch.equal(first.y, gated(image, 2 * x).y), "alpha starts at 0, so expression adds nothing"
    with torch.no_grad():
        gated.backbone.fusion_alpha.fill_(1.0)
    assert not torch.equal(first.y, gated(image, x).y)
    for wrong in ({"variant": "early_concat", "gate": True}, {"variant": "late_add_tile", "token_head": True},
                  {"variant": "both"}, {"genes_out": []}, {"vit": "resnet18"}):  # fmt: skip
        with pytest.raises(WeightsError):
            build_model("morpho_fusion", {**TINY, **genes, **wrong})
