"""The mean over mirror images of a tile: of a network's own outputs, and itself without a preferred direction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cellslide.errors import UsageError
from cellslide.inference.flips import FlipMean, with_flips
from tests.support.fakes import fake_model


class Lopsided(nn.Module):
    """Convolutions without symmetry, under the names of a HoVer decoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.binary, self.hv = (nn.Conv2d(3, 2, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"nuclei_binary_map": self.binary(x), "hv_map": self.hv(x), "tissue": x.mean((2, 3))}


@torch.inference_mode()
def test_a_mirrored_tile_gives_mirrored_maps() -> None:
    net, x = FlipMean(Lopsided()), torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    out = net(x)
    for axis, signs in ((3, (-1.0, 1.0)), (2, (1.0, -1.0))):
        mirrored = net(x.flip(axis))
        torch.testing.assert_close(mirrored["nuclei_binary_map"].flip(axis), out["nuclei_binary_map"])
        sign = torch.tensor(signs).view(1, 2, 1, 1)
        torch.testing.assert_close(mirrored["hv_map"].flip(axis) * sign, out["hv_map"])
    torch.testing.assert_close(out["tissue"], x.mean((2, 3)))
    assert not torch.allclose(out["nuclei_binary_map"], Lopsided()(x)["nuclei_binary_map"], atol=1e-3)


def test_only_outlines_are_mirrored() -> None:
    assert isinstance(with_flips(nn.Identity(), fake_model().spec), FlipMean)
    with pytest.raises(UsageError, match="--tta"):
        with_flips(nn.Identity(), replace(fake_model().spec, kind="point"))
