"""The result of an evaluation: scores of images gathered into one record, written as JSON, CSV and a table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellslide.errors import UsageError
from cellslide.evaluate import classification
from cellslide.evaluate.dataset import Dataset, Sample
from cellslide.evaluate.detection import RADIUS_UM, Tally
from cellslide.evaluate.intervals import intervals
from cellslide.evaluate.matching import pooled_pq
from cellslide.evaluate.protocols import OPTIMAL, Protocol, protocol_of
from cellslide.evaluate.score import ClassSet, ImageScores, Nuclei, score_image, truth_of
from cellslide.formats.csv_text import harmless

if TYPE_CHECKING:
    from rich.table import Table

IMAGE_COLUMNS = (
    *("image", "organ", "mpp", "n_true", "n_pred", "bpq", "bdq", "bsq", "mpq", "aji", "aji_plus", "dice"),
    *("tp_iou50", "fp_iou50", "fn_iou50", "tp_detection", "fp_detection", "fn_detection", "f1_detection"),
)

Predictor = Callable[[Sample, float], Nuclei]


@dataclass(frozen=True, slots=True)
class InstanceScores:
    """Instance scores of a data set: means over images that have true nuclei, but `f1_iou50` is from pooled counts.

    mpq, mdq, msq  means over images of the mean over the classes that the image's truth has, so mpq is not mdq * msq.
    mpq_pooled     mean over classes of the PQ of all images' counts together (CoNIC's mPQ+).
    """

    bpq: float | None = None
    bdq: float | None = None
    bsq: float | None = None
    mpq: float | None = None
    aji: float | None = None
    dice: float | None = None
    f1_iou50: float | None = None
    bpq_tissue: float | None = None
    aji_plus: float | None = None
    mdq: float | None = None
    msq: float | None = None
    mpq_tissue: float | None = None
    mpq_pooled: float | None = None


@dataclass(frozen=True, slots=True)
class DetectionScores:
    """Detection within `radius_um`, from counts pooled over the images."""

    radius_um: float = RADIUS_UM
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Detection of one class with the class, from pooled counts; `support` is the number of true nuclei."""

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclass(frozen=True, slots=True)
class ClassQuality:
    """Quality of the outlines of one class: means over the images whose truth has the class."""

    pq: float | None
    dq: float | None
    sq: float | None


