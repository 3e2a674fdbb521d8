"""From the probabilities of two paths to a decision: mix, safe gate or one path, calibrated, with the right to abstain.

No network runs here, so that another rule can be applied to the same cells at any time. A row whose global path was
skipped (NaN) is decided by the local path alone, whatever the rule: its g is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cellslide.errors import UsageError, short
from cellslide.store.foreign_files import read_yaml
from cellslide.store.table_schema import NOT_NUCLEUS
from cellslide.types import Bool, Calibration, Float32, Float64, Int64, PathProbs, UInt8

GateRule = Literal["mix", "safe", "local", "global"]
GATE_RULES: tuple[GateRule, ...] = get_args(GateRule)
# Which vector was used for a cell; `Decision.path` holds the index.
PATHS = ("mix", "local", "global")
MIX, LOCAL, GLOBAL = range(3)
# A class of reliability 0 must not lose to another for the order of the paths alone; the published value.
RELIABILITY_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class DecisionConfig:
    """How a cell's class is decided; None takes what the weights' calibration holds.

    gate        mix: the gate's own sum of both paths. safe: one path, the more reliable unless the gate is sure of the
                other. local, global: one path.
    tau, gamma  the safe gate follows the gate only where g and the difference of confidence pass these.
    thresholds  per class in the weights' order, the probability below which the class is not accepted.
    abstain     the probability below which no class is accepted; 0 accepts all.
    prior       per class in the weights' order, how frequent it is expected to be; None takes the calibration's.

    Where `thresholds` or `abstain` is given, neither of the calibration's is used.
    """

    gate: GateRule = "mix"
    tau: float | None = None
    gamma: float | None = None
    thresholds: tuple[float, ...] | None = None
    abstain: float | None = None
    prior: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.gate not in GATE_RULES:
            raise UsageError(f"--gate {self.gate}: must be one of {', '.join(GATE_RULES)}")
        for flag, value in (("--tau", self.tau), ("--gamma", self.gamma), ("--abstain", self.abstain)):
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{flag} {value}: must be 0 to 1")
        wrong = [v for v in self.thresholds or () if not 0 <= v <= 1]
        if wrong:
            raise UsageError(f"--thresholds: {wrong[0]} must be 0 to 1")


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for N cells.

    prob         float32 (N, K), calibrated, rows sum to 1.
    class_index  int64 (N,), the most probable class, also where the cell abstains.
    class_prob   float32 (N,), its probability.
    path         uint8 (N,), index into `PATHS`: which vector `prob` is.
    abstained    bool (N,): no class was probable enough.
    """

    prob: Float32
    class_index: Int64
    class_prob: Float32
    path: UInt8
    abstained: Bool


def default_gate(calibration: Calibration) -> GateRule:
    """Return the rule where none is given: the mix, or the local path where only that one is worth its time."""
    return "local" if calibration.paths == "local" else "mix"


def decide(probs: PathProbs, config: DecisionConfig | None = None, calibration: Calibration | None = None) -> Decision:
    """Apply the rule of `config` to N cells; raises UsageError if it needs what `calibration` does not hold."""
    config, calibration = config or DecisionConfig(), calibration or Calibration()
    path = _choose(probs, config, calibration)
    prob = calibrated(probs, path, calibration)
    if config.prior is not None:
        prob = with_prior(prob, prior_ratio(config.prior, calibration))
    class_index = np.asarray(prob.argmax(axis=1), np.int64)
    class_prob = prob[np.arange(len(prob)), class_index]
    floor = floors(config, calibration, prob.shape[1])[class_index]
    return Decision(prob, class_index, class_prob, path, class_prob < floor)


def _choose(probs: PathProbs, config: DecisionConfig, calibration: Calibration) -> UInt8:
    if config.gate == "safe":
        return safe_paths(probs, *_safe_policy(config, calibration, probs.local.shape[1]))
    code = {"mix": MIX, "local": LOCAL, "global": GLOBAL}[config.gate]
    return np.where(skipped(probs), LOCAL, code).astype(np.uint8)


def _safe_policy(
    config: DecisionConfig, calibration: Calibration, n_classes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], float, float, bool]:
    if calibration.reliability_local is None or calibration.reliability_global is None:
        raise UsageError(
            "--gate safe: these weights hold no reliability per class; `cellslide calibrate` fits it on labelled cells"
        )
    local, global_ = (np.array(r, np.float32) for r in (calibration.reliability_local, calibration.reliability_global))
    if len(local) != n_classes or len(global_) != n_classes:
        raise UsageError(f"--gate safe: reliability of {len(local)} and {len(global_)} classes, cells of {n_classes}")
    given = config.tau is not None or config.gamma is not None
    tau = calibration.tau if config.tau is None else config.tau
    gamma = calibration.gamma if config.gamma is None else config.gamma
    return local, global_, tau, gamma, given or calibration.safe_accepts


