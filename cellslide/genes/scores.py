"""Scores of predicted genes: correlations and errors by gene, over all tiles and within slides, and the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from cellslide.types import Float32, Float64, Int64

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class GeneScores:
    """Of T genes over n tiles; a gene that is the same everywhere is left out of the means and named.

    spearman, pearson  means over the genes, over all tiles together; mse, mae  of log1p counts.
    within_spearman    mean over the slides of what a slide has by itself: tells genes apart from slides.
    by_gene            spearman, pearson, mse of each gene, None where it is constant.
    """

    n_tiles: int
    n_genes: int
    spearman: float | None
    pearson: float | None
    mse: float
    mae: float
    within_spearman: float | None
    constant: tuple[str, ...]
    by_gene: dict[str, dict[str, float | None]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        return asdict(self)


def score_genes(pred: Float32, true: Float32, slide: Int64, genes: Sequence[str]) -> GeneScores:
    """Score predictions (n, T) of log1p counts against the true ones; `slide` int64 (n,) tells where each tile lies."""
    rank, line = spearman(pred, true), _pearson(pred, true)
    within = within_slides(pred, true, slide)
    error = np.asarray(pred, np.float64) - true
    mse, known = (error**2).mean(0), ~np.isnan(rank)
    by_gene = {
        name: {"spearman": _number(rank[k]), "pearson": _number(line[k]), "mse": float(mse[k])}
        for k, name in enumerate(genes)
    }
    return GeneScores(
        len(true), len(genes), _mean(rank), _mean(line), float(mse.mean()), float(np.abs(error).mean()),
        _mean(np.array([_mean(row) for row in within.values()], np.float64)),
        tuple(name for name, ok in zip(genes, known, strict=True) if not ok), by_gene,
    )  # fmt: skip


def spearman(pred: Float32, true: Float32) -> Float64:
    """Return Spearman's correlation of each column, float64 (T,), NaN where one side is constant."""
    return _pearson(stats.rankdata(pred, axis=0), stats.rankdata(true, axis=0))


def _pearson(pred: Any, true: Any) -> Float64:
    a, b = (np.asarray(x, np.float64) - np.mean(x, axis=0, dtype=np.float64) for x in (pred, true))
    spread = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-12 * len(a), (a * b).sum(0) / spread, np.nan)


def within_slides(pred: Float32, true: Float32, slide: Int64) -> dict[int, Float64]:
    """Return Spearman's correlation of each column by slide, of slides with 3 tiles or more."""
    rows = {int(k): slide == k for k in np.unique(slide)}
    return {k: spearman(pred[held], true[held]) for k, held in rows.items() if held.sum() >= 3}


def _mean(values: Any) -> float | None:
    values = np.array([np.nan if v is None else v for v in np.ravel(values)], np.float64)
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


class MinMae:
    """The copy of one measured gene: s*(t) = argmin_s mean |y_t - x_s| over training tiles (section 2).

    x is log1p of a tile's sum, on the scale of y; the first gene wins ties.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        self._error = np.zeros((n_out, n_in), np.float64)

    def add(self, x: Float32, y: Float32) -> None:
        """Add training tiles: (n, G) and (n, T)."""
        for one, wanted in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
            self._error += np.abs(wanted[:, None] - one[None])

    def predict(self, x: Float32) -> Float32:
        """Return the genes that were chosen: (n, G) -> (n, T)."""
        return np.asarray(x[:, self._error.argmin(1)], np.float32)


def recall_at(image: Float32, expression: Float32, pool: int, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Return the share of tiles whose transcripts are among the k nearest to their image, within pools of tiles.

    image, expression  (n, d), of length 1; pools are runs of `pool` tiles, a shorter last one is left out.
    """
    hits: dict[int, list[float]] = {k: [] for k in ks}
    for start in range(0, len(image) - pool + 1, pool):
        likeness = image[start : start + pool] @ expression[start : start + pool].T
        place = (likeness > np.diag(likeness)[:, None]).sum(1)
        for k in ks:
            hits[k].append(float((place < k).mean()))
    return {f"recall@{k}": float(np.mean(found)) for k, found in hits.items() if found}


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean Spearman correlation within slides of one prediction less that of another: 95 % over patients, and p.

    low, high  of RESAMPLES resamples of whole patients; p  of a paired t-test over patients.
    """

    mean: float
    low: float
    high: float
    p: float | None
    patients: int


def compare(
    pred: Float32, other: Float32, true: Float32, slide: Int64, patient_of: Sequence[str], seed: int = 0
) -> Difference | None:
    """Compare two predictions on the same tiles, paired by patient; None where no slide has 3 tiles.

    patient_of  the patient of each slide's number.
    """
    first, second = within_slides(pred, true, slide), within_slides(other, true, slide)
    by_patient: dict[str, list[float]] = {}
    for k in first:
        a, b = _mean(first[k]), _mean(second[k])
        if a is not None and b is not None:
            by_patient.setdefault(patient_of[k], []).append(a - b)
    means = np.array([np.mean(found) for found in by_patient.values()], np.float64)
    if not len(means):
        return None
    drawn = np.random.default_rng(seed).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.percentile(means[drawn].mean(1), (2.5, 97.5))
    p = float(stats.ttest_1samp(means, 0.0).pvalue) if len(means) > 1 and means.std() > 0 else None
    return Difference(float(means.mean()), float(low), float(high), p, len(means))
