"""The part of `cellslide evaluate` that scores classifiers: on given points, or on nuclei that a model finds."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cellslide.cli import typed
from cellslide.cli.options import settings_of
from cellslide.config import ClassifyConfig, InferConfig, SegmentConfig, TileConfig, TissueConfig
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from cellslide.classify import Classifier
    from cellslide.classify.columns import Rule
    from cellslide.classify.decision import GateRule
    from cellslide.evaluate.dataset import Dataset, Sample
    from cellslide.evaluate.paths import PathScores
    from cellslide.evaluate.protocols import Protocol
    from cellslide.evaluate.report import EvalReport
    from cellslide.evaluate.score import ClassSet, ImageScores, Nuclei
    from cellslide.types import Float64, PathProbs


@dataclass(frozen=True, slots=True)
class Typing:
    """How a classifier is scored.

    nuclei       "given" points of the data set, or those that the segmentation model `detector` finds.
    decision     the flags of the rule: gate, tau, gamma, thresholds, abstain, taxonomy.
    reliability  where the diagram goes, if anywhere.
    protocol     how detected nuclei are paired with the annotated ones.
    """

    nuclei: Literal["given", "detected"]
    detector: str | None
    organ: str | None
    decision: dict[str, Any]
    infer: InferConfig
    tiles: TileConfig
    reliability: Path | None
    no_progress: bool
    protocol: Protocol


@dataclass(frozen=True, slots=True)
class Scored:
    """A report, the tables that are shown beside it, and the scores of each image where nuclei were detected."""

    report: EvalReport
    tables: tuple[Table, ...] = ()
    images: tuple[ImageScores, ...] = ()


def evaluate_classifier(
    data: Dataset, split: str | None, classes: ClassSet, mpp: float | None, model: str | None, weights: Path | None,
    how: Typing,
) -> Scored:  # fmt: skip
    """Score the classifier that `model` and `weights` name; raises UsageError for settings that do not suit it."""
    from cellslide.classify import open_classifier
    from cellslide.classify.rule_settings import RuleSettings
    from cellslide.weights.classifier import load_classifier

    typed.require_classes(data, classes.names)
    config = ClassifyConfig(model, weights, organ=how.organ, infer=how.infer)
    classifier = open_classifier(load_classifier(model, weights), config)
    rule = settings_of(RuleSettings, how.decision).rule(classifier.spec)
    typed.warn_of_unknown_organs(data, classifier.spec, how.organ)
    score = _score_given if how.nuclei == "given" else _score_detected
    return score(data, split, classes, mpp, classifier, rule, how)


def _score_given(
    data: Dataset, split: str | None, classes: ClassSet, mpp: float | None, classifier: Classifier, rule: Rule,
    how: Typing,
) -> Scored:  # fmt: skip
    from cellslide.evaluate.paths import paths_table
    from cellslide.evaluate.predictors import score_given

    with typed.image_progress(data, how.no_progress) as advance:
        report, scores = score_given(
            _name(classifier), data, split, classes, typed.predictor(classifier, how.organ), rule, mpp, how.infer.seed,
            advance,
        )  # fmt: skip
    if how.reliability is not None:
        _draw(how.reliability, scores)
    return Scored(report, (paths_table(scores),))


def _score_detected(
    data: Dataset, split: str | None, classes: ClassSet, mpp: float | None, classifier: Classifier, rule: Rule,
    how: Typing,
) -> Scored:  # fmt: skip
    from cellslide.evaluate.report import evaluate_dataset, summarise

    if how.reliability is not None:
        raise UsageError("--reliability: is drawn of given nuclei, so it goes without --nuclei detected")
    found = _detect(data, mpp, classifier, how)
    reports, images = {}, {}
    for gate in _rules(found, rule):
        decide_by = replace(rule, decision=replace(rule.decision, gate=gate))

        def predict(sample: Sample, size: float, by: Rule = decide_by) -> Nuclei:
            return nuclei_of(*found[sample.image_path], by)

        images[gate] = evaluate_dataset(data, predict, classes, mpp, protocol=how.protocol)
        reports[gate] = summarise(_name(classifier), data, split, classes, images[gate], how.protocol)
    paths = {str(gate): _classified(report) for gate, report in reports.items()}
    gate = rule.decision.gate
    return Scored(replace(reports[gate], nuclei="detected", gate=gate, paths=paths), (), tuple(images[gate]))


def _detect(
    data: Dataset, mpp: float | None, classifier: Classifier, how: Typing
) -> dict[Path, tuple[Float64, PathProbs]]:
    """Return where the segmentation model finds nuclei in each image, and what the network says of them."""
    from cellslide.evaluate.report import pixel_size
    from cellslide.inference.segmenter import open_segmenter
    from cellslide.pipeline import segment_array
    from cellslide.weights import load_model

    infer = replace(how.infer, workers=how.infer.workers or 0)
    config = SegmentConfig(how.detector, None, mpp, tissue=TissueConfig(enabled=False), tiles=how.tiles, infer=infer)
    predict = typed.predictor(classifier, how.organ)
    found = {}
    with ExitStack() as resources:
        segmenter = resources.enter_context(open_segmenter(load_model(how.detector), config))
        for sample in typed.tracked(data, how.no_progress):
            size = pixel_size(sample, mpp)
            xy = segment_array(segmenter, sample.load_image(), size, config).centroid_xy
            found[sample.image_path] = (xy, predict(sample, size, xy))
    return found


def _rules(found: dict[Path, tuple[Float64, PathProbs]], rule: Rule) -> tuple[GateRule, ...]:
    from cellslide.evaluate.paths import ORDER, applies

    probs = [p for _, p in found.values()]
    possible = (name for name in ORDER if any(applies(name, p, rule.calibration) for p in probs))
    return tuple(dict.fromkeys((rule.decision.gate, *possible)))


def nuclei_of(xy: Float64, probs: PathProbs, rule: Rule) -> Nuclei:
    """Return detected nuclei (N, 2) with the class that `rule` gives them, to score; what it rejects is left out."""
    import numpy as np

    from cellslide.classify.columns import is_rejected
    from cellslide.classify.decision import decide
    from cellslide.classify.taxonomy import project
    from cellslide.evaluate.score import Nuclei

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


def _draw(path: Path, scores: dict[GateRule, PathScores | None]) -> None:
    from cellslide.evaluate.diagram import write_reliability

    path.parent.mkdir(parents=True, exist_ok=True)
    write_reliability(path, {name: s.bins for name, s in scores.items() if s is not None})


def _name(classifier: Classifier) -> str:
    return classifier.spec.weights_id or classifier.spec.name
