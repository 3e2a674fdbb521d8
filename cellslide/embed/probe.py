"""How much vectors of nuclei know: nearest neighbours and a linear layer on top of them, as MUSE is evaluated.

Yang et al., MUSE, AAAI 2026, appendix, and the authors' code: KNN with k = 10, 20, 100, 200, 500 on vectors of length
one, votes weighed by exp(cosine / 0.07); a linear layer from N(0, 0.01), SGD with momentum 0.9, 100 epochs of batches
of 256, learning rate 0.01 to 0 by a cosine. The backbone is never trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cellslide.errors import UsageError
from cellslide.evaluate import classification
from cellslide.evaluate.dataset import Dataset, Sample
from cellslide.evaluate.report import pixel_size
from cellslide.evaluate.score import ClassSet, dataset_classes, truth_of
from cellslide.store.atomic import beside
from cellslide.types import Float32, Float64, Int64

if TYPE_CHECKING:
    from rich.table import Table

NEIGHBOURS = (10, 20, 100, 200, 500)
TEMPERATURE = 0.07
# Rows whose neighbours are looked for at once.
CHUNK_ROWS = 1024

Reader = Callable[[Sample, float, Float64], Float32]


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """How a linear layer is trained, and which neighbours are asked."""

    neighbours: tuple[int, ...] = NEIGHBOURS
    temperature: float = TEMPERATURE
    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 0.01
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.neighbours or min(self.neighbours) < 1:
            raise UsageError(f"--k {list(self.neighbours)}: must be 1 or more")
        if self.epochs < 1:
            raise UsageError(f"--epochs {self.epochs}: must be 1 or more")


@dataclass(frozen=True, slots=True)
class Labelled:
    """Vectors of typed nuclei: vector float32 (N, D), label int64 (N,) over `names`, split N words."""

    vector: Float32
    label: Int64
    split: tuple[str, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.vector) == len(self.label) == len(self.split):
            raise ValueError(f"{len(self.vector)} vectors, {len(self.label)} labels, {len(self.split)} splits")

    def of(self, split: str) -> tuple[Tensor, Tensor]:
        """Return vectors (n, D) and labels (n,) of one split; raises UsageError where it has none."""
        rows = np.flatnonzero(np.array(self.split, object) == split)
        if not len(rows):
            raise UsageError(f"no nucleus of the split {split}; there are: {', '.join(sorted(set(self.split)))}")
        return torch.from_numpy(self.vector[rows]), torch.from_numpy(self.label[rows])


@dataclass(frozen=True, slots=True)
class LinearScore:
    """Accuracy of the linear layer on the split that is tested, `epoch` (from 1) it is taken from, and why that one."""

    accuracy: float
    epoch: int
    chosen_by: str
    macro_f1: float | None
    recall: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the vectors of a data set know; accuracies are shares from 0 to 1.

    knn        accuracy on the tested split for each k, None where k exceeds the training nuclei.
    knn_best   the best of them, which MUSE reports; it looks at the tested split, so it flatters.
    knn_chosen the one whose k was best on `choose_split`; None without such a split.
    """

    model: str
    dataset: str
    train_split: str
    choose_split: str | None
    test_split: str
    n_train: int
    n_choose: int
    n_test: int
    dim: int
    classes: tuple[str, ...]
    knn: dict[str, float | None]
    knn_best: float | None
    knn_chosen: float | None
    linear: LinearScore

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def table(self) -> Table:
        """Return the report as a table for the terminal."""
        from rich.table import Table

        title = (
            f"{self.model} on {self.dataset}: {self.n_train} nuclei to learn from, {self.n_test} of {self.test_split}"
        )
        table = Table(title=title)
        table.add_column("probe")
        table.add_column("accuracy", justify="right")
        chosen = f"knn, k chosen on {self.choose_split}"
        rows = [*((f"knn, k = {k}", value) for k, value in self.knn.items()), ("knn, best k", self.knn_best)]
        rows += [(chosen, self.knn_chosen)] if self.choose_split is not None else []
        for name, value in [*rows, (f"linear ({self.linear.chosen_by})", self.linear.accuracy)]:
            table.add_row(name, "-" if value is None else f"{value:.4f}")
        return table


