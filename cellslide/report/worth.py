"""How well a run's weights do on the slide's organ and on others, as far as the manifest knows, in plain words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from cellslide.errors import CellslideError
from cellslide.types import RunRecord, WeightsRef
from cellslide.weights.manifest import Manifest, WeightsEntry
from cellslide.weights.organs import canonical

# Data sets of one organ, by the first word of a score's name; all others hold several.
ORGANS = {"tnbc": "breast", "brca": "breast", "nucls": "breast", "consep": "colon", "conic": "colon"}
# The scores that readers are shown, by what stands in the manifest; the first that is there.
FOUND, OUTLINED, TYPED = ("detection_f1",), ("bpq",), ("macro_f1", "mean_f1")
BASELINE = ("classical",)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Score:
    """Scores of one set of weights on one set of images, 0 to 1 or None; `here`: they are of the slide's organ."""

    weights: str
    images: str
    organ: str
    here: bool
    found: float | None
    outlined: float | None
    typed: float | None


@dataclass(frozen=True, slots=True)
class Worth:
    """What a reader should know of the weights: sentences, and the scores, those of the slide's organ first."""

    organ: str
    sentences: tuple[str, ...]
    scores: tuple[Score, ...]


def worth(record: RunRecord) -> Worth:
    """Return what the manifest knows of the weights of a run."""
    typing = record.config.get("classify") or {}
    organ = str(typing.get("organ") or "unknown")
    scores = [score for ref in record.weights for score in _scores(ref, organ)]
    return Worth(organ, tuple(_sentences(record, organ, scores)), tuple(sorted(scores, key=lambda s: not s.here)))


def _scores(ref: WeightsRef, organ: str) -> Iterator[Score]:
    entry = _entry(ref)
    for images, values in () if entry is None else entry.metrics.items():
        if not isinstance(values, dict) or images.endswith(BASELINE):
            continue
        of = next((name for word, name in ORGANS.items() if images.startswith(word)), "several organs")
        found, outlined, typed = (_first(values, names) for names in (FOUND, OUTLINED, TYPED))
        if any(value is not None for value in (found, outlined, typed)):
            here = of == canonical(organ)
            yield Score(ref.id, images, of, here, found, outlined, typed)


def _entry(ref: WeightsRef) -> WeightsEntry | None:
    """Return the entry whose file a run used, None where another file ran under its name."""
    try:
        entry = Manifest.load().entries.get(ref.id)
    except CellslideError as error:
        log.warning("no scores in the report: %s", error)
        return None
    return entry if entry is not None and entry.sha256 in (None, ref.sha256) else None


def _first(values: dict[str, object], names: tuple[str, ...]) -> float | None:
    return next((float(v) for name in names if isinstance(v := values.get(name), (int, float))), None)


def _sentences(record: RunRecord, organ: str, scores: list[Score]) -> Iterator[str]:
    typing = record.config.get("classify") or {}
    if typing:
        spec = typing.get("spec") or {}
        name = spec.get("weights_id") or "the classifier"
        trained = ", ".join(spec.get("organs") or ()) or "no organ by name"
        if typing.get("organ_trained") is False:
            yield f"The classes come from {name}, not trained on {organ} (trained: {trained}). {_unseen(spec)}"
        elif organ == "unknown":
            yield f"The organ of this slide was not named (--organ); the classes come from {name} (trained: {trained})."
        else:
            yield f"The classes come from {name}, which was trained on {organ}."
    if any(score.here for score in scores):
        yield f"Scores on images of {organ} stand first."
    elif scores:
        what = "this organ" if organ == "unknown" else organ
        yield f"No score is known of images of {what} alone: the table shows those of other organs, as a hint."
    silent = [ref.id for ref in record.weights if not any(score.weights == ref.id for score in scores)]
    if silent:
        yield f"No scores are known of {', '.join(silent)}: try it on nuclei that you have marked (cellslide evaluate)."


def _unseen(spec: dict[str, object]) -> str:
    calibration = spec.get("calibration")
    share = calibration.get("accuracy_unseen") if isinstance(calibration, dict) else None
    if share is None:
        return "How often it is right on an organ that it was not trained on has not been measured."
    return f"On an organ that was left out of training it typed {float(share):.0%} of the nuclei right."
