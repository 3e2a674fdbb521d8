"""A fusion network, its baselines and their differences on the tiles of a split of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.errors import UsageError
from cellslide.genes.network import FusionNetwork, Reader, contrast, predict
from cellslide.genes.samples import FusionSample
from cellslide.genes.scores import Difference, GeneScores, MinMae, compare, recall_at, score_genes
from cellslide.genes.tiles import GeneTiles, gene_columns, pooled
from cellslide.types import Float32, Int64

POOL = 256


@dataclass(frozen=True, slots=True)
class FusionReport:
    """Scores of a network and of its baselines on the same tiles; `better_than` by baseline, paired by patient.

    counted_times  how often a transcript counts at most, since tiles overlap.
    """

    model: str
    split: str
    slides: int
    patients: int
    tiles: int
    counted_times: int
    scores: GeneScores | None = None
    baselines: dict[str, GeneScores] = field(default_factory=dict)
    better_than: dict[str, Difference | None] = field(default_factory=dict)
    recall: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        return asdict(self)


def evaluate_fusion(
    network: FusionNetwork, samples: Sequence[FusionSample], split: str, cache: Path, least_transcripts: int = 1000,
    batch_size: int = 32,
) -> FusionReport:  # fmt: skip
    """Score a network on the tiles of a split; baselines that learn do so on the split train of the same samples.

    Baselines: min_mae copies one gene, density predicts every gene by all that is read, mean the training mean.
    Raises UsageError where the split has no tile, and as `Reader`.
    """

    def opened(name: str) -> list[GeneTiles]:
        chosen = [s for s in samples if s.split == name]
        return [GeneTiles(s, network.shape, cache, network.least_qv, least_transcripts) for s in chosen]

    tiles = opened(split)
    n = sum(len(one.kept) for one in tiles)
    if not n:
        known = ", ".join(sorted({s.split or "(empty)" for s in samples}))
        raise UsageError(
            f"--split {split}: no tile with {least_transcripts} transcripts (--min-transcripts); splits here: {known}"
        )
    times = (-(-network.shape.edge // network.shape.stride)) ** 2
    patients = [one.sample.patient for one in tiles]
    head = FusionReport(network.entry.id, split, len(tiles), len(set(patients)), n, times)
    if network.config.contrast:
        both = [contrast(Reader(network, one), one.kept, batch_size) for one in tiles]
        image, expression = (np.concatenate(v) for v in zip(*both, strict=True))
        pool = min(POOL, n)
        return FusionReport(**{**_shallow(head), "recall": {**recall_at(image, expression, pool), "pool": pool}})
    pred, true, x, slide = _predict(network, tiles, batch_size)
    genes = network.config.genes_out
    others = _baselines(network, opened("train"), x, true)
    return FusionReport(**{
        **_shallow(head),
        "scores": score_genes(pred, true, slide, genes),
        "baselines": {name: score_genes(p, true, slide, genes) for name, p in others.items()},
        "better_than": {name: compare(pred, p, true, slide, patients) for name, p in others.items() if name != "mean"},
    })  # fmt: skip


def _shallow(report: FusionReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__slots__}


def _predict(
    network: FusionNetwork, tiles: Sequence[GeneTiles], batch_size: int
) -> tuple[Float32, Float32, Float32 | None, Int64]:
    found, slide = [], []
    for k, one in enumerate(tiles):
        reader = Reader(network, one)
        if reader.targets is None:
            raise UsageError(f"{one.sample.bundle}: does not hold the genes that {network.entry.id} predicts")
        for part in predict(reader, one.kept, batch_size):
            found.append((part.y, part.truth, part.x))
            slide.append(np.full(len(part.y), k, np.int64))
    y, truth, x = zip(*found, strict=True)
    read = None if x[0] is None else np.concatenate(x)
    return np.concatenate(y), np.concatenate(truth), read, np.concatenate(slide)


def _baselines(
    network: FusionNetwork, train: Sequence[GeneTiles], x: Float32 | None, true: Float32
) -> dict[str, Float32]:
    """Return what the baselines predict; those that learn need training slides, those that copy need genes."""
    n_out, mean = true.shape[1], _Mean(true.shape[1])
    copies = None if x is None else MinMae(x.shape[1], n_out)
    for one in train:
        assert one.tokens is not None
        targets = gene_columns(one.tokens, network.config.genes_out, one.sample.bundle, "error")
        sources = gene_columns(one.tokens, network.config.genes_in, one.sample.bundle, "error")
        for number in one.kept:
            y = pooled(one.counts(int(number), targets), "sum")[None]
            mean.add(y)
            if copies is not None:
                copies.add(pooled(one.counts(int(number), sources), "sum")[None], y)
    found: dict[str, Float32] = {}
    if mean.n:
        found["mean"] = np.repeat(mean.value[None], len(true), 0)
    if x is not None:
        found["density"] = np.repeat(np.log1p(np.expm1(x).sum(1, keepdims=True)), n_out, 1)
        if copies is not None and mean.n:
            found["min_mae"] = copies.predict(x)
    return found


class _Mean:
    def __init__(self, width: int) -> None:
        self.n, self._sum = 0, np.zeros(width, np.float64)

    def add(self, y: Float32) -> None:
        self.n += len(y)
        self._sum += y.sum(0, dtype=np.float64)

    @property
    def value(self) -> Float32:
        return (self._sum / max(self.n, 1)).astype(np.float32)


def lines_of(report: FusionReport) -> Iterator[str]:
    """Yield a line for each row of scores, and what they are scores of."""
    yield (
        f"{report.model}: {report.tiles:,} tiles of {report.slides} slides, {report.patients} patients, split "
        f"{report.split}; a transcript counts in up to {report.counted_times} tiles"
    )
    for name, value in report.recall.items():
        yield f"  {name:>14}  {value:.3f}" if name != "pool" else f"  {'among':>14}  {value:.0f} tiles"
    if report.scores is None:
        return
    yield f"  {'':>14}  Spearman  within slides  Pearson     MSE"
    for name, scores in (("model", report.scores), *report.baselines.items()):
        yield f"  {name:>14}  {_row(scores)}"
    for name, found in report.better_than.items():
        if found is not None:
            p = "" if found.p is None else f", p {found.p:.3g}"
            yield (
                f"  model less {name}: {found.mean:+.3f} (95 % over {found.patients} patients {found.low:+.3f} to "
                f"{found.high:+.3f}{p})"
            )
    if report.scores.constant:
        yield f"  left out, the same everywhere: {', '.join(report.scores.constant[:12])}"


def _row(scores: GeneScores) -> str:
    def number(value: float | None) -> str:
        return "      –" if value is None else f"{value:7.3f}"

    within = number(scores.within_spearman)
    return f"{number(scores.spearman)}   {within}        {number(scores.pearson)} {number(scores.mse)}"