def gather(data: Dataset, read: Reader, mpp: float | None = None, samples: Iterable[Sample] | None = None) -> Labelled:
    """Return the vectors of the typed nuclei of a data set, in the order of its manifest.

    `read` gives those of nuclei (N, 2) of an image, in its pixels; `samples` are those of `data`, where somebody counts
    them. Raises UsageError where nuclei have fewer than two classes.
    """
    classes = ClassSet.of(dataset_classes(data))
    if len(classes.names) < 2:
        raise UsageError(f"{data.root}: a probe tells classes apart, its nuclei have {len(classes.names)}")
    vectors, labels, splits = [], [], []
    for sample in data.samples if samples is None else samples:
        nuclei = truth_of(sample)
        index = classes.index(nuclei.class_name or ())
        known = np.flatnonzero(index >= 0)
        if len(known):
            vectors.append(read(sample, pixel_size(sample, mpp), nuclei.xy[known]))
            labels.append(index[known])
            splits += [sample.split] * len(known)
    return Labelled(np.concatenate(vectors), np.concatenate(labels), tuple(splits), classes.names)


def save(path: Path, labelled: Labelled) -> None:
    """Write the vectors with labels and splits as .npz, which `load` reads."""
    with beside(path) as scratch, scratch.open("wb") as file:
        split, names = np.array(labelled.split), np.array(labelled.names)
        np.savez(file, embedding=labelled.vector, label=labelled.label, split=split, names=names)


def load(path: Path) -> Labelled:
    """Read a file with the arrays embedding (N, D), label (N,), split (N,) and names (C,); raises UsageError."""
    try:
        with np.load(path, allow_pickle=False) as data:
            columns = {name: data[name] for name in ("embedding", "label", "split", "names")}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: must be .npz with embedding, label, split, names ({error})") from error
    vector, label = np.asarray(columns["embedding"], np.float32), np.asarray(columns["label"], np.int64)
    names = tuple(str(name) for name in columns["names"])
    if vector.ndim != 2 or not len(vector) == len(label) == len(columns["split"]):
        raise UsageError(f"{path}: embedding {vector.shape}, label {label.shape}: must be one row a nucleus")
    if len(label) and not 0 <= label.min() <= label.max() < len(names):
        raise UsageError(f"{path}: labels must lie between 0 and {len(names) - 1}")
    return Labelled(vector, label, tuple(str(word) for word in columns["split"]), names)


def probe(labelled: Labelled, model: str, dataset: str, config: ProbeConfig, device: str = "cpu") -> ProbeReport:
    """Probe vectors: learn from `train`, choose on `val`, test on `test`.

    Without `test`, `val` is tested and nothing chosen. Raises UsageError where a split is missing.
    """
    known = set(labelled.split)
    test_split = "test" if "test" in known else "val"
    choose_split = "val" if "val" in known and test_split == "test" else None
    train, test = _on(labelled.of("train"), device), _on(labelled.of(test_split), device)
    choose = None if choose_split is None else _on(labelled.of(choose_split), device)
    n_classes = len(labelled.names)
    knn = knn_accuracies(train, test, n_classes, config)
    best = max((value for value in knn.values() if value is not None), default=None)
    return ProbeReport(
        model=model,
        dataset=dataset,
        train_split="train",
        choose_split=choose_split,
        test_split=test_split,
        n_train=len(train[1]),
        n_choose=0 if choose is None else len(choose[1]),
        n_test=len(test[1]),
        dim=labelled.vector.shape[1],
        classes=labelled.names,
        knn={str(k): value for k, value in knn.items()},
        knn_best=best,
        knn_chosen=None if choose is None else _chosen(knn, knn_accuracies(train, choose, n_classes, config)),
        linear=linear_probe(train, choose, test, labelled.names, config),
    )


