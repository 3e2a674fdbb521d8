"""HoVer U-Net: its maps, sizes that do not divide by 32, and a network that knows its place in no tile."""

from __future__ import annotations

import pytest
import torch

from cellslide.errors import WeightsError
from cellslide.models import architecture_of, build_model

SMALL = {"widths": [8, 8, 16, 16]}


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (16, 32)])
def test_maps_have_the_size_of_the_image(size: tuple[int, int]) -> None:
    model = build_model("hover_unet", SMALL | {"num_nuclei_classes": 4}).eval()
    out = model(torch.randn(2, 3, *size))
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "nuclei_binary_map": (2, 2, *size),
        "hv_map": (2, 2, *size),
        "nuclei_type_map": (2, 4, *size),
    }
    assert architecture_of("hover_unet").kind == "mask"


def test_types_are_left_out_where_there_are_none() -> None:
    assert set(build_model("hover_unet", SMALL).eval()(torch.randn(1, 3, 32, 32))) == {"nuclei_binary_map", "hv_map"}


def test_the_middle_of_a_large_image_does_not_depend_on_its_border() -> None:
    torch.manual_seed(0)
    model = build_model("hover_unet", SMALL).eval()
    image = torch.randn(1, 3, 1024, 1024)
    with torch.inference_mode():
        whole = model(image)["hv_map"][..., 480:544, 480:544]
        part = model(image[..., 128:896, 128:896])["hv_map"][..., 352:416, 352:416]
    torch.testing.assert_close(whole, part, atol=1e-4, rtol=1e-4)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="50 x 64"):
        build_model("hover_unet", SMALL)(torch.randn(1, 3, 64, 50))
    with pytest.raises(WeightsError, match="widths"):
        build_model("hover_unet", {"widths": [8, 8]})
    with pytest.raises(WeightsError, match="no_such_network"):
        build_model("hover_unet", {"encoder": "no_such_network"})
    with pytest.raises(WeightsError, match="strides"):
        build_model("hover_unet", {"encoder": "convnext_atto"})
