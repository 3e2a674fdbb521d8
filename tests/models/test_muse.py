"""The MUSE backbone: parity with the published one, and inputs that the published one cannot take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cellslide.models.muse import MuseConfig, positions, resample_positions, resize, sample_points
from tests.support.parity import load_fixture, max_error, shapes_of
from tests.support.published_muse import TINY_CONV, TINY_VIT, build, fixture_input

ATOL = 2e-5


@pytest.mark.parametrize(
    ("fixture", "arch", "encoder"),
    [
        ("muse_vit_tiny", "muse", "vit_tiny"),
        ("muse_vit_base", "muse_vit_b", "vit_base"),
        ("muse_resnet50", "muse_r50", "resnet50"),
    ],
)
@torch.no_grad()
def test_published_backbone_gives_the_published_numbers(shared: Path, fixture: str, arch: str, encoder: str) -> None:
    about, want = load_fixture(shared, fixture)
    muse = build(arch, {"encoder": encoder} if arch == "muse" else {})
    assert shapes_of(muse) == {name: tuple(shape) for name, shape in about["state_dict"].items()}
    assert sum(p.numel() for p in muse.parameters()) == about["n_params"]
    found = muse(fixture_input())
    nuclei = muse.nucleus_features(found.map, torch.from_numpy(want["coords_xy"])[None])[0]
    assert max_error(nuclei, want["nucleus_features"]) < ATOL
    assert max_error(found.map.mean((2, 3)), want["feature_map_channel_mean"]) < ATOL
    assert max_error(found.image, want["cls_token" if "cls_token" in want else "e5_channel_mean"]) < ATOL
    if "feature_map" in want:
        assert max_error(found.map, want["feature_map"]) < ATOL


@pytest.mark.parametrize("size_px", [224, 512])
def test_positions_are_resampled_as_every_load_does(shared: Path, size_px: int) -> None:
    _, want = load_fixture(shared, "muse_pos_embed_resize")
    table = torch.from_numpy(want["pos_embed_in"])
    grid = (size_px // 16, size_px // 16)
    assert max_error(resample_positions(table, grid), want[f"pos_embed_out_{size_px}"]) < 1e-6
    # A forward pass at the native size takes them as they are, which is not the same.
    assert positions(table, (14, 14)) is table
    assert max_error(resample_positions(table, (14, 14)), want["pos_embed_in"]) > 1e-3


@pytest.mark.parametrize("config", [TINY_VIT, TINY_CONV, {"encoder": "resnet10t"}], ids=["vit", "widths", "conv"])
@pytest.mark.parametrize("size", [(64, 160), (96, 96), (208, 208), (32, 32)])
@torch.no_grad()
def test_any_size_gives_a_map_at_stride_4(config: dict[str, object], size: tuple[int, int]) -> None:
    muse = build("muse", config)
    found = muse(fixture_input(*size))
    assert found.map.shape == (1, muse.dim, size[0] // 4, size[1] // 4)
    assert found.image.shape == (1, muse.image_dim)
    assert found.map.isfinite().all()


@torch.no_grad()
def test_rows_are_not_taken_for_columns() -> None:
    # Only a network whose positions follow the picture gives the turned map of a turned picture.
    muse = build("muse", TINY_CONV)
    for conv in (m for m in muse.modules() if isinstance(m, torch.nn.Conv2d)):
        conv.weight.copy_((conv.weight + conv.weight.transpose(2, 3)) / 2)
    x = fixture_input(64, 160)
    assert torch.allclose(muse(x).map.transpose(2, 3), muse(x.transpose(2, 3)).map, atol=1e-4)


def test_an_edge_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="100x64 px: edges must be multiples of 16"):
        build("muse", TINY_VIT)(fixture_input(64, 100))


def test_points_are_read_where_they_lie() -> None:
    # A map that holds its own coordinates: corners are aligned, so 0 is the first pixel's centre and W the last one's.
    ys, xs = torch.meshgrid(torch.linspace(0, 1, 8), torch.linspace(0, 1, 16), indexing="ij")
    points = torch.tensor([[[0.0, 0.0], [64.0, 32.0], [16.0, 24.0]]])
    read = sample_points(torch.stack([xs, ys])[None], points, 4)
    assert torch.allclose(read, points / torch.tensor([64.0, 32.0]), atol=1e-6)
    assert not sample_points(torch.ones(1, 1, 8, 8), torch.tensor([[[-9.0, 5.0]]]), 4).any()


def test_places_are_kept_in_half_precision() -> None:
    # Along a row of 256 pixels bfloat16 places differ by up to 4 of 1024 input pixels.
    row = torch.zeros(1, 1, 8, 256)
    row[..., 200:] = 1
    points = torch.tensor([[[803.0, 16.0], [795.0, 16.0]]])
    exact = sample_points(row, points, 4)
    assert torch.equal(sample_points(row.bfloat16(), points, 4), exact.bfloat16())


def test_a_map_that_fits_is_not_touched() -> None:
    x = torch.zeros(1, 1, 3, 5)
    assert resize(x, (3, 5)) is x
    assert resize(x, (6, 10)).shape == (1, 1, 6, 10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"encoder": {"name": "vit", "depth": 2}}, "counted 0 to 1"),
        ({"encoder": {"name": "vit", "heads": 7}}, "heads 7"),
        ({"encoder": "resnet18", "widths": [8, 16]}, "four numbers"),
    ],
)
def test_impossible_sizes_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuseConfig.of(config)


def test_an_encoder_without_the_strides_is_refused() -> None:
    from cellslide.errors import WeightsError
    from cellslide.models import build_model

    with pytest.raises(WeightsError, match="no maps at strides 4, 8, 16 and 32"):
        build_model("muse", {"encoder": "vit_tiny_patch16_224"})


@pytest.mark.parametrize("config", [TINY_VIT, TINY_CONV, {"encoder": "vit_base"}, {"encoder": "resnet50"}])
def test_sizes_survive_plain_values(config: dict[str, object]) -> None:
    once = MuseConfig.of(config)
    assert MuseConfig.of(once.as_dict()) == once
