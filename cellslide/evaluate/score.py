"""Scores of one image: truth and prediction as one record, compared nucleus by nucleus.

Everything is in pixels of the image; points are (x, y).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellslide.errors import UsageError
from cellslide.evaluate import matching
from cellslide.evaluate.dataset import Dataset, Sample
from cellslide.evaluate.detection import Pairs, Tally, centroids
from cellslide.evaluate.protocols import OPTIMAL, Marks, Protocol
from cellslide.types import Bool, Float64, Int32, Int64


@dataclass(frozen=True, slots=True)
class Nuclei:
    """The nuclei of one image, true or predicted.

    xy           float64 (N, 2), centroids or points.
    labels       int32 (H, W) label map, or None where there are points only.
    label_id     int64 (N,), the label of each nucleus, with `labels`.
    class_name   N names, "" where not known, or None if nuclei have no classes.
    prob         float64 (N, K) over `prob_names`, or None.
    score        float64 (N,), the confidence in each, or None.
    """

    xy: Float64
    labels: Int32 | None = None
    label_id: Int64 | None = None
    class_name: tuple[str, ...] | None = None
    prob: Float64 | None = None
    prob_names: tuple[str, ...] = ()
    score: Float64 | None = None

    def __post_init__(self) -> None:
        for name in ("label_id", "class_name", "prob", "score"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.xy):
                raise ValueError(f"Nuclei.{name} has {len(column)} rows, expected {len(self.xy)}")
        if (self.labels is None) != (self.label_id is None):
            raise ValueError("labels and label_id go together")
        if self.prob is not None and self.prob.shape[1] != len(self.prob_names):
            raise ValueError(f"{self.prob.shape[1]} probabilities for {len(self.prob_names)} classes")

    def __len__(self) -> int:
        return len(self.xy)

    @classmethod
    def none(cls, shape: tuple[int, int] | None, class_names: tuple[str, ...] = ()) -> Nuclei:
        """Return an image without nuclei: with an empty label map of `shape` (H, W), or None for points."""
        labels = None if shape is None else np.zeros(shape, np.int32)
        label_id = None if shape is None else np.zeros(0, np.int64)
        if not class_names:
            return cls(np.zeros((0, 2)), labels, label_id)
        return cls(np.zeros((0, 2)), labels, label_id, (), np.zeros((0, len(class_names))), class_names)

    @classmethod
    def from_labels(cls, labels: Int32) -> Nuclei:
        """Return the nuclei of a label map, without classes."""
        label_id, xy = centroids(labels)
        return cls(xy, labels, label_id)


# Names under which data sets and models hold one kind of nucleus.
SYNONYMS = (
    ("lymphocyte", "inflammatory"),
    ("epithelial", "tumor_epithelial", "neoplastic"),
    ("stromal", "connective", "spindle_shaped"),
)


@dataclass(frozen=True, slots=True)
class ClassSet:
    """The classes that are scored, and how predicted names map onto them; case, blanks, - and _ make no difference.

    A predicted name that is no class of the data set counts as the one that `SYNONYMS` holds beside it, if there is
    just one.
    """

    names: tuple[str, ...]
    renamed: Mapping[str, str]
    assumed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, names: Sequence[str], class_map: Mapping[str, str] | None = None) -> ClassSet:
        """Return the set; `class_map` says which class a predicted name counts as. Raises UsageError on a bad name."""
        known = {_key(name) for name in names}
        wrong = [f"{old}={new}" for old, new in (class_map or {}).items() if _key(new) not in known]
        if wrong:
            raise UsageError(f"--map-class {', '.join(wrong)}: the data set's classes are {', '.join(names) or 'none'}")
        given = {_key(old): _key(new) for old, new in (class_map or {}).items()}
        synonyms = {name: new for name, new in _synonyms(known).items() if name not in given}
        return cls(tuple(names), {**synonyms, **given}, frozenset(synonyms))

    def synonyms(self, names: Sequence[str]) -> dict[str, str]:
        """Return which of predicted `names` count as another name of their kind, and as which."""
        places = zip(names, self.index(names).tolist(), strict=True)
        return {name: self.names[k] for name, k in places if _key(name) in self.assumed}

    def index(self, names: Sequence[str]) -> Int64:
        """Return the class of each name, int64 (N,), -1 for one that is not scored."""
        place = {_key(name): i for i, name in enumerate(self.names)}
        found: dict[str, int] = {}
        for name in set(names):
            key = _key(name)
            found[name] = place.get(self.renamed.get(key, key), -1)
        return np.array([found[name] for name in names], np.int64)


@dataclass(frozen=True, slots=True)
class TypedPairs:
    """Nuclei found (within the radius) whose true class is known: the input of accuracy, ECE and Brier score.

    true_class, pred_class  int64 (M,), -1 for a predicted class that is not scored, and for a nucleus of no class.
    decided                 bool (M,): a class was said of it.
    prob                    float64 (M, C + 1): probability of each scored class, and last of all others together;
                            or None.
    """

    true_class: Int64
    pred_class: Int64
    prob: Float64 | None
    decided: Bool

    @property
    def confidence(self) -> Float64 | None:
        """Probability of the class that was said, float64 (M,), or None; of no meaning where none was."""
        # Class -1, not scored, names the last column.
        return None if self.prob is None else self.prob[np.arange(len(self.prob)), self.pred_class]


@dataclass(frozen=True, slots=True)
class ImageScores:
    """What one image gives; None where it does not apply.

    class_quality  quality of each of the C classes, NaN for one that the image's truth lacks.
    by_class     C tallies of detection with the class, as the protocol counts them.
    support      true nuclei of each of the C classes.
    scored_names, other_names
                 predicted class names that are scored, and those that are not.
    """

    image: str
    organ: str
    cohort: str
    n_true: int
    n_pred: int
    mpp: float
    quality: matching.Quality | None = None
    class_quality: tuple[matching.Quality, ...] | None = None
    aji: float | None = None
    aji_plus: float | None = None
    dice: float | None = None
    detection: Tally | None = None
    by_class: tuple[Tally, ...] | None = None
    support: tuple[int, ...] = ()
    typed: TypedPairs | None = None
    scored_names: frozenset[str] = frozenset()
    other_names: frozenset[str] = frozenset()

    @property
    def bpq(self) -> float | None:
        """Binary PQ, NaN if the image has no true nucleus."""
        return None if self.quality is None else self.quality.pq

    @property
    def bdq(self) -> float | None:
        """Binary DQ, NaN if the image has no true nucleus."""
        return None if self.quality is None else self.quality.dq

    @property
    def bsq(self) -> float | None:
        """Binary SQ, NaN if the image has no true nucleus."""
        return None if self.quality is None else self.quality.sq


def truth_of(sample: Sample) -> Nuclei:
    """Return the annotated nuclei of a sample; with mask and points, a nucleus has the class of the point inside it.

    Raises UsageError if the sample has neither.
    """
    if sample.mask_path is None and sample.points_path is None:
        raise UsageError(f"{sample.image_path}: neither mask nor points in the manifest, so nothing to compare with")
    if sample.mask_path is None:
        points = sample.load_points()
        return Nuclei(points.xy, class_name=points.class_name if any(points.class_name) or sample.classes else None)
    nuclei = Nuclei.from_labels(sample.load_mask())
    if sample.points_path is None:
        return nuclei
    points = sample.load_points()
    if not any(points.class_name) and not sample.classes:
        return nuclei
    return Nuclei(nuclei.xy, nuclei.labels, nuclei.label_id, _class_by_points(nuclei, points.xy, points.class_name))


def dataset_classes(dataset: Dataset) -> tuple[str, ...]:
    """Return the names of the classes in the points of a data set, or of its layout, sorted."""
    typed = [s for s in dataset.samples if s.points_path is not None]
    names = {n for s in typed for n in s.classes or s.load_points().class_name}
    return tuple(sorted(names - {""}))


def scored_classes(dataset: Dataset, rule: Protocol, class_map: Mapping[str, str] | None = None) -> ClassSet:
    """Return the classes of a data set as a protocol joins them; raises UsageError as `ClassSet.of`."""
    names = rule.class_names(dataset_classes(dataset))
    joined = {old: new for old, new in rule.joined.items() if new in names}
    return ClassSet.of(names, {**joined, **(class_map or {})})


def score_image(
    sample: Sample, truth: Nuclei, pred: Nuclei, mpp: float, classes: ClassSet, protocol: Protocol = OPTIMAL
) -> ImageScores:
    """Compare a prediction with the truth of an image at `mpp` µm/px; `protocol` is for points, not for outlines.

    Where only the foreground was drawn by hand, only Dice is given. Raises UsageError if the label maps differ in size.
    """
    scores: dict[str, Any] = {}
    if truth.labels is not None and pred.labels is not None:
        scores |= _instance_scores(sample, truth, pred, classes)
    if not sample.derived_instances:
        scores |= _point_scores(truth, pred, mpp, classes, protocol)
    return ImageScores(sample.stem, sample.organ, sample.cohort, len(truth), len(pred), mpp, **scores)


def _point_scores(truth: Nuclei, pred: Nuclei, mpp: float, classes: ClassSet, protocol: Protocol) -> dict[str, Any]:
    true_at, pred_at = Marks(truth.xy), Marks(pred.xy, pred.score)
    scores: dict[str, Any] = {"detection": protocol.tally(true_at, pred_at, mpp)}
    if truth.class_name is None or pred.class_name is None:
        return scores
    true_class, pred_class = classes.index(truth.class_name), classes.index(pred.class_name)
    n = len(classes.names)
    names = sorted({*pred.class_name, *pred.prob_names} - {""})
    scored = {name for name, index in zip(names, classes.index(names).tolist(), strict=True) if index >= 0}
    pairs = protocol.pairs(true_at, pred_at, mpp)
    return scores | {
        "by_class": protocol.class_tallies(true_at, true_class, pred_at, pred_class, n, mpp),
        "support": tuple(protocol.count(true_at.take(true_class == k)) for k in range(n)),
        "typed": _typed_pairs(pairs, true_class, pred_class, pred, classes),
        "scored_names": frozenset(scored),
        "other_names": frozenset(names) - scored,
    }


def _instance_scores(sample: Sample, truth: Nuclei, pred: Nuclei, classes: ClassSet) -> dict[str, Any]:
    assert truth.labels is not None and pred.labels is not None
    if truth.labels.shape != pred.labels.shape:
        raise UsageError(
            f"{sample.image_path}: the prediction is {pred.labels.shape[1]} x {pred.labels.shape[0]} px, "
            f"the mask {truth.labels.shape[1]} x {truth.labels.shape[0]}; predict at the size of the image"
        )
    pairs = matching.overlaps(truth.labels, pred.labels)
    if sample.derived_instances:
        return {"dice": matching.dice(pairs)}
    return {
        "quality": matching.panoptic_quality(pairs),
        "class_quality": _class_quality(pairs, truth, pred, classes),
        "aji": matching.aji(pairs),
        "aji_plus": matching.aji_plus(pairs),
        "dice": matching.dice(pairs),
    }


def _class_quality(
    pairs: matching.Overlaps, truth: Nuclei, pred: Nuclei, classes: ClassSet
) -> tuple[matching.Quality, ...] | None:
    if truth.class_name is None or pred.class_name is None or not classes.names:
        return None
    true_class = _class_of_label(pairs.true_id, truth, classes)
    pred_class = _class_of_label(pairs.pred_id, pred, classes)
    return tuple(matching.class_quality(pairs, true_class, pred_class, len(classes.names)))


def _class_of_label(ids: Int64, nuclei: Nuclei, classes: ClassSet) -> Int64:
    assert nuclei.label_id is not None and nuclei.class_name is not None
    lookup = dict(zip(nuclei.label_id.tolist(), classes.index(nuclei.class_name).tolist(), strict=True))
    return np.array([lookup.get(i, -1) for i in ids.tolist()], np.int64)


def _class_by_points(nuclei: Nuclei, xy: Float64, names: tuple[str, ...]) -> tuple[str, ...]:
    assert nuclei.labels is not None and nuclei.label_id is not None
    height, width = nuclei.labels.shape
    col, row = np.floor(xy).astype(np.int64).T
    inside = (col >= 0) & (col < width) & (row >= 0) & (row < height)
    under = np.zeros(len(xy), np.int64)
    under[inside] = nuclei.labels[row[inside], col[inside]]
    # Reversed, so that of several points in one nucleus the first one counts.
    name_of = dict(zip(under[::-1].tolist(), names[::-1], strict=True))
    return tuple(name_of.get(i, "") for i in nuclei.label_id.tolist())


def _typed_pairs(pairs: Pairs, true_class: Int64, pred_class: Int64, pred: Nuclei, classes: ClassSet) -> TypedPairs:
    known = true_class[pairs.true_index] >= 0
    true_row, pred_row = pairs.true_index[known], pairs.pred_index[known]
    prob = None
    if pred.prob is not None:
        prob = np.zeros((len(pred_row), len(classes.names) + 1))
        for source, target in enumerate(classes.index(pred.prob_names)):
            prob[:, target] += pred.prob[pred_row, source]
    said = np.array([bool(name) for name in pred.class_name or ()], np.bool_)
    return TypedPairs(true_class[true_row], pred_class[pred_row], prob, said[pred_row])


def _synonyms(known: Set[str]) -> dict[str, str]:
    """Return the class of the data set that each synonym of one counts as; `known` and names are keys."""
    found: dict[str, str] = {}
    for group in SYNONYMS:
        there = [name for name in group if name in known]
        if len(there) == 1:
            found |= {name: there[0] for name in group if name not in known}
    return found


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())