@dataclass(frozen=True, slots=True)
class GroupScores:
    """Scores of the images of one organ or cohort, or their mean over organs."""

    n_images: int
    n_nuclei: int
    bpq: float | None = None
    detection_f1: float | None = None
    mean_f1: float | None = None
    ece: float | None = None

    def scores(self) -> dict[str, float | None]:
        """Return the scores by name, without the counts."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("n_")}


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Scores of a model on a data set; None is what does not apply.

    nuclei  for a classifier, whose places were typed: "given" ones or those "detected" by a segmentation model.
    gate    the rule that the shared keys are about; `paths` holds the scores of every rule.
    protocol  the rule by which found nuclei are paired with true ones, None where places were given.
    class_quality  of the outlines, by class, where they have classes.
    organs, cohorts  scores of the images of each, where there are two or more.
    macro     means over the organs, each organ alike.
    intervals  95 % of the bootstrap over images, by score: (low, high).
    """

    model: str
    dataset: str
    split: str | None
    n_images: int
    n_nuclei: int
    mpp: float | None
    instance: InstanceScores
    detection: DetectionScores
    classes: tuple[ClassScores, ...] | None
    mean_f1: float | None
    accuracy: float | None
    ece: float | None
    brier: float | None
    warnings: tuple[str, ...] = ()
    nuclei: str | None = None
    gate: str | None = None
    paths: dict[str, Any] | None = None
    protocol: str | None = None
    class_quality: dict[str, ClassQuality] | None = None
    organs: dict[str, GroupScores] | None = None
    cohorts: dict[str, GroupScores] | None = None
    macro: GroupScores | None = None
    intervals: dict[str, tuple[float, float]] | None = None

    def to_json(self) -> str:
        """Return the report as JSON text, keys in the order of the record and classes keyed by name."""
        record = asdict(self)
        if self.classes is not None:
            record["classes"] = {c.name: {k: v for k, v in asdict(c).items() if k != "name"} for c in self.classes}
        return json.dumps(record, indent=2, allow_nan=False) + "\n"

    def table(self) -> Table:
        """Return the report as a table for the terminal."""
        from rich.table import Table

        table = Table(title=f"{self.model} on {self.dataset}: {self.n_images} images, {self.n_nuclei} nuclei")
        table.add_column("score")
        table.add_column("value", justify="right")
        table.add_column("95 % over images", justify="right")
        for name, value in self._rows():
            low_high = (self.intervals or {}).get(name.partition(" within")[0].replace("detection f1", "detection_f1"))
            spread = "" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}"
            table.add_row(name, "-" if value is None else f"{value:.4f}", spread)
        return table

    def tables(self) -> list[Table]:
        """Return all tables for the terminal: the report, its groups, and the rules on given nuclei side by side."""
        rules = [_rules_table(self.paths)] if self.paths is not None and self.nuclei == "given" else []
        return [self.table(), *self.group_tables(), *rules]

    def group_tables(self) -> list[Table]:
        """Return tables of the scores by organ and by cohort, as far as there are any."""
        from rich.table import Table

        tables = []
        for title, groups in (("by organ", self.organs), ("by cohort", self.cohorts)):
            if groups is None:
                continue
            names = [
                name
                for name in GroupScores(0, 0).scores()
                if any(g.scores()[name] is not None for g in groups.values())
            ]
            table = Table(title=title)
            for i, column in enumerate((title.removeprefix("by "), "images", "nuclei", *names)):
                table.add_column(column, justify="left" if i == 0 else "right")
            for group, g in groups.items():
                values = [g.scores()[name] for name in names]
                cells = ["-" if value is None else f"{value:.3f}" for value in values]
                table.add_row(group, str(g.n_images), str(g.n_nuclei), *cells)
            tables.append(table)
        return tables

    def _rows(self) -> list[tuple[str, float | None]]:
        rows: list[tuple[str, float | None]] = [(n, v) for n, v in asdict(self.instance).items() if v is not None]
        rule = f" ({self.protocol})" if self.protocol not in (None, OPTIMAL.name) else ""
        within = f"within {self.detection.radius_um:g} µm{rule}"
        if self.nuclei != "given":
            rows += [(f"detection {n} {within}", getattr(self.detection, n)) for n in ("precision", "recall", "f1")]
        rows += [(f"{c.name} f1 ({c.support} nuclei)", c.f1) for c in self.classes or ()]
        rows += [(n, getattr(self, n)) for n in ("mean_f1", "accuracy", "ece", "brier") if getattr(self, n) is not None]
        if self.macro is not None:
            rows += [(f"mean over organs, {n}", v) for n, v in self.macro.scores().items() if v is not None]
        return rows


def _rules_table(paths: Mapping[str, Any]) -> Table:
    """Return the scores of the rules that these weights can apply, a column each."""
    from rich.table import Table

    shown = {name: scores for name, scores in paths.items() if scores is not None}
    table = Table(title="all rules on the same nuclei (95 % intervals over nuclei)")
    table.add_column("score")
    for name in shown:
        table.add_column(name, justify="right")
    for label, key in _RULE_ROWS:
        table.add_row(label, *(_cell(scores, key) for scores in shown.values()))
    return table


def _cell(scores: Mapping[str, Any], key: str) -> str:
    top, _, name = key.rpartition(".")
    value = (scores[top] if top else scores)[name]
    interval = scores.get(f"{key}_ci")
    text = "-" if value is None else f"{value:.4f}"
    return text if interval is None else f"{text} ({interval[0]:.3f}-{interval[1]:.3f})"


