"""Deformable attention and position resampling against the published forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cellslide.geometry import kernels
from cellslide.models import layers
from tests.support.parity import fill, load_fixture, max_error


@pytest.fixture(scope="module")
def arrays(shared: Path) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in load_fixture(shared, "msdeform_and_posembed")[1].items()}


def _shapes(table: torch.Tensor) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in table]


def test_deformable_sampling_equals_the_published_core(arrays: dict[str, torch.Tensor]) -> None:
    out = layers.sample_deformable(
        arrays["core_value"], _shapes(arrays["core_shapes"]), arrays["core_loc"], arrays["core_attn"]
    )
    assert max_error(out, arrays["core_out"].numpy()) < 1e-6


def test_queries_are_sampled_alike_in_chunks(arrays: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    args = (arrays["core_value"], _shapes(arrays["core_shapes"]), arrays["core_loc"], arrays["core_attn"])
    whole = layers.sample_deformable(*args)
    monkeypatch.setattr(layers, "QUERY_CHUNK", 5)
    assert torch.equal(layers.sample_deformable(*args), whole)


class _Named(torch.nn.Module):
    """Holds the attention under the name that its weights are derived from."""

    def __init__(self, n_levels: int) -> None:
        super().__init__()
        self.attn = layers.MSDeformAttn(64, n_levels, 8, 4, 0.5)


@pytest.mark.parametrize(("kind", "n_levels"), [("inj", 3), ("ext", 1)])
def test_attention_module_equals_the_published_one(arrays: dict[str, torch.Tensor], kind: str, n_levels: int) -> None:
    attn = fill(_Named(n_levels)).attn
    out = attn(
        arrays[f"{kind}_query"],
        arrays[f"ref_points_{kind}"],
        arrays[f"{kind}_value"],
        _shapes(arrays[f"shapes_{kind}"]),
    )
    assert max_error(out, arrays[f"{kind}_out"].numpy()) < 1e-6


def test_reference_points_are_pixel_centres_in_xy_order(arrays: dict[str, torch.Tensor]) -> None:
    image = (96, 160)
    grids = [(image[0] // s, image[1] // s) for s in (4, 8, 16)]
    for kind, shapes in (("inj", grids[-1:]), ("ext", grids)):
        got = layers.reference_points(shapes, torch.device("cpu"), torch.float32)
        assert max_error(got, arrays[f"ref_points_{kind}"].numpy()) < 1e-7


@pytest.mark.parametrize("grid", [(16, 16), (12, 20), (64, 64), (14, 14)])
def test_positions_are_resampled_as_timm_does(arrays: dict[str, torch.Tensor], grid: tuple[int, int]) -> None:
    out = layers.resample_abs_pos_embed(arrays["pos_in"], grid)
    assert max_error(out, arrays[f"pos_{grid[0]}x{grid[1]}"].numpy()) < 1e-6


def test_drop_path_keeps_the_mean_and_is_off_in_eval() -> None:
    drop = layers.DropPath(0.25)
    x = torch.ones(20_000, 1)
    torch.manual_seed(0)
    assert abs(drop(x).mean().item() - 1) < 0.02
    assert torch.equal(drop.eval()(x), x)


def test_value_width_must_suit_the_heads() -> None:
    with pytest.raises(ValueError, match="not divisible by 8 heads"):
        layers.MSDeformAttn(100, 1, 8, 4, 0.5)


def test_the_compiled_loop_samples_as_torch_does(
    arrays: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels.available():
        pytest.skip("no compiled kernels here")
    value, shapes = arrays["core_value"], _shapes(arrays["core_shapes"])
    # Far outside as well, where a place must count for nothing.
    places = (arrays["core_loc"] - 0.5) * 3 + 0.5
    places[0, 0, 0, 0, 0] = torch.tensor([1e30, -1e30])
    args = (value, shapes, places, arrays["core_attn"])
    with torch.no_grad():
        for threads in (1, 2, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            compiled = layers.sample_deformable(*args)
            assert max_error(layers.sample_deformable(*args), compiled.numpy()) == 0
        monkeypatch.setattr(kernels, "available", lambda: False)
        plain = layers.sample_deformable(*args)
    assert 0 < max_error(compiled, plain.numpy()) < 2e-6  # another order of sums, so another form did it


def test_sampling_is_bilinear_with_zeros_outside() -> None:
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 4, 1, 1)
    places = torch.tensor([[0.25, 0.25], [0.5, 0.5], [5.0, 5.0]]).reshape(1, 3, 1, 1, 1, 2)
    out = layers.sample_deformable(value, [(2, 2)], places, torch.ones(1, 3, 1, 1, 1))
    assert np.allclose(out.flatten().numpy(), [1.0, 2.5, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_softmax_of_few_is_the_softmax_in_float32_at_least(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 3, 5).to(dtype)
    found = layers.softmax_of_few(x)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, x.to(found.dtype).softmax(-1), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("images", "own"), [(1, 1), (2, 1), (2, 3)])
def test_places_lie_as_far_from_their_reference_as_the_level_says(images: int, own: int) -> None:
    shapes = [(2, 4), (8, 16), (10, 5)]
    reference, offsets = torch.rand(images, 6, 1, own, 1, 2), torch.randn(2, 6, 4, 3, 2, 2)
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)
    assert torch.equal(layers.places_around(reference, offsets, shapes), reference + offsets / size[:, None])
    narrow = layers.places_around(reference, offsets.bfloat16(), shapes)
    assert narrow.dtype == torch.float32  # half precision cannot tell neighbouring pixels apart


def test_the_loop_is_ready_after_it_was_prepared() -> None:
    if not kernels.available():
        pytest.skip("no compiled kernels here")
    from cellslide.models.deform_kernels import sample

    layers.prepare()
    assert sample.signatures
