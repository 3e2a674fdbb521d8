"""torchvision, importable also where it was built for another torch.

timm and Lightning's metrics import torchvision. A CUDA build of it beside a CPU build of torch cannot load its
operators and fails at import. Nothing here uses them, so declaring them is enough.
"""

from __future__ import annotations

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# Torch forgets what was declared when its library object goes.
_kept: list[torch.library.Library] = []


def declare_torchvision_operators() -> torch.library.Library | None:
    """Declare operators that torchvision registers at import if it cannot be imported; None if all is well."""
    if _kept:
        return _kept[0]
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        _kept.append(library)
        return library
    return None