def skipped(probs: PathProbs) -> Bool:
    """Return bool (N,): the cells whose global path did not run."""
    return np.asarray(np.isnan(probs.gate) | np.isnan(probs.global_).any(axis=1), np.bool_)


def mix(probs: PathProbs) -> Float32:
    """Return (1 - g) local + g global, float32 (N, K), not calibrated; the local row where the global was skipped."""
    g = probs.gate.astype(np.float32)[:, None]
    mixed = (np.float32(1) - g) * probs.local + g * probs.global_
    return np.asarray(np.where(skipped(probs)[:, None], probs.local, mixed), np.float32)


def calibrated(probs: PathProbs, path: UInt8, calibration: Calibration) -> Float32:
    """Return the vector that `path` (N,) names for each cell with the temperature of that vector, float32 (N, K)."""
    temperatures = (calibration.temperature_mix, calibration.temperature_local, calibration.temperature_global)
    prob = np.empty(probs.local.shape, np.float32)
    for code, temperature in enumerate(temperatures):
        rows = path == code
        of_path = PathProbs(probs.local[rows], probs.global_[rows], probs.gate[rows])
        raw = (mix(of_path), of_path.local, of_path.global_)[code]
        prob[rows] = temper(raw, temperature)
    return prob


def temper(prob: Float32, temperature: float) -> Float32:
    """Return softmax(log p / T) for rows (N, K), which is the softmax of logits / T; T = 1 changes nothing.

    Guo et al. 2017, section 4.2. Raises ValueError on a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    if temperature == 1:
        return prob
    log = np.log(np.maximum(prob.astype(np.float64), np.finfo(np.float32).tiny)) / temperature
    scaled = np.exp(log - log.max(axis=1, keepdims=True))
    return np.asarray(scaled / scaled.sum(axis=1, keepdims=True), np.float32)


def prior_ratio(prior: tuple[float, ...], calibration: Calibration) -> Float64:
    """Return the new over the old frequency of each class, float64 (K,).

    Raises UsageError where the weights do not hold the old ones, or hold those of another number of classes.
    """
    if calibration.class_prior is None:
        raise UsageError("--prior: these weights hold no class frequencies to replace; `cellslide calibrate` fits them")
    if len(prior) != len(calibration.class_prior):
        raise UsageError(f"--prior: {len(prior)} values for {len(calibration.class_prior)} classes")
    old = np.maximum(np.array(calibration.class_prior, np.float64), RELIABILITY_EPSILON)
    return np.array(prior, np.float64) / old


def with_prior(prob: Float32, ratio: Float64) -> Float32:
    """Return calibrated rows (N, K) for slides whose classes are `ratio` (K,) times as frequent; rows sum to 1 again.

    Saerens et al. 2002, eq. 2.4.
    """
    shifted = prob.astype(np.float64) * ratio
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)


def read_prior(text: str, classes: tuple[str, ...], calibration: Calibration) -> tuple[float, ...]:
    """Read "class=share,class=share" into one share per class of `classes`; they sum to 1.

    Every class must be named but `NOT_NUCLEUS`, which keeps its share of the calibration, as what a detector finds
    wrongly depends on the detector. Raises UsageError for a class that is not there, is missing, or has no share.
    """
    by_key = {name.casefold(): name for name in classes}
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        known = by_key.get(name.casefold())
        if known is None:
            raise UsageError(f"--prior {part}: no class {name}; the classes are {', '.join(classes)}")
        try:
            shares[known] = float(value) if equals else float("nan")
        except ValueError:
            shares[known] = float("nan")
        if not 0 < shares[known] <= 1:
            raise UsageError(f"--prior {part}: must be CLASS=SHARE with a share above 0, at most 1")
    missing = [name for name in classes if name not in shares and name != NOT_NUCLEUS]
    if missing:
        raise UsageError(f"--prior: no share of {', '.join(missing)}; every class needs one")
    kept = 0.0
    if NOT_NUCLEUS in classes and NOT_NUCLEUS not in shares:
        kept = 0.0 if calibration.class_prior is None else calibration.class_prior[classes.index(NOT_NUCLEUS)]
    total = sum(shares.values()) / (1 - kept)
    return tuple(shares[name] / total if name in shares else kept for name in classes)


def reliability(prob: Float32, true_class: NDArray[Any]) -> Float32:
    """Return the precision of each predicted class, float32 (K,); 0 for a class that is never predicted."""
    n_classes = prob.shape[1]
    named = prob.argmax(axis=1)
    right = np.bincount(named[named == true_class], minlength=n_classes)
    return (right / np.maximum(np.bincount(named, minlength=n_classes), 1)).astype(np.float32)


def baseline_paths(probs: PathProbs, reliability_local: Float32, reliability_global: Float32) -> UInt8:
    """Return for each cell the path of greater top probability times reliability of its class; a tie is local."""
    local_class, global_class = probs.local.argmax(axis=1), np.nan_to_num(probs.global_).argmax(axis=1)
    local = probs.local.max(axis=1) * (reliability_local[local_class] + np.float32(RELIABILITY_EPSILON))
    global_ = probs.global_.max(axis=1) * (reliability_global[global_class] + np.float32(RELIABILITY_EPSILON))
    # A skipped row is NaN there, and NaN is greater than nothing.
    return np.where(global_ > local, GLOBAL, LOCAL).astype(np.uint8)


def safe_paths(
    probs: PathProbs,
    reliability_local: Float32,
    reliability_global: Float32,
    tau: float,
    gamma: float,
    accepts: bool = True,
) -> UInt8:
    """Return the path of each cell by the safe gate, uint8 (N,), local or global.

    Global where g > tau and rho > gamma, local where g < 1 - tau and rho < -gamma, rho = the global minus the local top
    probability; elsewhere, and everywhere if not `accepts`, the baseline. This is the signed form of the published
    code; the paper (NuClass, section 3.3) prints g > tau and |rho| > gamma.
    """
    path = baseline_paths(probs, reliability_local, reliability_global)
    if not accepts:
        return path
    rho = probs.global_.max(axis=1) - probs.local.max(axis=1)
    # Python floats, so that the comparison is made in float32 as published.
    tau, gamma = float(tau), float(gamma)
    path[(probs.gate > tau) & (rho > gamma)] = GLOBAL
    path[(probs.gate < 1.0 - tau) & (rho < -gamma)] = LOCAL
    return path


def floors(config: DecisionConfig, calibration: Calibration, n_classes: int) -> Float32:
    """Return the probability that each class needs, float32 (K,); raises UsageError on another number of thresholds."""
    given = config.thresholds is not None or config.abstain is not None
    source = config if given else calibration
    thresholds = np.zeros(n_classes) if source.thresholds is None else np.array(source.thresholds, np.float64)
    if thresholds.shape != (n_classes,):
        raise UsageError(f"--thresholds: {len(thresholds)} values for {n_classes} classes")
    return np.maximum(thresholds, source.abstain or 0.0).astype(np.float32)


def read_thresholds(path: Path, classes: tuple[str, ...]) -> tuple[float, ...]:
    """Read thresholds per class from a CSV with the header `class,threshold`, or a YAML mapping of class to threshold.

    Returns one value per class of `classes`, 0 for one that the file does not name. Raises UsageError on a class that
    is not there, a value that is not 0 to 1, and a file that cannot be read.
    """
    found = _csv_thresholds(path) if path.suffix.lower() == ".csv" else _yaml_thresholds(path)
    by_key = {name.casefold(): name for name in classes}
    values = dict.fromkeys(classes, 0.0)
    for name, raw in found:
        known = by_key.get(name.casefold())
        if known is None:
            near = get_close_matches(name, classes, n=3, cutoff=0.4) or list(classes)
            raise UsageError(f"--thresholds {path}: no class {name}; did you mean {', '.join(near)}?")
        values[known] = _threshold(raw, name, path)
    return tuple(values[name] for name in classes)


def _threshold(raw: object, name: str, path: Path) -> float:
    try:
        value = float(str(raw))
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise UsageError(f"--thresholds {path}: {name} has {short(raw)}, must be a number from 0 to 1")
    return value


def _csv_thresholds(path: Path) -> list[tuple[str, str]]:
    import csv

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--thresholds {path}: cannot be read as CSV ({error})") from error
    if not rows or rows[0] != ["class", "threshold"] or any(len(row) != 2 for row in rows):
        raise UsageError(f"--thresholds {path}: must have the header class,threshold and two columns")
    return [(name, value) for name, value in rows[1:]]


def _yaml_thresholds(path: Path) -> list[tuple[str, object]]:
    try:
        raw = read_yaml(path, UsageError)
    except (OSError, UsageError) as error:
        raise UsageError(f"--thresholds {path}: cannot be read as YAML ({short(error)})") from error
    if not isinstance(raw, dict):
        raise UsageError(f"--thresholds {path}: must map class names to thresholds")
    return [(str(name), value) for name, value in raw.items()]
