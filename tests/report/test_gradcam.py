"""Maps are Grad-CAM, for tokens and feature maps alike, and both paths of a NuClass have them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cellslide.errors import CellslideError
from cellslide.report.explain.gradcam import last_block, watching
from cellslide.report.explain.paths import Explainer
from tests.support.fake_paths import SPEC, ColourNet


def test_map_is_grad_cam_where_it_can_be_computed_by_hand() -> None:
    picture = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    net = ColourNet()
    with watching(net) as seen:
        features = net(picture)
    heat = seen.heat(features[:, 1] - features[:, 0])
    maps = nn.functional.avg_pool2d(1.0 - picture, 4)
    expected = (maps[:, 1] - maps[:, 0]).clamp(min=0)
    torch.testing.assert_close(heat, expected / expected.amax(dim=(1, 2), keepdim=True))


def test_nothing_that_speaks_for_a_class_is_an_empty_map() -> None:
    net = ColourNet()
    with watching(net) as seen:
        features = net(torch.rand(1, 3, 16, 16))
    assert not seen.heat(-features[:, 0]).any()
    with pytest.raises(CellslideError, match="does not depend"):
        seen.heat(0 * features[:, 0])


def test_hooks_are_gone_afterwards() -> None:
    net = ColourNet()
    with watching(net):
        net(torch.rand(1, 3, 8, 8))
    assert not net(torch.rand(1, 3, 8, 8)).requires_grad
    with pytest.raises(CellslideError, match="no last block"), watching(nn.Linear(2, 2)):
        pass


def small_vit(pool: str) -> nn.Module:
    from cellslide.models.backbones import timm

    torch.manual_seed(0)
    net = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=0, global_pool=pool, reg_tokens=2
    )
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_maps_of_tokens_are_those_of_the_formula(pool: str) -> None:
    """The class token reads the patches inside the last block; a mean reads what leaves it."""
    net, weight = small_vit(pool), torch.randn(24, generator=torch.Generator().manual_seed(1))
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    net.set_input_size((32, 48))
    with watching(net) as seen:
        score = net(images) @ weight
    x = net.blocks[:2](net.norm_pre(net._pos_embed(net.patch_embed(images))))
    block = net.blocks[2]
    read = block.norm1(x).requires_grad_()
    given = x + block.drop_path1(block.ls1(block.attn(read)))
    given = given + block.drop_path2(block.ls2(block.mlp(block.norm2(given))))
    again = net.forward_head(net.norm(given)) @ weight
    torch.testing.assert_close(again.detach(), score.detach())
    (slope,) = torch.autograd.grad(again.sum(), read if pool == "token" else given)
    tokens, slope = ((read if pool == "token" else given).detach()[:, 3:], slope[:, 3:])
    expected = (tokens * slope.mean(dim=1, keepdim=True)).sum(dim=2).clamp(min=0).reshape(2, 4, 6)
    expected = expected / expected.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(seen.heat(score), expected)
    assert expected.any()


SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "args", "pool", "cells"),
    [
        ("resnet10t", {}, "avg", 2),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, "avg", 2),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1)}, "avg", 2),
        ("uni2_h", {**SMALL, "img_size": 56}, "cls", 5),
        ("dinov3_vitl16", SMALL, "cls", 4),
        ("dinov3_vitl16", SMALL, "mean", 4),
    ],
)
def test_every_kind_of_backbone_has_a_last_block(name: str, args: dict[str, Any], pool: Any, cells: int) -> None:
    from cellslide.models.backbones import create_backbone, features

    size = 70 if name == "uni2_h" else 64
    torch.manual_seed(0)
    net = create_backbone(name, args, pool).eval().requires_grad_(False)
    with watching(net) as seen:
        out = features(net, torch.rand(3, 3, size, size), pool)
    heat = seen.heat(out @ torch.randn(out.shape[1]))
    assert heat.shape == (3, cells, cells)
    assert last_block(net) is not net
    # Maps of pictures that differ differ, and do not look at their neighbours in the batch.
    assert not torch.equal(heat[0], heat[1])


@pytest.mark.parametrize("share", [False, True])
def test_nuclass_says_what_it_says_and_shows_where(share: bool) -> None:
    from cellslide.models.nuclass import NuClass, NuClassConfig

    sizes = {
        "num_classes": 3,
        "num_organs": 2,
        "head_width": 16,
        "proj_width": 8,
        "gate_width": 8,
        "gate_hidden": (8, 4),
    }
    backbones = {"local": {"name": "resnet10t"}, "context": {"name": "dinov3_vitl16", "args": SMALL}}
    torch.manual_seed(0)
    module = NuClass(NuClassConfig.of({**sizes, **backbones, "share_backbone": share})).eval()
    loaded: Any = SimpleNamespace(spec=SPEC, module=module, entry=None)
    local, context = torch.rand(2, 3, 64, 64) * 255, torch.rand(2, 3, 96, 96) * 255
    organ, targets = torch.tensor([1, -1]), [np.array([0, 2]), np.array([1, 1])]
    rerun = Explainer(loaded, "cpu").run(local, context, organ, targets)
    with torch.no_grad():
        out = module(local / 255, context / 255, organ)
    np.testing.assert_allclose(rerun.local, out.logits_local.softmax(1).numpy(), atol=1e-6)
    np.testing.assert_allclose(rerun.global_, out.logits_global.softmax(1).numpy(), atol=1e-6)
    shapes = [(h.local.shape, h.global_local.shape, h.context.shape) for h in rerun.heats]
    assert shapes == [((2, 2, 2), (2, 2, 2), (2, 6, 6))] * 2
    assert not np.array_equal(rerun.heats[0].context, rerun.heats[1].context)
