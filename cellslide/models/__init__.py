"""Network architectures: they know tensors, not slides or files. One dict maps names to builders.

Importing this package imports no torch; a builder does so when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from cellslide.errors import WeightsError

if TYPE_CHECKING:
    from torch import nn

    from cellslide.types import ModelKind

Builder = Callable[[Mapping[str, Any]], "nn.Module"]


def _cellvta(config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.cellvta import CellVTA, CellVTAConfig

    return CellVTA(CellVTAConfig(**config))


def _hover_unet(config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.hover_unet import HoverUNet, HoverUNetConfig

    return HoverUNet(HoverUNetConfig(**config))


def _cellvit(arch: str, config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.cellvit import build

    return build(arch, config)


def _nuclass(config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.nuclass import NuClass, NuClassConfig

    return NuClass(NuClassConfig.of(config))


def _muse(encoder: str, config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.muse import MuseBackbone, MuseConfig

    return MuseBackbone(MuseConfig.of(config, encoder))


def _muse_points(config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.point_head import MusePoints, MusePointsConfig

    return MusePoints(MusePointsConfig.of(config))


def _dpa_p2pnet(config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.dpa_p2pnet import build

    return build(config)


def _celldetr(config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.celldetr import CellDETR, CellDETRConfig

    return CellDETR(CellDETRConfig(**config))


_CELLVIT = (
    "cellvit_256", "cellvit_sam_b", "cellvit_sam_l", "cellvit_sam_h",
    "cellvit_uni", "cellvit_virchow", "cellvit_virchow2",
)  # fmt: skip

ARCHITECTURES: dict[str, Builder] = {
    "cellvta": _cellvta,
    "hover_unet": _hover_unet,
    **{name: partial(_cellvit, name) for name in _CELLVIT},
    "nuclass": _nuclass,
    "celldetr": _celldetr,
    "muse": partial(_muse, "vit_small"),
    "muse_vit_s": partial(_muse, "vit_small"),
    "muse_vit_b": partial(_muse, "vit_base"),
    "muse_r50": partial(_muse, "resnet50"),
    "muse_points": _muse_points,
    "dpa_p2pnet": _dpa_p2pnet,
}

# What a detector gives; every other architecture of a segmentation model gives maps of masks.
DETECTORS: dict[str, ModelKind] = {"celldetr": "box", "muse_points": "point", "dpa_p2pnet": "point"}

# Class names that published checkpoints carry. A CellViTSAM is of any size; its tensors tell which.
PUBLISHED_NAMES = {
    "CellViTUNIAdapter": "cellvta",
    "CellVTA": "cellvta",
    "CellViT256": "cellvit_256",
    "CellViTSAM": "cellvit_sam_h",
    "CellViTUNI": "cellvit_uni",
    "CellViTVirchow": "cellvit_virchow",
    "CellViTVirchow2": "cellvit_virchow2",
    "NuClass": "nuclass",
    "CellDETR": "celldetr",
}


def canonical_arch(name: str) -> str:
    """Return the short name of an architecture given by short or published name; raises WeightsError."""
    short = PUBLISHED_NAMES.get(name, name.lower().replace("-", "_"))
    if short not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, *PUBLISHED_NAMES])
        raise WeightsError(f"architecture {name[:60]!r} is not part of this version of cellslide; it has {known}")
    return short


def kind_of(arch: str) -> ModelKind:
    """Return what the networks of an architecture (short or published name) give; raises WeightsError."""
    return DETECTORS.get(canonical_arch(arch), "mask")


def build_model(arch: str, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Build `arch` (short or published name) with `config` over its published defaults, weights untrained.

    Raises WeightsError for an unknown architecture or a config that does not fit it.
    """
    short = canonical_arch(arch)
    try:
        return ARCHITECTURES[short](config or {})
    except (TypeError, ValueError) as error:
        raise WeightsError(f"architecture {arch}: {error}") from error
