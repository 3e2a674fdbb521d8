"""The architectures: one record each: how a network is built, recognised and read, and what it finds.

Importing this file imports no torch: what needs it is named by module and imported when it is first called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from cellslide.errors import WeightsError
from cellslide.types import DetectDecode, ModelKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = Mapping[str, Tensor]

Triple = tuple[float, float, float]
# Means and deviations of images: what pretrained encoders of photographs take, what CellViT and both works of CellDETR
# are trained with, whose files do not say so.
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALVES: Triple = (0.5, 0.5, 0.5)
CELLDETR_MEAN: Triple = (0.70478431, 0.57330757, 0.74134993)
CELLDETR_STD: Triple = (0.1786614, 0.22592805, 0.19027899)


def lazy(place: str, *first: Any) -> Callable[..., Any]:
    """Return the function `module:name`, imported when it is first called, with `first` before its arguments."""
    module, _, name = place.partition(":")

    def call(*args: Any) -> Any:
        return getattr(import_module(module), name)(*first, *args)

    return call


def never(state: State) -> bool:
    """Recognise nothing."""
    return False


def as_it_is(state: State, content: Mapping[str, Any], where: str) -> Mapping[str, Tensor]:
    """Return tensors whose names are the network's own."""
    return state


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network as the rest of the package knows it.

    kind             what it finds, "classify" for types of nuclei that are known, "backbone" for features alone.
    build            config -> module; raises TypeError or ValueError for a config that does not fit.
    published_names  class names that published checkpoints carry; where several share one, their tensors decide.
    matches          whether the tensors of a file are of this architecture.
    canonical_state  (tensors, all that the file holds, where) -> tensors under the network's own names.
    infer_config     (own tensors, flat config of the file) -> config; KeyError names what is missing. None: the file
                     does not tell, a `model.yaml` must.
    mean, std        normalisation of its images, if nothing says otherwise.
    detect           which boxes or points count, if the entry says nothing.
    multiple_px      edges of tiles are multiples of this, its coarsest stride.
    tile_px          edge of the tiles that it reads.
    family           architectures that share a backbone.
    citation         the work that it is from.
    """

    name: str
    kind: ModelKind | Literal["classify", "backbone"]
    build: Callable[[Mapping[str, Any]], nn.Module]
    published_names: tuple[str, ...] = ()
    matches: Callable[[State], bool] = never
    canonical_state: Callable[[State, Mapping[str, Any], str], Mapping[str, Tensor]] = as_it_is
    infer_config: Callable[[State, Mapping[str, Any]], dict[str, Any]] | None = None
    mean: Triple = HALVES
    std: Triple = HALVES
    detect: DetectDecode = DetectDecode()
    multiple_px: int = 16
    tile_px: int = 512
    family: str = ""
    citation: str = ""

    @property
    def task(self) -> Literal["segment", "detect", "classify", "backbone"]:
        """The task of its weights."""
        if self.kind in get_args(ModelKind):
            return "segment" if self.kind == "mask" else "detect"
        return "classify" if self.kind == "classify" else "backbone"


ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Add an architecture; raises ValueError if its name is taken."""
    if architecture.name in ARCHITECTURES:
        raise ValueError(f"architecture {architecture.name}: registered already")
    ARCHITECTURES[architecture.name] = architecture


def architecture_of(name: str, state: State | None = None) -> Architecture:
    """Return the architecture of a short or published name; `state` decides where several share a published one.

    Raises WeightsError for a name that nobody registered.
    """
    named = [a for a in ARCHITECTURES.values() if name in a.published_names]
    if state is not None:
        named.sort(key=lambda a: not a.matches(state))
    found = named[0] if named else ARCHITECTURES.get(name.lower().replace("-", "_"))
    if found is None:
        published = sorted({name for a in ARCHITECTURES.values() for name in a.published_names})
        known = ", ".join([*ARCHITECTURES, *published])
        raise WeightsError(f"architecture {name[:60]!r} is not part of this version of cellslide; it has {known}")
    return found


def guess_architecture(state: State) -> Architecture | None:
    """Return the architecture whose tensors these are, the first one that recognises them, or None."""
    return next((a for a in ARCHITECTURES.values() if a.matches(state)), None)