def _on(part: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    return part[0].to(device), part[1].to(device)


def _chosen(tested: dict[int, float | None], chosen_on: dict[int, float | None]) -> float | None:
    known = {k: value for k, value in chosen_on.items() if value is not None}
    return tested[max(known, key=lambda k: known[k])] if known else None


def knn_accuracies(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], n_classes: int, config: ProbeConfig
) -> dict[int, float | None]:
    """Return for each k the share of `test` whose neighbours in `train` vote for its class.

    A vote weighs exp(cosine / temperature). None where there are fewer than k nuclei to ask.
    """
    possible = [k for k in config.neighbours if k <= len(train[1])]
    right = dict.fromkeys(possible, 0)
    for similarity, neighbour, label in _nearest(train, test, max(possible, default=0)):
        weight = torch.exp((similarity - 1) / config.temperature)
        votes = functional.one_hot(neighbour, n_classes) * weight[..., None]
        for k in possible:
            right[k] += int((votes[:, :k].sum(dim=1).argmax(dim=1) == label).sum())
    return {k: right[k] / len(test[1]) if k in right else None for k in config.neighbours}


def _nearest(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], k: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield cosines (n, k), classes (n, k) of the nearest of `train`, nearest first, and the true classes (n,)."""
    if not k:
        return
    known = functional.normalize(train[0].float(), dim=1).T
    for first in range(0, len(test[1]), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        similarity, index = (functional.normalize(test[0][rows].float(), dim=1) @ known).topk(k, dim=1)
        yield similarity, train[1][index], test[1][rows]


def linear_probe(
    train: tuple[Tensor, Tensor],
    choose: tuple[Tensor, Tensor] | None,
    test: tuple[Tensor, Tensor],
    names: Sequence[str],
    config: ProbeConfig,
) -> LinearScore:
    """Train a linear layer on vectors and return its score on `test`, at the epoch best on `choose`, else the last.

    Of equally good epochs the last one counts, as published.
    """
    layer = _linear(train[0].shape[1], len(names), config.seed).to(train[0].device)
    best, named, epoch = -1.0, test[1], config.epochs
    for number in _epochs(layer, train, config):
        if choose is None and number < config.epochs:
            continue
        score = 0.0 if choose is None else float((_named(layer, choose[0]) == choose[1]).float().mean())
        if score >= best:
            best, named, epoch = score, _named(layer, test[0]), number
    true, predicted = test[1].cpu().numpy(), named.cpu().numpy()
    tallies = classification.class_tallies(true, predicted, len(names))
    f1 = [t.f1 for t in tallies if t.support and t.f1 is not None]
    return LinearScore(
        accuracy=float((true == predicted).mean()),
        epoch=epoch,
        chosen_by="last epoch" if choose is None else "best epoch on val",
        macro_f1=sum(f1) / len(f1) if f1 else None,
        recall={name: tally.recall for name, tally in zip(names, tallies, strict=True)},
    )


def _linear(dim: int, n_classes: int, seed: int) -> nn.Linear:
    layer = nn.Linear(dim, n_classes)
    nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(layer.bias)
    return layer


def _epochs(layer: nn.Linear, train: tuple[Tensor, Tensor], config: ProbeConfig) -> Iterator[int]:
    """Train epoch by epoch, yielding the number (from 1) after each; a last batch that is not full is left out."""
    optimiser = torch.optim.SGD(layer.parameters(), lr=config.learning_rate, momentum=config.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs)
    order, size = torch.Generator().manual_seed(config.seed), min(config.batch_size, len(train[1]))
    for number in range(1, config.epochs + 1):
        rows = torch.randperm(len(train[1]), generator=order).to(train[1].device)
        for first in range(0, len(rows) - size + 1, size):
            part = rows[first : first + size]
            loss = functional.cross_entropy(layer(train[0][part].float()), train[1][part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
        yield number


@torch.no_grad()
def _named(layer: nn.Linear, vectors: Tensor) -> Tensor:
    return layer(vectors.float()).argmax(dim=1)
