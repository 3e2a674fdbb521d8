"""CellVTA against the published network, number for number, and against its published key list."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cellslide.models.cellvta import CellVTA, CellVTAConfig, enlarged
from tests.support.parity import (
    HEADS_ATOL,
    PYRAMID_ATOL,
    fill,
    load_fixture,
    load_keys,
    max_error,
    recipe_input,
    shapes_of,
)

HEADS = ("nuclei_binary_map", "hv_map", "nuclei_type_map")
SMALL = CellVTAConfig(
    embed_dim=32,
    depth=4,
    num_heads=2,
    interaction_indexes=((0, 0), (1, 1), (2, 2), (3, 3)),
    conv_inplane=8,
    deform_num_heads=2,
    decoder_widths=(4, 8, 12, 16),
    num_nuclei_classes=0,
    num_tissue_classes=0,
    use_pos_embed=False,
    init_values=0.1,
)


def _config(described: dict[str, Any]) -> CellVTAConfig:
    return CellVTAConfig(
        **{k: described[k] for k in ("embed_dim", "depth", "num_heads", "interaction_indexes", "conv_inplane")}
    )


def _stride(full: int, saved: int) -> int:
    return full // saved


@pytest.mark.parametrize("name", ["cellvta_tiny_256", pytest.param("cellvta_uni_full_256", marks=pytest.mark.slow)])
def test_outputs_equal_the_published_ones(shared: Path, name: str) -> None:
    described, arrays = load_fixture(shared, name)
    model = fill(CellVTA(_config(described["config"])))
    image = recipe_input(256, 256)
    with torch.inference_mode():
        out = model(image)
        pyramid, _ = model.encoder(image)
    for head in HEADS:
        step = _stride(256, arrays[head].shape[-1])
        assert max_error(out[head][:, :, ::step, ::step], arrays[head]) < HEADS_ATOL
    assert max_error(out["tissue_types"], arrays["tissue_types"]) < HEADS_ATOL
    for i, level in enumerate(pyramid, start=1):
        step = _stride(level.shape[-1], arrays[f"f{i}"].shape[-1])
        assert max_error(level[:, :, ::step, ::step], arrays[f"f{i}"]) < PYRAMID_ATOL


def test_keys_shapes_and_parameters_are_the_published_ones(shared: Path) -> None:
    with torch.device("meta"):
        model = CellVTA(CellVTAConfig())
    assert shapes_of(model) == load_keys(shared, "cellvta_uni_keys")
    assert sum(p.numel() for p in model.parameters()) == 387_769_437


def test_conic_head_has_the_published_size() -> None:
    with torch.device("meta"):
        model = CellVTA(CellVTAConfig(num_nuclei_classes=7, num_tissue_classes=1))
    assert sum(p.numel() for p in model.parameters()) == 387_751_052


def test_sides_may_differ_and_must_be_multiples_of_16() -> None:
    model = CellVTA(SMALL).eval()
    with torch.inference_mode():
        out = model(torch.zeros(1, 3, 48, 80))
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "nuclei_binary_map": (1, 2, 48, 80),
        "hv_map": (1, 2, 48, 80),
    }
    with pytest.raises(ValueError, match="50 x 48 px"):
        model(torch.zeros(1, 3, 48, 50))


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_maps_are_enlarged_as_torch_does(scale: int) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(enlarged(x, scale), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(enlarged(x, scale), expected)  # where gradients are kept, torch's own


def test_without_positions_a_shifted_image_gives_shifted_maps() -> None:
    """A patch away, the network sees the same picture: only the far border tells it the place within a tile."""
    model = fill(CellVTA(SMALL))
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 256, 256)
    image[..., 96:128, 96:128] = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        here = model(image)["hv_map"]
        there = model(image.roll((16, 32), (2, 3)))["hv_map"]
    inner = slice(80, 160)
    back = there.roll((-16, -32), (2, 3))[..., inner, inner]
    assert torch.allclose(here[..., inner, inner], back, atol=0.1 * back.std().item())


def test_with_a_radius_far_pixels_do_not_reach_the_tokens() -> None:
    near = replace(SMALL, attention_radius=1)
    image = torch.zeros(1, 3, 64, 512)
    other = image.clone()
    other[..., -32:] = torch.randn(3, 64, 32)
    for config, changes in ((near, False), (SMALL, True)):
        encoder = fill(CellVTA(config)).encoder
        with torch.inference_mode():
            before, after = (encoder(x)[0][3][..., 0] for x in (image, other))
        assert torch.equal(before, after) is not changes


def test_gradients_reach_every_parameter() -> None:
    model = CellVTA(SMALL)
    out = model(torch.randn(2, 3, 64, 64))
    sum(v.square().mean() for v in out.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    assert idle == []


@pytest.mark.parametrize("runs", [[[0, 0], [1, 1], [2, 3]], [[0, 0], [1, 1], [2, 2], [2, 3]]])
def test_interaction_runs_must_cover_the_blocks(runs: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="interaction_indexes"):
        CellVTAConfig(embed_dim=32, depth=4, num_heads=2, interaction_indexes=tuple(map(tuple, runs)))