def build_model(arch: str, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Build `arch` (short or published name) with `config` over its published defaults, weights untrained.

    Raises WeightsError for an unknown architecture or a config that does not fit it.
    """
    try:
        return architecture_of(arch).build(config or {})
    except (TypeError, ValueError) as error:
        raise WeightsError(f"architecture {arch[:60]}: {error}") from error


def _in(place: str, *first: Any) -> Callable[..., Any]:
    return lazy(f"cellslide.models.{place}", *first)


def _cellvit(name: str, published: str, citation: str = "CellViT, Hörst et al. 2024") -> Architecture:
    return Architecture(
        name,
        "mask",
        _in("cellvit:build", name),
        (published,),
        _in("cellvit_layout:is_cellvit", name),
        infer_config=_in("cellvit_layout:cellvit_config", name),
        citation=citation,
    )


def _muse(name: str, encoder: str) -> Architecture:
    return Architecture(
        name,
        "backbone",
        _in("muse:build", encoder),
        # The tensors of all sizes are of one layout, which the first of them recognises.
        matches=_in("muse_layout:is_backbone") if name == "muse" else never,
        canonical_state=_in("muse_layout:canonical_state"),
        infer_config=_in("muse_layout:config_of"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        family="muse",
        citation="MUSE, Yang et al. 2026",
    )


_CELLVITPP = "CellViT++, Hörst et al. 2025"
_BUILT_IN = (
    Architecture(
        "cellvta",
        "mask",
        _in("cellvta:build"),
        ("CellViTUNIAdapter", "CellVTA"),
        _in("cellvit_layout:is_cellvta"),
        infer_config=_in("cellvit_layout:cellvta_config"),
        citation="CellVTA, Yang et al. 2025",
    ),
    Architecture(
        "hover_unet",
        "mask",
        _in("hover_unet:build"),
        citation="U-Net, Ronneberger et al. 2015, with the maps of HoVer-Net, Graham et al. 2019",
    ),
    Architecture(
        "dpa_p2pnet",
        "point",
        _in("dpa_p2pnet:build"),
        matches=_in("muse_layout:is_dpa_p2pnet"),
        infer_config=_in("muse_layout:dpa_config_of"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        # A class that beats the background is enough.
        detect=DetectDecode(0.0, 3.0),
        multiple_px=32,
        citation="DPA-P2PNet, Shui et al. 2024",
    ),
    Architecture(
        "muse_points",
        "point",
        _in("point_head:build"),
        matches=_in("muse_layout:is_detector"),
        infer_config=_in("muse_layout:detector_config_of"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        detect=DetectDecode(0.4, 3.0),
        multiple_px=32,
        family="muse",
        citation="MUSE, Yang et al. 2026 (backbone), and DPA-P2PNet, Shui et al. 2024 (head, as cellslide builds it)",
    ),
    _muse("muse", "vit_small"),
    _muse("muse_vit_s", "vit_small"),
    _muse("muse_vit_b", "vit_base"),
    _muse("muse_r50", "resnet50"),
    Architecture(
        "celldetr",
        "box",
        _in("celldetr:build"),
        ("CellDETR",),
        _in("celldetr_layout:is_celldetr"),
        _in("celldetr_layout:canonical_state"),
        _in("celldetr_layout:config_of"),
        CELLDETR_MEAN,
        CELLDETR_STD,
        DetectDecode(0.4, 0.0),
        multiple_px=32,
        citation="Cell-DETR, Pina et al. 2024",
    ),
    # The largest comes first: a CellViTSAM of no published width is built as it.
    _cellvit("cellvit_sam_h", "CellViTSAM"),
    _cellvit("cellvit_sam_l", "CellViTSAM"),
    _cellvit("cellvit_sam_b", "CellViTSAM"),
    _cellvit("cellvit_virchow2", "CellViTVirchow2", _CELLVITPP),
    _cellvit("cellvit_virchow", "CellViTVirchow", _CELLVITPP),
    _cellvit("cellvit_uni", "CellViTUNI", _CELLVITPP),
    _cellvit("cellvit_256", "CellViT256"),
    Architecture(
        "nuclass",
        "classify",
        _in("nuclass:build"),
        ("NuClass",),
        _in("nuclass_layout:is_nuclass"),
        _in("nuclass_layout:canonical_state"),
        _in("nuclass_layout:infer_config"),
        IMAGENET_MEAN,
        IMAGENET_STD,
        citation="NuClass, Xu et al. 2025",
    ),
    Architecture(
        "morpho_fusion",
        "backbone",
        _in("morpho_fusion:build"),
        citation="Early fusion of morphology and transcripts, Martinelli et al. 2026",
    ),
)
for _architecture in _BUILT_IN:
    register(_architecture)
