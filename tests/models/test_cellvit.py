"""CellViT: names, shapes and numbers of the published models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellslide.errors import UsageError, WeightsError
from cellslide.models import architecture_of, build_model
from cellslide.models.cellvit import (
    PUBLISHED,
    CellViT,
    CellViTConfig,
    PackedSwiGLU,
    SamAttention,
    SamEncoder,
    build,
    resample_dino_pos_embed,
)
from cellslide.models.checkpoint import build_empty
from tests.support.parity import HEADS_ATOL, fill, load_fixture, load_keys, max_error, recipe_input, shapes_of

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 2, "extract_layers": (1, 2, 3, 4)}
NARROW: dict[str, Any] = {"decoder_widths": (4, 6, 8, 10), "skip_widths": (8, 6)}
# Parameters as the published models are counted.
N_PARAMS = {
    "cellvit_256": 46_750_349,
    "cellvit_sam_b": 146_094_557,
    "cellvit_sam_l": 367_847_645,
    "cellvit_sam_h": 699_741_149,
    "cellvit_uni": 362_934_749,
    "cellvit_virchow": 693_963_741,
    "cellvit_virchow2": 693_973_981,
}
FIXTURES = {
    "cellvit_256_256": ("cellvit_256", {}, 1),
    "cellvit_sam_tiny_256": (
        "cellvit_sam_b",
        {"embed_dim": 160, "depth": 4, "num_heads": 4, "extract_layers": (1, 2, 3, 4), "global_attn_indexes": (1, 3)},
        1,
    ),
    "cellvit_uni_tiny_256": (
        "cellvit_uni",
        {"embed_dim": 192, "depth": 4, "num_heads": 3, "extract_layers": (1, 2, 3, 4)},
        2,
    ),
}


def tiny(arch: str, **changes: Any) -> CellViT:
    """Return a narrow model of `arch` with weights by the recipe."""
    config = {**TINY, **NARROW, "img_size": 64 if "virchow" not in arch else 56, **changes}
    if "sam" in arch:
        config = {"global_attn_indexes": (1, 3), "window_size": 3, "neck_dim": 16, **config}
    if "virchow" in arch:
        config = {"mlp_hidden": 80, **config}
    model = fill(build(arch, config))
    assert isinstance(model, CellViT)
    return model


@pytest.mark.parametrize("arch", sorted(PUBLISHED))
def test_keys_shapes_and_size_are_published(arch: str, shared: Path) -> None:
    model = build_empty(arch, {})
    assert shapes_of(model) == load_keys(shared, f"{arch}_keys")
    assert sum(p.numel() for p in model.parameters()) == N_PARAMS[arch]


@pytest.mark.parametrize("name", sorted(FIXTURES))
def test_heads_equal_the_published_ones(name: str, shared: Path) -> None:
    arch, config, stride = FIXTURES[name]
    about, arrays = load_fixture(shared, name)
    model = fill(build(arch, config))
    assert isinstance(model, CellViT)
    assert shapes_of(model) == {key: tuple(shape) for key, shape in about["keys"].items()}
    levels: list[torch.Tensor] = []
    for i in model.config.extract_layers:
        model.encoder.blocks[i - 1].register_forward_hook(lambda module, args, out: levels.append(out))
    with torch.inference_mode():
        out = model(recipe_input(256, 256))
    assert max_error(out["tissue_types"], arrays["tissue_types"]) < HEADS_ATOL
    for head in ("nuclei_binary_map", "hv_map", "nuclei_type_map"):
        assert max_error(out[head][..., ::stride, ::stride], arrays[head]) < HEADS_ATOL, head
    for i, level in enumerate(levels, start=1):
        saved = level[:, ::2, ::2] if "sam" in name else level[:, ::4]
        assert max_error(saved, arrays[f"z{i}"]) < 5e-5, f"z{i}"


@pytest.mark.parametrize("arch", sorted(PUBLISHED))
def test_any_size_gives_maps_of_that_size(arch: str) -> None:
    model = tiny(arch, img_size=64 if "virchow" not in arch else 56)
    with torch.inference_mode():
        out = model(recipe_input(48, 64))
    assert {name: tuple(t.shape) for name, t in out.items()} == {
        "nuclei_binary_map": (1, 2, 48, 64),
        "hv_map": (1, 2, 48, 64),
        "nuclei_type_map": (1, 6, 48, 64),
        "tissue_types": (1, 19),
    }


@pytest.mark.parametrize("arch", ["cellvit_256", "cellvit_sam_b", "cellvit_uni"])
def test_rows_and_columns_are_not_swapped(arch: str) -> None:
    """Transposing image and weights must transpose the maps, also where the sides differ."""
    model, turned = tiny(arch), tiny(arch)
    turned.load_state_dict({swapped(name): transposed(name, t) for name, t in model.state_dict().items()})
    x = recipe_input(48, 64)
    with torch.inference_mode():
        want = model(x)["hv_map"]
        got = turned(x.transpose(2, 3))["hv_map"].transpose(2, 3)
    assert want.std() > 1e-3
    assert (got - want).abs().max() < 1e-5


def swapped(name: str) -> str:
    """Return the name under which a model that sees rows as columns holds the weight `name`."""
    axes = {"rel_pos_h": "rel_pos_w", "rel_pos_w": "rel_pos_h"}
    head, _, last = name.rpartition(".")
    return f"{head}.{axes.get(last, last)}"


def transposed(name: str, t: torch.Tensor) -> torch.Tensor:
    """Return the value of a weight in a model that sees rows as columns."""
    if name.endswith("encoder.pos_embed") and t.ndim == 3:
        side = round((t.shape[1] - 1) ** 0.5)
        grid = t[:, 1:].reshape(1, side, side, -1).transpose(1, 2).reshape(1, side * side, -1)
        return torch.cat([t[:, :1], grid], dim=1)
    if name.endswith("encoder.pos_embed"):
        return t.transpose(1, 2)
    return t.transpose(2, 3) if t.ndim == 4 else t


def test_rows_and_columns_of_relative_positions() -> None:
    attention = SamAttention(16, 2, 3)
    fill(attention)
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    want = attention(x)
    attention.rel_pos_w.data, attention.rel_pos_h.data = attention.rel_pos_h.data, attention.rel_pos_w.data
    assert (attention(x.transpose(1, 2)).transpose(1, 2) - want).abs().max() < 1e-6


def test_sam_positions_are_cropped_not_resized() -> None:
    encoder = SamEncoder(CellViTConfig("sam", **{**TINY, "img_size": 64}, global_attn_indexes=(0, 1, 2, 3), neck_dim=8))
    fill(encoder)
    seen: list[torch.Tensor] = []
    encoder.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.zeros(1, 3, 32, 64)
    encoder(image)
    want = encoder.patch_embed(image) + encoder.pos_embed[:, :2, :4]
    assert torch.equal(seen[0], want)


def test_sam_says_what_to_do_beyond_its_positions() -> None:
    with pytest.raises(UsageError, match="--tile-size 64 or less"):
        tiny("cellvit_sam_b")(torch.zeros(1, 3, 64, 80))


def test_sides_must_be_multiples_of_16() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny("cellvit_256")(torch.zeros(1, 3, 64, 72))


@pytest.mark.parametrize(("px", "fitted"), [(256, 252), (1024, 1022), (512, 504)])
def test_virchow_fits_images_to_its_patches(px: int, fitted: int) -> None:
    model = tiny("cellvit_virchow")
    seen: list[torch.Size] = []

    def stop(module: object, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].shape[-2:])
        raise InterruptedError

    model.encoder.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        model(torch.zeros(1, 3, px, px))
    assert seen == [torch.Size((fitted, fitted))]


def test_packed_swiglu_gates_with_the_first_half() -> None:
    mlp = PackedSwiGLU(2, 4)
    with torch.no_grad():
        mlp.fc1.weight.copy_(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))
        mlp.fc1.bias.zero_()
        mlp.fc2.weight.copy_(torch.tensor([[1.0, 0], [0, 1]]))
        mlp.fc2.bias.zero_()
        got = mlp(torch.tensor([[2.0, 3.0]]))
    silu = 2.0 / (1.0 + np.exp(-2.0))
    np.testing.assert_allclose(got.numpy(), [[3 * silu, 3 * silu]], rtol=1e-6)


def test_dino_positions_differ_from_a_plain_resize() -> None:
    table = torch.randn(1, 17, 3, generator=torch.Generator().manual_seed(0))
    assert resample_dino_pos_embed(table, (4, 4)) is table
    grid = table[:, 1:].reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    plain = torch.nn.functional.interpolate(grid, size=(6, 8), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 48, 3)
    got = resample_dino_pos_embed(table, (6, 8))
    assert got.shape == (1, 49, 3)
    assert (got[:, 1:] - plain).abs().max() > 1e-3


def test_regression_loss_adds_two_channels() -> None:
    out = tiny("cellvit_256", regression_loss=True, num_nuclei_classes=0, num_tissue_classes=0)(recipe_input(32, 32))
    assert sorted(out) == ["hv_map", "nuclei_binary_map", "regression_map"]
    assert out["nuclei_binary_map"].shape == out["regression_map"].shape == (1, 2, 32, 32)


@pytest.mark.parametrize("arch", sorted(PUBLISHED))
def test_registry_builds_each(arch: str) -> None:
    published = PUBLISHED[arch]
    model = build_empty(arch.replace("_", "-"), {"num_nuclei_classes": 7})
    assert isinstance(model, CellViT)
    assert model.config.embed_dim == published.embed_dim
    assert model.config.num_nuclei_classes == 7


def test_registry_knows_published_names() -> None:
    assert architecture_of("CellViTVirchow2").name == "cellvit_virchow2"
    # A CellViTSAM is of any size; its tensors decide.
    neck = {"encoder.neck.0.weight": torch.zeros(1), "encoder.pos_embed": torch.zeros(1, 2, 2, 768)}
    assert [architecture_of("CellViTSAM", s).name for s in (None, neck)] == ["cellvit_sam_h", "cellvit_sam_b"]
    with pytest.raises(WeightsError, match=r"'yolo'.*cellvta"):
        build_model("yolo")
    with pytest.raises(WeightsError, match=r"cellvit_256.*colour"):
        build_model("cellvit_256", {"colour": 3})
    with pytest.raises(WeightsError, match="divisible"):
        build_model("CellViT256", {"num_heads": 7})