_RULE_ROWS = (
    ("accuracy = micro F1", "accuracy"),
    ("macro F1", "macro_f1"),
    ("ECE, 15 bins", "ece"),
    ("Brier score", "brier"),
    ("AUROC", "auroc"),
    ("macro F1, low confidence", "low_confidence.macro_f1"),
    ("macro F1, high entropy", "high_entropy.macro_f1"),
    ("accepted", "coverage"),
    ("accuracy of the accepted", "accuracy_accepted"),
)


def pixel_size(sample: Sample, mpp: float | None) -> float:
    """Return the pixel size of a sample in µm, `mpp` if given; raises UsageError if neither says it."""
    if mpp is not None:
        return mpp
    if sample.mpp is None:
        raise UsageError(f"{sample.image_path}: the manifest gives no pixel size (mpp is empty); give it with --mpp")
    return sample.mpp


def evaluate_dataset(
    dataset: Dataset,
    predict: Predictor,
    classes: ClassSet,
    mpp: float | None = None,
    on_image: Callable[[ImageScores], None] | None = None,
    protocol: Protocol | None = None,
) -> list[ImageScores]:
    """Predict and score every image in the order of the manifest; `mpp` (µm/px) overrides the manifest.

    `protocol` None is what suits the data set. Every pixel size is checked before the first prediction. Raises what
    `predict` raises, and UsageError.
    """
    rule = protocol or protocol_of(None, dataset)
    sizes = [pixel_size(sample, mpp) for sample in dataset.samples]
    scores = []
    for sample, size in zip(dataset.samples, sizes, strict=True):
        scores.append(score_image(sample, truth_of(sample), predict(sample, size), size, classes, rule))
        if on_image is not None:
            on_image(scores[-1])
    return scores


def summarise(
    model: str,
    dataset: Dataset,
    split: str | None,
    classes: ClassSet,
    scores: Sequence[ImageScores],
    protocol: Protocol | None = None,
) -> EvalReport:
    """Gather the scores of images into the report of a data set; `protocol` is the one that they were scored by."""
    rule = protocol or protocol_of(None, dataset)
    sizes = {s.mpp for s in scores}
    shared = _share_classes(scores)
    classified = _classes(scores, classes.names, rule) if shared else None
    accuracy, ece, brier = _typing(scores) if shared else (None, None, None)
    organs = _groups(scores, [s.organ if _organ_known(s.organ) else "" for s in scores], classes, rule)
    return EvalReport(
        model=model,
        dataset=dataset.name,
        split=split,
        n_images=len(scores),
        n_nuclei=sum(s.n_true for s in scores),
        mpp=sizes.pop() if len(sizes) == 1 else None,
        instance=_instance(scores, shared),
        detection=_detection(scores, rule),
        classes=classified,
        mean_f1=_mean_f1(classified, rule),
        accuracy=accuracy,
        ece=ece,
        brier=brier,
        warnings=tuple(_warnings(dataset, classes, scores)),
        protocol=rule.name,
        class_quality=_class_quality(scores, classes.names) if shared else None,
        organs=organs,
        cohorts=_groups(scores, [s.cohort for s in scores], classes, rule),
        macro=None if organs is None else _macro(list(organs.values())),
        intervals=intervals(scores, len(classes.names) if shared else 0, rule),
    )


def _mean_f1(classified: Sequence[ClassScores] | None, rule: Protocol) -> float | None:
    return None if classified is None else _mean([c.f1 for c in classified if c.support or rule.per_image])


def _groups(
    scores: Sequence[ImageScores], names: Sequence[str], classes: ClassSet, rule: Protocol
) -> dict[str, GroupScores] | None:
    """Return the scores of the images of each name, None unless there are two names or more; "" is no name."""
    known = sorted(set(names) - {""})
    if len(known) < 2:
        return None
    return {
        name: _group([s for s, of in zip(scores, names, strict=True) if of == name], classes, rule) for name in known
    }


