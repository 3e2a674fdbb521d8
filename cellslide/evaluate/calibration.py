"""Calibration of a classifier on labelled cells: temperatures, reliability, the safe gate's thresholds, abstention.

Only probabilities are seen here, no network. The cells must be ones that trained nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cellslide.classify.decision import (
    GLOBAL,
    LOCAL,
    DecisionConfig,
    GateRule,
    baseline_paths,
    decide,
    default_gate,
    mix,
    reliability,
    safe_paths,
    skipped,
    temper,
)
from cellslide.errors import UsageError
from cellslide.evaluate.classification import (
    class_tallies,
    confusion,
    expected_calibration_error,
    mean_f1,
    reliability_bins,
)
from cellslide.evaluate.diagram import write_reliability
from cellslide.types import Bool, Calibration, Float32, Float64, Int64, PathProbs, UInt8

# NuClass, path_gate: tau outside, gamma inside.
TAUS = tuple(np.linspace(0.3, 0.7, 9).tolist())
GAMMAS = tuple(np.linspace(0.0, 0.2, 11).tolist())
TEMPERATURES = (0.05, 20.0)
# Macro F1 by which the mix must beat the local path: the global one takes as long as the local one, or longer.
LEAST_GAIN = 0.01


@dataclass(frozen=True, slots=True)
class FitConfig:
    """What the thresholds aim at.

    target     accuracy that the cells above the abstain threshold shall have.
    min_cells  fewest cells above a threshold for it to be believed.
    """

    target: float = 0.9
    min_cells: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise UsageError(f"--target {self.target}: must be above 0 and at most 1")


def fit(probs: PathProbs, labels: NDArray[Any], n_classes: int, config: FitConfig | None = None) -> Calibration:
    """Return the calibration of cells whose true class is `labels` (N,), 0..n_classes-1; others are left out.

    What needs the global path is fitted on the cells where it ran, and left at its default where there are none.
    Raises UsageError without a labelled cell, ValueError on another number of classes.
    """
    config = config or FitConfig()
    if probs.local.shape[1] != n_classes:
        raise ValueError(f"probabilities of {probs.local.shape[1]} classes, not of {n_classes}")
    labels = np.asarray(labels, np.int64)
    known = (labels >= 0) & (labels < n_classes)
    if not known.any():
        raise UsageError("no labelled cell to calibrate on")
    probs, labels = _take(probs, known), labels[known]
    calibration = Calibration(temperature_local=fit_temperature(probs.local, labels))
    both = ~skipped(probs)
    if both.any():
        calibration = _fit_global(calibration, _take(probs, both), labels[both])
        calibration = replace(calibration, paths=worthwhile_paths(calibration, _take(probs, both), labels[both]))
    return _fit_thresholds(calibration, probs, labels, config)


def worthwhile_paths(calibration: Calibration, probs: PathProbs, labels: Int64) -> Literal["both", "local"]:
    """Return "local" unless the mix gains `LEAST_GAIN` in macro F1 over the local path."""
    local, mixed = (_macro_f1(probs, labels, calibration, rule) for rule in ("local", "mix"))
    return "both" if mixed - local >= LEAST_GAIN else "local"


def _macro_f1(probs: PathProbs, labels: Int64, calibration: Calibration, rule: GateRule) -> float:
    named = decide(probs, DecisionConfig(rule), calibration).class_index
    return mean_f1(class_tallies(labels, named, probs.local.shape[1])) or 0.0


def _fit_global(calibration: Calibration, probs: PathProbs, labels: Int64) -> Calibration:
    local, global_ = reliability(probs.local, labels), reliability(probs.global_, labels)
    safe = fit_safe_gate(probs, labels, local, global_)
    return replace(
        calibration,
        temperature_global=fit_temperature(probs.global_, labels),
        temperature_mix=fit_temperature(mix(probs), labels),
        reliability_local=tuple(local.astype(float).tolist()),
        reliability_global=tuple(global_.astype(float).tolist()),
        tau=safe.tau,
        gamma=safe.gamma,
        safe_accepts=safe.accepts,
    )


def fit_temperature(prob: Float32, labels: NDArray[Any]) -> float:
    """Return the temperature of least negative log likelihood of rows (N, K), within `TEMPERATURES`.

    Guo et al. 2017, section 4.2. The likelihood has one minimum in 1 / T, so that a bounded search finds it.
    """
    from scipy.optimize import minimize_scalar

    log = np.log(np.maximum(prob.astype(np.float64), np.finfo(np.float32).tiny))
    true = log[np.arange(len(log)), labels]

    def loss(log_t: float) -> float:
        beta = np.exp(-log_t)
        top = (log * beta).max(axis=1)
        norm = top + np.log(np.exp(log * beta - top[:, None]).sum(axis=1))
        return float((norm - true * beta).mean())

    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x))


@dataclass(frozen=True, slots=True)
class SafeGate:
    """The safe gate's thresholds, and its accuracy beside the baseline's and that of the better single path."""

    tau: float
    gamma: float
    accepts: bool
    accuracy: float
    baseline: float
    best_single: float


def fit_safe_gate(
    probs: PathProbs, labels: NDArray[Any], reliability_local: Float32, reliability_global: Float32
) -> SafeGate:
    """Search the published grid for the thresholds of best accuracy; the first of equals is taken.

    They are accepted only if they beat the baseline chooser and are no worse than the better single path; else the
    safe gate is the baseline alone. Needs cells whose global path ran.
    """

    def accuracy(path: UInt8) -> float:
        named = np.where(path == GLOBAL, probs.global_.argmax(axis=1), probs.local.argmax(axis=1))
        return float(np.mean(named == labels))

    baseline = accuracy(baseline_paths(probs, reliability_local, reliability_global))
    single = max(accuracy(np.full(len(probs), code, np.uint8)) for code in (LOCAL, GLOBAL))
    best = SafeGate(Calibration().tau, Calibration().gamma, False, baseline, baseline, single)
    for tau in TAUS:
        for gamma in GAMMAS:
            score = accuracy(safe_paths(probs, reliability_local, reliability_global, tau, gamma))
            if score > best.accuracy and score >= single:
                best = SafeGate(tau, gamma, True, score, baseline, single)
    return best


def _fit_thresholds(calibration: Calibration, probs: PathProbs, labels: Int64, config: FitConfig) -> Calibration:
    """Add the abstain threshold, those of the classes, their frequencies and confusion, for the rule by default."""
    decision = decide(probs, DecisionConfig(default_gate(calibration)), calibration)
    named, sure = decision.class_index, decision.class_prob.astype(np.float64)
    per_class = tuple(
        f1_threshold(sure[named == k], (labels == k)[named == k], int((labels == k).sum()))
        for k in range(decision.prob.shape[1])
    )
    abstain = accuracy_threshold(sure, named == labels, config)
    prior = tuple(decision.prob.mean(axis=0, dtype=np.float64).tolist())
    counts = tuple(map(tuple, confusion(labels, named, decision.prob.shape[1]).tolist()))
    return replace(calibration, thresholds=per_class, abstain=abstain, class_prior=prior, confusion=counts)


def fit_unseen(
    calibration: Calibration, probs: PathProbs, labels: NDArray[Any], config: FitConfig | None = None
) -> Calibration:
    """Return the calibration with the abstention for organs that trained nothing, fitted on cells of such an organ.

    Temperatures and all else stay as they were fitted on trained organs, since that is how a cell of an unseen organ
    comes to its probability. `labels` (N,) is the true class of each cell.
    """
    decision = decide(probs, DecisionConfig(default_gate(calibration)), calibration)
    right = decision.class_index == np.asarray(labels, np.int64)
    floor = accuracy_threshold(decision.class_prob.astype(np.float64), right, config or FitConfig())
    return replace(calibration, abstain_unseen=floor or 0.0, accuracy_unseen=float(right.mean()))


def accuracy_threshold(confidence: Float64, right: Bool, config: FitConfig) -> float | None:
    """Return the lowest confidence from which on at least `config.target` of the cells are right.

    None where all cells together are right often enough. Where no threshold with `config.min_cells` cells above it
    reaches the target, the one that comes nearest.
    """
    if not len(right) or right.mean() >= config.target:
        return None
    order = np.argsort(-confidence, kind="stable")
    level = confidence[order]
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    # Cells of one confidence are accepted together.
    last = np.append(level[1:] < level[:-1], True)
    enough = last & (np.arange(1, len(order) + 1) >= min(config.min_cells, len(order)))
    reached = enough & (share >= config.target)
    chosen = np.flatnonzero(reached)[-1] if reached.any() else np.flatnonzero(enough)[np.argmax(share[enough])]
    return float(level[chosen])


def f1_threshold(confidence: Float64, right: Bool, n_true: int) -> float:
    """Return the confidence below which the cells of one named class are better refused: where its F1 is highest.

    confidence, right  of the cells given this class; `n_true` cells have it in truth. 0 where refusing does not help.
    """
    if not len(right):
        return 0.0
    order = np.argsort(-confidence, kind="stable")
    level = confidence[order]
    f1 = 2 * np.cumsum(right[order]) / (np.arange(1, len(order) + 1) + n_true)
    f1[np.append(level[1:] == level[:-1], False)] = -1.0
    best = int(np.argmax(f1))
    return 0.0 if f1[best] <= f1[-1] else float(level[best])


@dataclass(frozen=True, slots=True)
class Gain:
    """ECE of the rule that decides by default: as the network gives it, after calibration, and when halves cross.

    `crossed` is of each half of the images calibrated by the other, None for a single image.
    """

    before: float | None
    after: float | None
    crossed: float | None


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What `calibrate` fitted on `n` nuclei: the entry that holds it now, the classes of the weights, what it gains."""

    path: Path
    classes: tuple[str, ...]
    n: int
    calibration: Calibration
    gain: Gain


