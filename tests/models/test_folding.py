"""Batch norms folded into convolutions: the same numbers, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cellslide.models.folding import folded


def shaken(module: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module.eval()


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


class Named(nn.Module):
    """A residual network's way of naming, beside a norm that belongs to no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.norm = nn.BatchNorm2d(5)
        self.tail = nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.norm(self.bn1(self.conv1(x))))


@torch.no_grad()
def test_a_folded_network_gives_the_same_and_leaves_the_first_as_it_was() -> None:
    torch.manual_seed(0)
    module, x = shaken(Named()), torch.randn(2, 3, 12, 10)
    before = module(x)
    lean = folded(module)
    torch.testing.assert_close(lean(x), before, atol=1e-5, rtol=1e-5)
    assert (norms(module), norms(lean)) == (4, 2)
    assert torch.equal(module(x), before)
    assert lean.norm.weight is module.norm.weight  # weights that do not change are not held twice


@torch.no_grad()
def test_a_network_of_timm_is_folded_by_its_names() -> None:
    from cellslide.models.backbones import create_backbone

    torch.manual_seed(0)
    module, x = shaken(create_backbone("resnet18")), torch.randn(1, 3, 64, 64)
    lean = folded(module)
    assert norms(lean) == 0
    torch.testing.assert_close(lean(x), module(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))])
def test_what_has_nothing_to_fold_stays_the_same_object(module: nn.Module) -> None:
    assert folded(module) is module
