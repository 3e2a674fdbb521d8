"""What a pipeline must know of a classifier, and what one says of nuclei."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cellslide.types.arrays import Float32, check_lengths
from cellslide.types.model import ClassSpec


@dataclass(frozen=True, slots=True)
class CropSpec:
    """A square crop centred on a nucleus: `field_px` pixels of the classifier's plane, resampled to `input_px`.

    border    what stands outside the slide: "zero" is black, "reflect" mirrors the slide at its edge.
    resample  how the field becomes the input where the two differ: "bilinear" as published (no antialias), or "area".
    """

    field_px: int
    input_px: int
    border: Literal["zero", "reflect"] = "reflect"
    resample: Literal["bilinear", "area"] = "area"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was fitted on validation cells, for one set of classifier weights; K classes in the weights' order.

    temperature_*   divide the logits of a path, or of the mix (log probabilities), 1 where nothing was fitted.
    reliability_*   precision of each path for each class that it predicts, (K,), or None.
    tau, gamma      thresholds of the safe gate; `safe_accepts` is False where only its baseline chooser did well.
    thresholds      per class, the probability below which the class is not accepted, or None.
    abstain         probability below which no class is accepted, or None.
    abstain_unseen  the same for an organ that was not trained, fitted on organs left out of training; or None.
    accuracy_unseen share of the nuclei of such organs that were typed right, or None.
    class_prior     per class, how frequent the calibrated probabilities take it to be (their mean), or None.
    confusion       (K, K) counts of labelled nuclei by the default rule without abstention, rows truth, or None.
    paths           "local" where the mix gained too little over the local path: the default leaves the global one out.
    """

    temperature_local: float = 1.0
    temperature_global: float = 1.0
    temperature_mix: float = 1.0
    reliability_local: tuple[float, ...] | None = None
    reliability_global: tuple[float, ...] | None = None
    tau: float = 0.5
    gamma: float = 0.05
    safe_accepts: bool = True
    thresholds: tuple[float, ...] | None = None
    abstain: float | None = None
    abstain_unseen: float | None = None
    accuracy_unseen: float | None = None
    class_prior: tuple[float, ...] | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None
    paths: Literal["both", "local"] = "both"


@dataclass(frozen=True, slots=True)
class ClassifierSpec:
    """What a pipeline must know of a classifier: its crops, classes, organs and calibration.

    `mpp` is the pixel size of the plane that both crops are cut from. `learned_unknown`: the weights hold an embedding
    for an unknown organ (the row after the named ones); otherwise an unknown organ modulates nothing.
    """

    name: str
    mpp: float
    local: CropSpec
    context: CropSpec
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[ClassSpec, ...]
    organs: tuple[str, ...]
    learned_unknown: bool = False
    calibration: Calibration = field(default_factory=Calibration)
    weights_id: str = ""
    weights_sha256: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class PathProbs:
    """What a classifier says of N cells before any decision: the network's own probabilities, not calibrated.

    local, global_  float32 (N, K), rows sum to 1; a row of `global_` is NaN where the global path was skipped.
    gate            float32 (N,), weight of the global path; NaN where it was skipped.
    """

    local: Float32
    global_: Float32
    gate: Float32

    def __post_init__(self) -> None:
        check_lengths(self, len(self.local), ("global_", "gate"))

    def __len__(self) -> int:
        return len(self.local)
