"""Classes, and what a pipeline must know of a model that finds nuclei."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ModelKind = Literal["mask", "box", "point"]


@dataclass(frozen=True, slots=True)
class ClassSpec:
    """A class as written to files: its name and its colour, 0..255 RGB."""

    name: str
    color: tuple[int, int, int]


def hex_color(color: tuple[int, int, int]) -> str:
    """Return a colour, 0..255 RGB, as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*color)


@dataclass(frozen=True, slots=True)
class HoverDecode:
    """How HoVer maps become instances.

    mode            "published" scales the maps by their extremes in the tile, bit for bit as HoVer-Net and CellViT do;
                    "fixed" scales by `hv_gradient_range`, so that a nucleus does not depend on the rest of its tile.
    kernel_px       Sobel aperture (21 at 0.25 µm/px, 11 at 0.5).
    min_marker_px   smallest marker (10 at 0.25 µm/px, 3 at 0.5).
    min_object_px   smallest foreground component (always 10 in the published form).
    energy_threshold  above it a pixel is a border between nuclei (0.4 published).
    """

    mode: Literal["published", "fixed"] = "published"
    kernel_px: int = 21
    min_marker_px: int = 10
    min_object_px: int = 10
    energy_threshold: float = 0.4
    foreground_threshold: float = 0.5
    hv_gradient_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class DetectDecode:
    """Which queries of a box or point model become nuclei.

    score_threshold   least score of a nucleus, 0..1.
    nms_um            of two points, or centres of boxes, no farther apart (µm) the better stays; 0 leaves all of them.
    """

    score_threshold: float = 0.4
    nms_um: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold {self.score_threshold}: must be 0 to 1")
        if not 0 <= self.nms_um <= 50:
            raise ValueError(f"nms_um {self.nms_um}: must be 0 to 50 µm")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a pipeline must know of a model: input pixels, what it finds, and how its output is decoded.

    `classes` excludes background and is empty for a model that does not type nuclei. `tile_px` and `overlap_px` are
    defaults in plane pixels; read boxes are multiples of `multiple_px`. `decode` is for masks, `detect` for boxes and
    points. `embedding_dim` is the length of the vector that the model gives with each nucleus, 0 for none.
    `bf16_on_cpu` says that the scores hold in bf16, so that a CPU which computes in it may.
    """

    name: str
    kind: ModelKind
    mpp: float
    tile_px: int
    overlap_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[ClassSpec, ...] = ()
    multiple_px: int = 16
    decode: HoverDecode = field(default_factory=HoverDecode)
    weights_id: str = ""
    weights_sha256: str = ""
    licence: str = ""
    detect: DetectDecode = field(default_factory=DetectDecode)
    embedding_dim: int = 0
    bf16_on_cpu: bool = False