def draw_gain(path: Path, probs: PathProbs, labels: Int64, found: Calibration) -> None:
    """Draw the reliability of cells, before and after they were calibrated, to a PNG file."""
    panels = {}
    for title, calibration in (("before", Calibration()), ("after", found)):
        decision = decide(probs, DecisionConfig(default_gate(found)), calibration)
        panels[title] = reliability_bins(decision.class_prob, decision.class_index == labels)
    write_reliability(path, panels)


def measure(probs: PathProbs, labels: NDArray[Any], image: NDArray[Any], calibration: Calibration) -> Gain:
    """Return what the calibration did on its own cells, and a fair estimate by two halves of the images (N,)."""
    rule = default_gate(calibration)
    return Gain(
        _ece(probs, labels, Calibration(), rule),
        _ece(probs, labels, calibration, rule),
        _crossed(mix(probs) if rule == "mix" else probs.local, np.asarray(labels, np.int64), np.asarray(image)),
    )


def _ece(probs: PathProbs, labels: NDArray[Any], calibration: Calibration, rule: GateRule) -> float | None:
    decision = decide(probs, DecisionConfig(rule), calibration)
    return expected_calibration_error(decision.class_prob, decision.class_index == labels)


def _crossed(prob: Float32, labels: Int64, image: NDArray[Any]) -> float | None:
    half = np.isin(image, np.unique(image)[::2])
    if half.all():
        return None
    crossed = np.empty_like(prob)
    for part in (half, ~half):
        crossed[part] = temper(prob[part], fit_temperature(prob[~part], labels[~part]))
    return expected_calibration_error(crossed.max(axis=1), crossed.argmax(axis=1) == labels)


def _take(probs: PathProbs, rows: Bool) -> PathProbs:
    return PathProbs(probs.local[rows], probs.global_[rows], probs.gate[rows])


def class_labels(true_class: NDArray[Any], dataset_names: Sequence[str], targets: NDArray[Any]) -> Int64:
    """Return the classifier's class of each cell, int64 (N,), -1 for one that the classifier does not know.

    true_class  (N,) index into the data set's classes; `targets` (K,) gives each class of the classifier its class of
    the data set, -1 for none. Raises UsageError where two classes of the classifier are one class of the data set.
    """
    back = np.full(len(dataset_names), -1, np.int64)
    for k, target in enumerate(np.asarray(targets).tolist()):
        if target < 0:
            continue
        if back[target] >= 0:
            raise UsageError(
                f"--map-class: several classes of the weights are {dataset_names[target]}, calibrate needs one"
            )
        back[target] = k
    return back[np.asarray(true_class, np.int64)]
