"""How far scores of a data set would vary over others of as many images: a bootstrap over images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cellslide.evaluate.classification import BOOTSTRAPS
from cellslide.evaluate.detection import Tally
from cellslide.evaluate.protocols import Protocol
from cellslide.evaluate.score import ImageScores
from cellslide.types import Float64, Int64


def intervals(
    scores: Sequence[ImageScores], n_classes: int, rule: Protocol, draws: int = BOOTSTRAPS
) -> dict[str, tuple[float, float]] | None:
    """Return the middle 95 % of the scores over data sets of as many images, drawn with replacement from these.

    Images are drawn, not nuclei, since nuclei of an image are alike (Efron & Tibshirani 1993, chapter 8). None for one
    image. The draws are always the same.
    """
    if len(scores) < 2:
        return None
    rows = np.random.default_rng(0).integers(len(scores), size=(draws, len(scores)))
    columns = {
        "bpq": _drawn_means([s.bpq if s.n_true else None for s in scores], rows),
        "detection_f1": _drawn_f1([s.detection for s in scores], rows),
    }
    if n_classes and not rule.per_image:
        by_class = [
            _drawn_f1([None if s.by_class is None else s.by_class[k] for s in scores], rows) for k in range(n_classes)
        ]
        present = [column for column in by_class if np.isfinite(column).any()]
        if present:
            columns["mean_f1"] = np.mean(present, axis=0)
    found = {name: values[np.isfinite(values)] for name, values in columns.items()}
    return {name: tuple(np.percentile(v, (2.5, 97.5)).tolist()) for name, v in found.items() if len(v)} or None


def _drawn_means(values: Sequence[float | None], rows: Int64) -> Float64:
    """Return the mean of the known values of each draw (D, N), NaN for one without."""
    known = np.array([math.nan if v is None else v for v in values])[rows]
    count = np.isfinite(known).sum(axis=1)
    total = np.nansum(known, axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _drawn_f1(tallies: Sequence[Tally | None], rows: Int64) -> Float64:
    """Return F1 of the pooled counts of each draw (D, N), NaN for one without anything to count."""
    counts = np.array([(t.tp, t.fp, t.fn) if t else (0, 0, 0) for t in tallies], np.int64)[rows].sum(axis=1)
    tp, fp, fn = counts.T
    total = 2 * tp + fp + fn
    return np.where(total > 0, 2 * tp / np.maximum(total, 1), np.nan)
