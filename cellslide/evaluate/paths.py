"""Scores of a two-path classifier on nuclei at given places: local, global, mix and safe gate side by side.

Probabilities are projected onto the classes of the data set first (M^T p), and the most probable of these is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cellslide.classify.decision import DecisionConfig, GateRule, decide, skipped
from cellslide.classify.taxonomy import Taxonomy, project
from cellslide.errors import UsageError
from cellslide.evaluate import classification
from cellslide.evaluate.classification import ReliabilityBins
from cellslide.evaluate.dataset import Dataset, Sample
from cellslide.evaluate.detection import Tally
from cellslide.evaluate.report import ClassScores, DetectionScores, EvalReport, InstanceScores, pixel_size
from cellslide.evaluate.score import ClassSet, truth_of
from cellslide.types import Bool, Calibration, Float64, Int64, PathProbs

# A sample, its pixel size in µm and the places (N, 2) in its pixels -> what the network says of the cells there.
PathPredictor = Callable[[Sample, float, Float64], PathProbs]
ORDER: tuple[GateRule, ...] = ("local", "global", "mix", "safe")


@dataclass(frozen=True, slots=True)
class TypedCells:
    """Nuclei of a data set whose class is known, and what a network says of them.

    true_class  int64 (N,), index into the data set's classes.
    image       int64 (N,), the image of each nucleus, ascending.
    """

    probs: PathProbs
    true_class: Int64
    image: Int64

    def __post_init__(self) -> None:
        if not len(self.probs) == len(self.true_class) == len(self.image):
            raise ValueError("probs, true_class and image must have the same length")


@dataclass(frozen=True, slots=True)
class HardScores:
    """Scores on a subset of the nuclei."""

    n: int
    accuracy: float | None
    macro_f1: float | None


@dataclass(frozen=True, slots=True)
class PathClassScores:
    """One class against the rest."""

    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    auroc: float | None


@dataclass(frozen=True, slots=True)
class PathScores:
    """Scores of one rule over all nuclei; intervals are (low, high) of 95 %.

    accuracy_ci, macro_f1_ci                drawn nucleus by nucleus, as published.
    accuracy_ci_images, macro_f1_ci_images  drawn image by image: nuclei of one image are alike, so these are wider.
    auroc            mean over the classes for which it is defined.
    low_confidence, high_entropy
                     the hardest fifth by the local path's own probabilities: the same nuclei for every rule.
    coverage         share that does not abstain, and the accuracy of that share.
    mass_lost        mean probability that falls on no class of the data set.
    """

    n: int
    n_skipped: int
    accuracy: float | None
    accuracy_ci: tuple[float, float] | None
    accuracy_ci_images: tuple[float, float] | None
    macro_f1: float | None
    macro_f1_ci: tuple[float, float] | None
    macro_f1_ci_images: tuple[float, float] | None
    micro_f1: float | None
    ece: float | None
    brier: float | None
    auroc: float | None
    coverage: float | None
    accuracy_accepted: float | None
    mass_lost: float | None
    low_confidence: HardScores
    high_entropy: HardScores
    classes: dict[str, PathClassScores]
    bins: ReliabilityBins

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self)
        lists = ((int(n), _or_none(a), _or_none(c)) for n, a, c in self._bins())
        values["bins"] = [{"n": n, "accuracy": a, "confidence": c} for n, a, c in lists]
        return values

    def _bins(self) -> list[tuple[Any, ...]]:
        return list(zip(self.bins.n, self.bins.accuracy, self.bins.confidence, strict=True))


def gather(
    dataset: Dataset,
    classes: ClassSet,
    predict: PathPredictor,
    mpp: float | None = None,
    on_image: Callable[[], None] | None = None,
) -> TypedCells:
    """Run `predict` at the typed nuclei of every image, in the order of the manifest.

    `mpp` (µm/px) overrides the manifest's. Raises UsageError if no nucleus has a class or a pixel size is not known.
    """
    sizes = [pixel_size(sample, mpp) for sample in dataset.samples]
    parts: list[tuple[PathProbs, Int64]] = []
    for sample, size in zip(dataset.samples, sizes, strict=True):
        truth = truth_of(sample)
        true_class = classes.index(truth.class_name or ("",) * len(truth))
        known = true_class >= 0
        if known.any():
            parts.append((predict(sample, size, truth.xy[known]), true_class[known]))
        if on_image is not None:
            on_image()
    if not parts:
        raise UsageError(f"{dataset.root}: no nucleus has a class, so there is nothing to classify")
    columns = ("local", "global_", "gate")
    probs = PathProbs(*(np.concatenate([getattr(p, c) for p, _ in parts]) for c in columns))
    image = np.repeat(np.arange(len(parts)), [len(t) for _, t in parts])
    return TypedCells(probs, np.concatenate([t for _, t in parts]), image.astype(np.int64))


def projection(class_names: Sequence[str], classes: ClassSet, taxonomy: Taxonomy | None = None) -> Taxonomy:
    """Return the matrix from a classifier's classes to the data set's, by name, after `taxonomy` where one is given.

    Raises UsageError if no class has a counterpart.
    """
    names = tuple(class_names) if taxonomy is None else taxonomy.names
    step = np.zeros((len(names), len(classes.names)), np.float32)
    for row, target in enumerate(classes.index(names).tolist()):
        if target >= 0:
            step[row, target] = 1
    if not step.any():
        raise UsageError(
            f"no class of the weights ({', '.join(names)}) is one of the data set's ({', '.join(classes.names)}): "
            "say which is which with --map-class PREDICTED=TRUE"
        )
    matrix = step if taxonomy is None else taxonomy.matrix @ step
    return Taxonomy("data set", matrix, classes.names)


def score_paths(
    cells: TypedCells, taxonomy: Taxonomy, config: DecisionConfig, calibration: Calibration, seed: int = 0
) -> dict[GateRule, PathScores | None]:
    """Score every rule on the same nuclei; None for one that these weights cannot apply.

    `taxonomy` leads to the classes that `cells.true_class` counts.
    """
    hard = _hard_subsets(cells.probs)
    return {
        rule: _score(cells, taxonomy, replace(config, gate=rule), calibration, hard, seed)
        if applies(rule, cells.probs, calibration)
        else None
        for rule in ORDER
    }


def applies(rule: GateRule, probs: PathProbs, calibration: Calibration) -> bool:
    """Say whether a rule can be applied: the safe gate needs reliability, all but local the global path."""
    if rule == "local":
        return True
    if rule == "safe" and (calibration.reliability_local is None or calibration.reliability_global is None):
        return False
    return not bool(skipped(probs).all())


def _hard_subsets(probs: PathProbs) -> tuple[Bool, Bool]:
    unsure = classification.hardest(-probs.local.max(axis=1))
    return unsure, classification.hardest(classification.entropy(probs.local))


def _score(
    cells: TypedCells,
    taxonomy: Taxonomy,
    config: DecisionConfig,
    calibration: Calibration,
    hard: tuple[Bool, Bool],
    seed: int,
) -> PathScores:
    decision = decide(cells.probs, config, calibration)
    prob, lost = project(decision.prob, taxonomy)
    true, named = cells.true_class, prob.argmax(axis=1)
    confidence = prob.max(axis=1)
    # All probability on classes that the data set lacks names none of its own.
    named = np.where(confidence > 0, named, -1)
    right = named == true
    counts = image_confusion(true, named, cells.image, len(taxonomy.names))
    tallies = classification.class_tallies(true, named, len(taxonomy.names))
    one_by_one = classification.bootstrap(counts.sum(axis=0, keepdims=True), seed)
    by_image = classification.bootstrap(counts, seed) if len(counts) > 1 else classification.Intervals(None, None)
    areas = classification.auroc(prob, true)
    pooled = sum(tallies, Tally())
    return PathScores(
        n=len(true),
        n_skipped=int(skipped(cells.probs).sum()),
        accuracy=classification.accuracy(true, named),
        accuracy_ci=one_by_one.accuracy,
        accuracy_ci_images=by_image.accuracy,
        macro_f1=classification.mean_f1(tallies),
        macro_f1_ci=one_by_one.macro_f1,
        macro_f1_ci_images=by_image.macro_f1,
        micro_f1=pooled.f1,
        ece=classification.expected_calibration_error(confidence, right),
        brier=classification.brier_score(np.column_stack([prob, lost]), true),
        auroc=_mean([a for a in areas if a is not None]),
        coverage=_mean((~decision.abstained).tolist()),
        accuracy_accepted=_mean(right[~decision.abstained].tolist()),
        mass_lost=_mean(lost.tolist()),
        low_confidence=_on(hard[0], true, named, len(taxonomy.names)),
        high_entropy=_on(hard[1], true, named, len(taxonomy.names)),
        classes={
            name: PathClassScores(t.precision, t.recall, t.f1, t.support, area)
            for name, t, area in zip(taxonomy.names, tallies, areas, strict=True)
        },
        bins=classification.reliability_bins(confidence, right),
    )


def image_confusion(true_class: Int64, named: Int64, image: Int64, n_classes: int) -> Int64:
    """Return confusion counts (images, C, C + 1), rows truth; the last column counts nuclei given none of the C."""
    n_images = int(image.max()) + 1 if len(image) else 0
    counts = np.zeros((n_images, n_classes, n_classes + 1), np.int64)
    np.add.at(counts, (image, true_class, named), 1)  # Class -1 is the last column.
    return counts


def _on(subset: Bool, true_class: Int64, named: Int64, n_classes: int) -> HardScores:
    true, pred = true_class[subset], named[subset]
    tallies = classification.class_tallies(true, pred, n_classes)
    return HardScores(len(true), classification.accuracy(true, pred), classification.mean_f1(tallies))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def paths_report(
    model: str,
    dataset: Dataset,
    split: str | None,
    mpp: float | None,
    scores: dict[GateRule, PathScores | None],
    rule: GateRule,
    warnings: Sequence[str] = (),
) -> EvalReport:
    """Return the report of a data set: the shared keys are those of `rule`, `paths` holds every rule.

    Where the global path ran for no nucleus, the local path decided them all: the report is of `local` and says so.
    """
    chosen = scores[rule]
    if chosen is None:
        warnings = (*warnings, f"--gate {rule}: the global path did not run, so the local path decided every nucleus")
        rule, chosen = "local", scores["local"]
    assert chosen is not None, "the local path can always be applied"
    return EvalReport(
        model=model,
        dataset=dataset.name,
        split=split,
        n_images=len(dataset),
        n_nuclei=chosen.n,
        mpp=mpp,
        instance=InstanceScores(),
        detection=DetectionScores(),
        classes=tuple(ClassScores(n, c.precision, c.recall, c.f1, c.support) for n, c in chosen.classes.items()),
        mean_f1=chosen.macro_f1,
        accuracy=chosen.accuracy,
        ece=chosen.ece,
        brier=chosen.brier,
        warnings=tuple(warnings),
        nuclei="given",
        gate=rule,
        paths={name: None if s is None else s.as_dict() for name, s in scores.items()},
    )
