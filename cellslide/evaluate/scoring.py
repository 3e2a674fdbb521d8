"""A data set that is ready to be scored on: its images, its classes, and how found nuclei are paired with true ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cellslide.classify.columns import Rule, is_rejected
from cellslide.classify.decision import decide
from cellslide.classify.taxonomy import project
from cellslide.errors import UsageError
from cellslide.evaluate.calibration import class_labels
from cellslide.evaluate.dataset import Dataset, Sample
from cellslide.evaluate.layouts.registry import open_dataset
from cellslide.evaluate.paths import ORDER, PathPredictor, TypedCells, applies, gather
from cellslide.evaluate.protocols import Protocol, protocol_of
from cellslide.evaluate.report import EvalReport, Predictor, evaluate_dataset, pixel_size, summarise
from cellslide.evaluate.score import ClassSet, ImageScores, Nuclei, scored_classes
from cellslide.progress import Progress, Silent
from cellslide.types import Float64, PathProbs

if TYPE_CHECKING:
    from cellslide.classify.decision import GateRule

Scored = tuple[EvalReport, list[ImageScores]]
# Detected nuclei (N, 2) of an image, and what the network says of them.
Found = tuple[Float64, PathProbs]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scoring:
    """Images of a data set, of one split if named, to be scored; `mpp` (µm/px) goes over what the manifest says."""

    data: Dataset
    split: str | None
    classes: ClassSet
    protocol: Protocol
    mpp: float | None = None
    progress: Progress = Silent()

    @classmethod
    def read(
        cls,
        folder: Path,
        split: str | None,
        protocol: str | None = None,
        mpp: float | None = None,
        limit: int | None = None,
        class_map: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Read a manifest, and check it before a network is loaded for nothing.

        limit  only so many images.
        Raises UsageError for a data set that cannot be read, an unknown protocol, or a pixel size that is not known.
        """
        data = open_dataset(folder, split)
        data = replace(data, samples=data.samples[:limit])
        rule = protocol_of(protocol, data)
        if rule.cut is not None:
            data = replace(data, samples=tuple(part for sample in data.samples for part in rule.cut(sample)))
        for sample in data.samples:
            pixel_size(sample, mpp)
        return cls(data, split, scored_classes(data, rule, class_map), rule, mpp, progress or Silent())

    def score(self, name: str, predict: Predictor) -> Scored:
        """Score every image by what `predict` finds in it; `name` is that of the model."""
        self.progress.begin(self.data.name, len(self.data), 0)
        scores = evaluate_dataset(
            self.data, predict, self.classes, self.mpp, lambda _: self.progress.advance(0), self.protocol
        )
        return summarise(name, self.data, self.split, self.classes, scores, self.protocol), scores

    def score_detected(self, name: str, found: Mapping[Path, Found], rule: Rule) -> Scored:
        """Score detected nuclei, by the path of their image, as every rule types them; the report is that of `rule`."""
        reports: dict[GateRule, EvalReport] = {}
        images: dict[GateRule, list[ImageScores]] = {}
        quiet = replace(self, progress=Silent())
        for gate in _rules(found, rule):
            decide_by = replace(rule, decision=replace(rule.decision, gate=gate))

            def predict(sample: Sample, size: float, by: Rule = decide_by) -> Nuclei:
                return typed_nuclei(*found[sample.image_path], by)

            reports[gate], images[gate] = quiet.score(name, predict)
        gate = rule.decision.gate
        paths = {str(name): _classified(report) for name, report in reports.items()}
        return replace(reports[gate], nuclei="detected", gate=gate, paths=paths), images[gate]

    def typed_cells(self, predict: PathPredictor) -> TypedCells:
        """Type the annotated nuclei of all images."""
        self.progress.begin(self.data.name, len(self.data), 0)
        return gather(self.data, self.classes, predict, self.mpp, lambda: self.progress.advance(0))

    def require_classes(self) -> None:
        """Raise UsageError where the points have no classes."""
        if not self.classes.names:
            raise UsageError(f"{self.data.root}: its points have no classes, which a classifier is compared with")

    def warn_of_unknown_organs(self, known: Sequence[str], index_of: Callable[[str], int]) -> None:
        """Say which organs of the manifest the weights do not know; `index_of` gives -1 for those."""
        unknown = sorted({sample.organ or "(none)" for sample in self.data.samples if index_of(sample.organ) < 0})
        if unknown:
            log.warning("organs that the weights do not know: %s (they know %s)", ", ".join(unknown), ", ".join(known))


def _rules(found: Mapping[Path, Found], rule: Rule) -> tuple[GateRule, ...]:
    probs = [p for _, p in found.values()]
    possible = (name for name in ORDER if any(applies(name, p, rule.calibration) for p in probs))
    return tuple(dict.fromkeys((rule.decision.gate, *possible)))


def typed_nuclei(xy: Float64, probs: PathProbs, rule: Rule) -> Nuclei:
    """Return detected nuclei (N, 2) with the class that `rule` gives them, to score; what it rejects is left out."""
    decision, names = decide(probs, rule.decision, rule.calibration), rule.classes
    kept = ~is_rejected(decision, names)
    xy, prob = xy[kept], decision.prob[kept]
    if rule.taxonomy is not None:
        prob, lost = project(prob, rule.taxonomy)
        prob, names = np.column_stack([prob, lost]), (*rule.taxonomy.names, "(no class)")
    class_name = tuple(names[k] for k in prob.argmax(axis=1)) if len(prob) else ()
    return Nuclei(xy, class_name=class_name, prob=prob.astype(np.float64), prob_names=names)


def _classified(report: EvalReport) -> dict[str, Any]:
    """Return what a rule changes in a report of detected nuclei."""
    values = {key: getattr(report, key) for key in ("mean_f1", "accuracy", "ece", "brier")}
    return {**values, "classes": {c.name: asdict(c) for c in report.classes or ()}}


def known_cells(cells: TypedCells, classes: ClassSet, names: tuple[str, ...]) -> TypedCells:
    """Return the cells whose class is one of a classifier's `names`, with that class; warns of the others.

    Raises UsageError where no cell has one.
    """
    labels = class_labels(cells.true_class, classes.names, classes.index(names))
    known = labels >= 0
    if not known.any():
        raise UsageError("no nucleus has a class of the weights: say which is which with --map-class PREDICTED=TRUE")
    if not known.all():
        log.warning("%d nuclei have a class that the weights do not know; they are left out", int((~known).sum()))
    probs = PathProbs(cells.probs.local[known], cells.probs.global_[known], cells.probs.gate[known])
    return TypedCells(probs, labels[known], cells.image[known])
