"""Loss terms with known values, and what must not count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cellslide.train.data import Crops
from cellslide.train.hover.losses import dice, focal_tversky, gradients, hover_losses, mse, msge
from cellslide.train.hover.recipe import LossConfig

CONFIG = LossConfig(np_ce=1.0)


def _one_hot(target: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(target, 2).permute(0, 3, 1, 2).float()


def _batch(size: int = 16) -> tuple[Crops, dict[str, Tensor]]:
    torch.manual_seed(0)
    foreground = (torch.rand(2, size, size) > 0.6).long()
    crops = Crops(
        torch.zeros(2, 3, size, size, dtype=torch.uint8),
        foreground,
        torch.rand(2, 2, size, size) * foreground.unsqueeze(1),
        torch.ones(2, size, size, dtype=torch.bool),
        foreground * 2,
    )
    shapes = {"nuclei_binary_map": 2, "hv_map": 2, "nuclei_type_map": 3}
    return crops, {name: torch.randn(2, k, size, size, requires_grad=True) for name, k in shapes.items()}


def test_dice_is_zero_when_right_and_one_per_class_when_wrong() -> None:
    target = _one_hot(torch.tensor([[[0, 1], [1, 1]]]))
    assert dice(target, target).item() == pytest.approx(0, abs=1e-6)
    assert dice(1 - target, target).item() == pytest.approx(2, abs=1e-2)
    half = torch.full_like(target, 0.5)
    # Class 0: 1 - 2*0.5/(2+1); class 1: 1 - 2*1.5/(2+3).
    assert dice(half, target).item() == pytest.approx(2 / 3 + 2 / 5, abs=1e-3)


def test_focal_tversky_weighs_what_was_missed() -> None:
    target = torch.tensor([1.0, 1, 0, 0]).view(1, 1, 2, 2)
    missed, added = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 2, 2), torch.tensor([1.0, 1, 1, 0]).view(1, 1, 2, 2)
    assert focal_tversky(missed, target, 0.7, 0.3, 1.0, 0.0).item() == pytest.approx(1 - 1 / 1.7)
    assert focal_tversky(added, target, 0.7, 0.3, 1.0, 0.0).item() == pytest.approx(1 - 2 / 2.3)
    assert focal_tversky(missed, target, 0.7, 0.3, 4 / 3, 0.0).item() == pytest.approx((0.7 / 1.7) ** (4 / 3))


def test_gradients_look_along_their_own_axis() -> None:
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    ramp = gradients(torch.stack([x, y])[None])
    inner = ramp[0, :, 2:-2, 2:-2]
    assert torch.allclose(inner, inner[0, 0, 0].expand_as(inner)) and inner.min() > 0
    assert gradients(torch.stack([y, x])[None])[0, :, 2:-2, 2:-2].abs().max() < 1e-4


def test_hover_terms_count_valid_pixels_only() -> None:
    predicted, wanted = torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert mse(predicted, wanted, valid).item() == 0
    valid[0, :4] = True
    predicted[:, :, 4:] = 100
    assert mse(predicted, wanted, valid).item() == 1
    assert msge(predicted[:, :, :4], wanted[:, :, :4], valid[:, :4] & False).item() == 0


def test_perfect_outputs_cost_almost_nothing() -> None:
    crops, outputs = _batch()
    perfect = {
        "nuclei_binary_map": (_one_hot(crops.foreground) - 0.5) * 40,
        "hv_map": crops.hover,
        "nuclei_type_map": torch.nn.functional.one_hot(crops.types, 3).permute(0, 3, 1, 2) * 40.0,
    }
    assert hover_losses(perfect, crops, CONFIG).total < 1e-2 < hover_losses(outputs, crops, CONFIG).total


def test_pixels_not_known_change_nothing() -> None:
    crops, outputs = _batch()
    foreground, types, valid = crops.foreground.clone(), crops.types.clone(), crops.hover_valid.clone()
    foreground[:, :, :8], types[:, :, :8], valid[:, :, :8] = -1, -1, False
    masked = crops._replace(foreground=foreground, types=types, hover_valid=valid)
    hover_losses(outputs, masked, CONFIG).total.backward()
    for name in ("nuclei_binary_map", "nuclei_type_map"):
        gradient = outputs[name].grad
        assert gradient is not None and not gradient[..., :8].any() and gradient[..., 8:].any()
    gradient = outputs["hv_map"].grad
    # The gradient kernel of a nuclear pixel reaches two pixels over the border.
    assert gradient is not None and not gradient[..., :6].any() and gradient[..., 8:].any()


def test_a_branch_without_supervision_contributes_zero() -> None:
    crops, outputs = _batch()
    bare = crops._replace(
        foreground=torch.full_like(crops.foreground, -1),
        types=torch.full_like(crops.types, -1),
        hover_valid=torch.zeros_like(crops.hover_valid),
    )
    total = hover_losses(outputs, bare, CONFIG).total
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-6)
    assert all(not torch.nan_to_num(value.grad, nan=1.0).any() for value in outputs.values())


def test_weights_scale_their_terms_and_types_may_be_absent() -> None:
    crops, outputs = _batch()
    one, two = (hover_losses(outputs, crops, LossConfig(hv_msge=w)) for w in (1.0, 3.0))
    assert two.hv_msge.item() == pytest.approx(3 * one.hv_msge.item()) and two.np_dice == one.np_dice
    assert one.nt_ce > 0 and one.total.item() == pytest.approx(sum(t.item() for t in one), rel=1e-5)
    del outputs["nuclei_type_map"]
    assert hover_losses(outputs, crops, CONFIG).nt_ce == 0