def _group(scores: Sequence[ImageScores], classes: ClassSet, rule: Protocol) -> GroupScores:
    shared = _share_classes(scores)
    return GroupScores(
        n_images=len(scores),
        n_nuclei=sum(s.n_true for s in scores),
        bpq=_mean([s.bpq for s in scores if s.n_true]),
        detection_f1=_detection(scores, rule).f1,
        mean_f1=_mean_f1(_classes(scores, classes.names, rule), rule) if shared else None,
        ece=_typing(scores)[1] if shared else None,
    )


def _macro(groups: Sequence[GroupScores]) -> GroupScores:
    means = {name: _mean([g.scores()[name] for g in groups]) for name in groups[0].scores()}
    return GroupScores(sum(g.n_images for g in groups), sum(g.n_nuclei for g in groups), **means)


def write_per_image(path: Path, scores: Sequence[ImageScores]) -> None:
    """Write one CSV row per image; what does not apply is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(IMAGE_COLUMNS)
        writer.writerows(_image_row(s) for s in scores)


def _image_row(s: ImageScores) -> list[Any]:
    q, d = s.quality, s.detection
    row = [harmless(s.image), harmless(s.organ), s.mpp, s.n_true, s.n_pred]
    row += [_finite(v) for v in (s.bpq, s.bdq, s.bsq, _class_mean(s, "pq"), s.aji, s.aji_plus, s.dice)]
    row += [q.tp, q.fp, q.fn] if q else [None] * 3
    return row + ([d.tp, d.fp, d.fn, d.f1] if d else [None] * 4)


def _instance(scores: Sequence[ImageScores], shared_classes: bool) -> InstanceScores:
    # An image without true nuclei is in no mean (its PQ is not defined); its false positives count in the pooled F1.
    filled = [s for s in scores if s.n_true]
    pooled = _pool([None if s.quality is None else Tally(s.quality.tp, s.quality.fp, s.quality.fn) for s in scores])
    return InstanceScores(
        bpq=_mean([s.bpq for s in filled]),
        bdq=_mean([s.bdq for s in filled]),
        bsq=_mean([s.bsq for s in filled]),
        mpq=_mean([_class_mean(s, "pq") for s in filled]) if shared_classes else None,
        aji=_mean([s.aji for s in filled]),
        dice=_mean([s.dice for s in filled]),
        f1_iou50=None if pooled is None else pooled.f1,
        bpq_tissue=_tissue_mean(filled, lambda s: s.bpq),
        aji_plus=_mean([s.aji_plus for s in filled]),
        mdq=_mean([_class_mean(s, "dq") for s in filled]) if shared_classes else None,
        msq=_mean([_class_mean(s, "sq") for s in filled]) if shared_classes else None,
        mpq_tissue=_tissue_mean(filled, lambda s: _class_mean(s, "pq")) if shared_classes else None,
        mpq_pooled=_pooled_quality(scores) if shared_classes else None,
    )


def _detection(scores: Sequence[ImageScores], rule: Protocol) -> DetectionScores:
    pooled = _pool([s.detection for s in scores])
    if pooled is None:
        return DetectionScores(rule.radius_um)
    return DetectionScores(rule.radius_um, pooled.precision, pooled.recall, pooled.f1)


def _share_classes(scores: Sequence[ImageScores]) -> bool:
    """Whether any predicted class is one that is scored; predictions without any nucleus have nothing against it."""
    return any(s.scored_names for s in scores) or not any(s.other_names for s in scores)


def _classes(scores: Sequence[ImageScores], names: Sequence[str], rule: Protocol) -> tuple[ClassScores, ...] | None:
    typed = [(s.by_class, s.support) for s in scores if s.by_class is not None]
    if not typed or not names:
        return None
    found = []
    for k, name in enumerate(names):
        each = [tallies[k] for tallies, _ in typed]
        pooled = sum(each, Tally())
        # An image without the class counts 0 in a mean over images, as PUMA has it.
        f1 = _mean([t.f1 or 0.0 for t in each]) if rule.per_image and pooled.f1 is not None else pooled.f1
        found.append(ClassScores(name, pooled.precision, pooled.recall, f1, sum(support[k] for _, support in typed)))
    return tuple(found)


def _class_quality(scores: Sequence[ImageScores], names: Sequence[str]) -> dict[str, ClassQuality] | None:
    outlined = [s.class_quality for s in scores if s.class_quality is not None]
    if not outlined:
        return None
    return {
        name: ClassQuality(*(_mean([getattr(of[k], part) for of in outlined]) for part in ("pq", "dq", "sq")))
        for k, name in enumerate(names)
    }


def _pooled_quality(scores: Sequence[ImageScores]) -> float | None:
    outlined = [s.class_quality for s in scores if s.class_quality is not None]
    return _mean([pooled_pq(each) for each in zip(*outlined, strict=True)])


def _tissue_mean(scores: Sequence[ImageScores], score: Callable[[ImageScores], float | None]) -> float | None:
    """Mean over organs of the mean of a score over their images; None unless the organ of every image is known."""
    if not all(_organ_known(s.organ) for s in scores):
        return None
    organs = sorted({s.organ for s in scores})
    return _mean([_mean([score(s) for s in scores if s.organ == organ]) for organ in organs])


def _organ_known(organ: str) -> bool:
    return bool(organ) and not organ.casefold().startswith(("unknown", "one of"))


def _class_mean(s: ImageScores, part: str) -> float | None:
    return None if s.class_quality is None else _mean([getattr(q, part) for q in s.class_quality])


def _typing(scores: Sequence[ImageScores]) -> tuple[float | None, float | None, float | None]:
    """Accuracy and Brier score over all nuclei that were found, ECE over those that have a class."""
    typed = [s.typed for s in scores if s.typed is not None]
    if not typed:
        return None, None, None
    true = np.concatenate([t.true_class for t in typed])
    named = np.concatenate([t.pred_class for t in typed])
    accuracy = classification.accuracy(true, named)
    probs = [t.prob for t in typed if t.prob is not None]
    confidences = [t.confidence for t in typed if t.confidence is not None]
    if len(probs) != len(typed):
        return accuracy, None, None
    said = np.concatenate([t.decided for t in typed])
    ece = classification.expected_calibration_error(np.concatenate(confidences)[said], (true == named)[said])
    prob = np.concatenate(probs)
    known = np.isfinite(prob).all(axis=1)
    return accuracy, ece, classification.brier_score(prob[known], true[known])


def _warnings(dataset: Dataset, classes: ClassSet, scores: Sequence[ImageScores]) -> list[str]:
    found = []
    derived = sum(sample.derived_instances for sample in dataset.samples)
    if derived:
        found.append(
            f"{derived} image(s) have a hand-drawn foreground only (instances are derived): they give Dice alone"
        )
    empty = sum(s.n_true == 0 for s in scores)
    if empty:
        found.append(f"{empty} image(s) have no true nucleus: they are in no mean over images")
    scored = sorted({name for s in scores for name in s.scored_names})
    words = ", ".join(f"{name} as {new}" for name, new in classes.synonyms(scored).items())
    if words:
        found.append(f"classes count under another name: {words} (--map-class PREDICTED=TRUE says otherwise)")
    other = sorted({name for s in scores for name in s.other_names})
    if other:
        found.append(
            f"predicted classes that are not scored: {', '.join(other)} (the data set has {', '.join(classes.names)}; "
            "--map-class PREDICTED=TRUE says which is which)"
        )
    return found


def _pool(tallies: Sequence[Tally | None]) -> Tally | None:
    known = [t for t in tallies if t is not None]
    return sum(known, Tally()) if known else None


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and not math.isnan(v)]
    return math.fsum(known) / len(known) if known else None
