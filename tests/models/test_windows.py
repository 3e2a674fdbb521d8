"""Attention to near tokens against the same with a mask over all pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cellslide.models.windows import Windows

CPU = torch.device("cpu")


def near(grid_hw: tuple[int, int], radius: int) -> Tensor:
    """Return bool (N, N): True within `radius` rows and columns of each other."""
    rows, cols = (index.flatten() for index in torch.meshgrid(*map(torch.arange, grid_hw), indexing="ij"))
    return torch.maximum((rows[:, None] - rows).abs(), (cols[:, None] - cols).abs()) <= radius


@pytest.mark.parametrize("grid_hw", [(1, 1), (8, 8), (9, 5), (16, 24), (21, 3)])
@pytest.mark.parametrize("radius", [1, 3, 9])
def test_windows_give_what_a_mask_over_all_pairs_gives(grid_hw: tuple[int, int], radius: int) -> None:
    generator = torch.Generator().manual_seed(0)
    n = grid_hw[0] * grid_hw[1]
    q, k, v = torch.randn(3, 2, 3, n, 4, generator=generator)
    for t in (q, k, v):
        t.requires_grad_()
    found = Windows.of(grid_hw, radius, CPU).attend(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=near(grid_hw, radius))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_each_query_sees_as_many_keys_as_lie_within_the_radius() -> None:
    windows = Windows.of((10, 13), 2, CPU)
    seen = windows.mask.sum(-1).flatten()[windows.place]
    assert seen.tolist() == near((10, 13), 2).sum(1).tolist()
    assert windows.queries.flatten()[windows.place].tolist() == list(range(130))
