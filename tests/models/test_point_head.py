"""The point head, the detector on a MUSE backbone, and the published DPA-P2PNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellslide.errors import WeightsError
from cellslide.models import architecture_of, build_model
from cellslide.models.point_head import MusePointsConfig, PointHead, PointOutput, found_points, proposals
from cellslide.nuclei.nms import point_nms
from tests.support.parity import load_fixture, max_error, shapes_of
from tests.support.published_muse import TINY_CONV, TINY_HEAD, TINY_VIT, build, fixture_input


@pytest.fixture(scope="module")
def published() -> Any:
    return build("dpa_p2pnet", {"encoder": "convnext_atto"})


@torch.no_grad()
def test_published_detector_gives_the_published_numbers(shared: Path, published: Any) -> None:
    about, want = load_fixture(shared, "dpa_p2pnet_convnext_atto")
    assert shapes_of(published) == {name: tuple(shape) for name, shape in about["state_dict"].items()}
    x = fixture_input()
    maps, fine = published.backbone(x)
    for i, level in enumerate(maps):
        assert max_error(level.mean((2, 3)), want[f"fpn_l{i}_channel_mean"]) < 2e-5
    assert max_error(fine.mean((2, 3)), want["mask_fpn_channel_mean"]) < 2e-5
    raw = published.raw(x)
    assert max_error(raw.points, want["pred_coords"]) < 1e-4
    assert max_error(raw.logits, want["pred_logits"]) < 5e-5
    assert max_error(raw.mask[:, :, ::2, ::2], want["pred_masks_every2px"]) < 5e-5


@torch.no_grad()
def test_published_rule_keeps_the_published_points(shared: Path, published: Any) -> None:
    _, want = load_fixture(shared, "dpa_p2pnet_convnext_atto")
    found = {name: value[0].numpy() for name, value in published(fixture_input()).items()}
    used = found["scores"] > 0
    assert max_error(torch.from_numpy(found["scores"][used]), want["predict_scores_no_nms"]) < 2e-5
    assert np.array_equal(found["class_prob"][used].argmax(1), want["predict_classes_no_nms"])
    kept = point_nms(found["points"][used], found["scores"][used], 12)
    assert max_error(torch.from_numpy(found["points"][used][kept]), want["predict_points_nms12"]) < 1e-4


def test_proposals_are_the_published_grid(shared: Path) -> None:
    _, want = load_fixture(shared, "dpa_p2pnet_convnext_atto")
    grid = proposals((256, 256), 8, torch.device("cpu"))
    assert np.array_equal(grid.flatten(0, 1).numpy(), want["proposals_xy"])


def test_proposals_of_a_picture_that_is_not_square() -> None:
    grid = proposals((32, 96), 8, torch.device("cpu"))
    assert grid.shape == (4, 12, 2)
    assert grid[0, 0].tolist() == [4, 4]
    assert grid[-1, -1].tolist() == [92, 28]


@torch.no_grad()
def test_untrained_points_follow_the_regression_alone() -> None:
    head = PointHead(8, 2, 16, 4).eval()
    last: Any = head.reg_head.layers[-1]
    last.weight.zero_()
    last.bias.copy_(torch.tensor([1.5, -0.5]))
    out = head(torch.randn(2, 8, 8, 24), (32, 96))
    grid = proposals((32, 96), 4, torch.device("cpu")).flatten(0, 1)
    assert torch.allclose(out.points, (grid + torch.tensor([1.5, -0.5])).expand(2, -1, -1))
    assert out.logits.shape == (2, 8 * 24, 3)
    assert out.mask is None


def test_background_is_the_last_class_and_scores_nothing() -> None:
    logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 0.0, 0.1], [0.0, 3.0, 0.0]]])
    points = torch.tensor([[[-1.0, 5.0], [1.0, 1.0], [40.0, 90.0]]])
    found = found_points(PointOutput(points, logits), (64, 32))
    prob = logits.softmax(-1)[0]
    assert found["scores"][0].tolist() == pytest.approx([1 - prob[0, 2].item(), 0, 1 - prob[2, 2].item()])
    assert found["class_prob"].sum(-1)[0].tolist() == pytest.approx([1, 1, 1])
    assert found["class_prob"][0, 0, 0].item() == pytest.approx(prob[0, 0].item() / (1 - prob[0, 2].item()))
    # Clipped to the pixels of a picture of 64 rows and 32 columns.
    assert found["points"][0].tolist() == [[0, 5], [1, 1], [31, 63]]
    of_class = found_points(PointOutput(points, logits), (64, 32), score="class")
    assert of_class["scores"][0].tolist() == pytest.approx([prob[0, 0].item(), 0, prob[2, 1].item()])


@torch.no_grad()
def test_a_nucleus_of_doubtful_class_is_found_where_all_are_kept() -> None:
    doubtful = PointOutput(torch.ones(1, 1, 2), torch.tensor([[[0.3, 0.3, 0.4]]]).log())
    assert found_points(doubtful, (8, 8))["scores"].item() == 0
    assert found_points(doubtful, (8, 8), keep="all")["scores"].item() == pytest.approx(0.6)
    model = build("muse_points", {**TINY_CONV, "head": {**TINY_HEAD, "keep": "all"}})
    assert (model(fixture_input(32, 32))["scores"] > 0).all()


@pytest.mark.parametrize("config", [TINY_VIT, TINY_CONV], ids=["vit", "conv"])
@torch.no_grad()
def test_detector_gives_what_the_engine_reads(config: dict[str, object]) -> None:
    model = build("muse_points", {**config, "head": {**TINY_HEAD, "embedding": True}})
    found = model(fixture_input(64, 96))
    n = 16 * 24
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes == {
        "points": (1, n, 2), "scores": (1, n), "class_prob": (1, n, 3), "embedding": (1, n, model.embedding_dim),
    }  # fmt: skip
    assert architecture_of("muse_points").kind == "point"
    assert (model.n_types, model.embedding_dim) == (3, model.backbone.dim)
    features = model.backbone(fixture_input(64, 96)).map
    assert torch.equal(found["embedding"], model.backbone.nucleus_features(features, found["points"]))


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch() -> None:
    model = build("muse_points", {**TINY_CONV, "head": TINY_HEAD})
    x = torch.cat([fixture_input(64, 64), fixture_input(64, 64).flip(3)])
    together, alone = model(x), model(x[1:])
    for name, value in alone.items():
        assert torch.allclose(together[name][1:], value, atol=1e-5)


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model: Any = build_model("muse_points", {**TINY_CONV, "head": {**TINY_HEAD, "aux_mask": True}}).train()
    out = model.raw(torch.randn(2, 3, 64, 64))
    assert out.mask.shape == (2, 1, 16, 16)
    ((out.points**2).mean() + out.logits.square().mean() + out.mask.square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_sizes_survive_plain_values() -> None:
    config = MusePointsConfig.of({**TINY_VIT, "head": TINY_HEAD})
    assert MusePointsConfig.of(config.as_dict()) == config
    assert config.head.space_px == 4


@pytest.mark.parametrize("head", [{"n_classes": 0}, {"space_px": 0}, {"colour": 1}, {"keep": "some"}])
def test_impossible_heads_are_refused(head: dict[str, object]) -> None:
    with pytest.raises(WeightsError, match=next(iter(head))):
        build_model("muse_points", {**TINY_CONV, "head": head})


@pytest.mark.parametrize(("aligned", "alike"), [("pixels", True), ("corners", False)])
def test_points_by_pixels_do_not_depend_on_the_size_of_the_tile(aligned: str, alike: bool) -> None:
    torch.manual_seed(0)
    config = {"encoder": "tf_efficientnet_lite0", "widths": [8, 8, 8, 8], "head": {"hidden": 16}, "aligned": aligned}
    model: Any = build_model("muse_points", config).eval()
    for parameter in model.head.deform_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # untrained, proposals would stay where they are
    strides, channels = (4, 8, 16, 32), (24, 40, 112, 320)
    maps = [torch.randn(1, c, 1024 // stride, 1024 // stride) for c, stride in zip(channels, strides, strict=True)]
    cut = [m[..., 128 // s : 896 // s, 128 // s : 896 // s] for m, s in zip(maps, strides, strict=True)]
    with torch.inference_mode():
        whole, part = (
            model.head.regress((model.backbone.decoder(levels, (size, size)),), (size, size))
            for levels, size in ((maps, 1024), (cut, 768))
        )
    rows = torch.arange(128 * 128).reshape(128, 128)[60:68, 60:68].flatten()
    same = torch.arange(96 * 96).reshape(96, 96)[44:52, 44:52].flatten()
    assert torch.allclose(whole[0][0, rows], part[0][0, same] + 128, atol=1e-3) is alike
    assert torch.allclose(whole[1][0, rows], part[1][0, same], atol=1e-4) is alike
