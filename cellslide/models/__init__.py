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

Builder = Callable[[Mapping[str, Any]], "nn.Module"]


def _cellvta(config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.cellvta import CellVTA, CellVTAConfig

    return CellVTA(CellVTAConfig(**config))


def _cellvit(arch: str, config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.cellvit import build

    return build(arch, config)


def _nuclass(config: Mapping[str, Any]) -> nn.Module:
    from cellslide.models.nuclass import NuClass, NuClassConfig

    return NuClass(NuClassConfig.of(config))


_CELLVIT = (
    "cellvit_256", "cellvit_sam_b", "cellvit_sam_l", "cellvit_sam_h",
    "cellvit_uni", "cellvit_virchow", "cellvit_virchow2",
)  # fmt: skip

ARCHITECTURES: dict[str, Builder] = {
    "cellvta": _cellvta,
    **{name: partial(_cellvit, name) for name in _CELLVIT},
    "nuclass": _nuclass,
}

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
}


def canonical_arch(name: str) -> str:
    """Return the short name of an architecture given by short or published name; raises WeightsError."""
    short = PUBLISHED_NAMES.get(name, name.lower().replace("-", "_"))
    if short not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, *PUBLISHED_NAMES])
        raise WeightsError(f"architecture {name!r} is not part of this version of cellslide; it has {known}")
    return short


def build_model(arch: str, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Build `arch` (short or published name) with `config` over its published defaults, weights untrained.

    Raises WeightsError for an unknown architecture or a config that does not fit it.
    """
    short = canonical_arch(arch)
    try:
        return ARCHITECTURES[short](config or {})
    except (TypeError, ValueError) as error:
        raise WeightsError(f"architecture {arch}: {error}") from error
