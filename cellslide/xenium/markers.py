"""Marker genes of classes, and clusters named by them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellslide.errors import UsageError, short
from cellslide.store.atomic import write_text
from cellslide.store.foreign_files import parse_yaml, read_text
from cellslide.types import Float64

AMBIGUOUS = "ambiguous"
SHIPPED = Path(__file__).parents[1] / "data" / "markers"
LEAST_MARKERS = 3
MOST_CLASSES = 200


@dataclass(frozen=True, slots=True)
class Markers:
    """Marker genes by class; `genes` are those that the panel has, `asked` all that were named.

    A class with fewer than `LEAST_MARKERS` genes on the panel cannot be assigned.
    """

    genes: Mapping[str, tuple[str, ...]]
    asked: Mapping[str, tuple[str, ...]]

    @property
    def assignable(self) -> tuple[str, ...]:
        """The classes that enough genes of the panel mark."""
        return tuple(name for name, genes in self.genes.items() if len(genes) >= LEAST_MARKERS)

    def alike(self) -> list[str]:
        """Say which classes share more than half of their markers on the panel: none of the two can lead by much."""
        pairs = [(a, b) for k, a in enumerate(self.assignable) for b in self.assignable[k + 1 :]]
        shared = [(a, b, len(set(self.genes[a]) & set(self.genes[b]))) for a, b in pairs]
        return [
            f"{a} and {b} share {n} of {min(len(self.genes[a]), len(self.genes[b]))} markers on the panel, so that "
            "clusters of either may come out ambiguous; choose with --classes"
            for a, b, n in shared
            if 2 * n > min(len(self.genes[a]), len(self.genes[b]))
        ]

    def coverage(self) -> list[str]:
        """Say for each class how many of its markers the panel has."""
        return [
            f"{name}: {len(found)} of {len(self.asked[name])} markers on the panel"
            + ("" if len(found) >= LEAST_MARKERS else f"; fewer than {LEAST_MARKERS}, it cannot be assigned")
            for name, found in self.genes.items()
        ]


@dataclass(frozen=True, slots=True)
class ClusterNames:
    """What each of K clusters is called, its best and second class, and by how much the best leads."""

    label: tuple[str, ...]
    best: tuple[str, ...]
    second: tuple[str, ...]
    score: Float64
    margin: Float64


def read_markers(name: str, panel: Sequence[str], classes: Sequence[str] = ()) -> Markers:
    """Read a marker list, one that ships by its name or a YAML file `class: [genes]`, beside the genes of a panel.

    classes  those of the list that are asked for, () for all.
    Names of genes are compared without regard to case and to `-` against `.`. Raises UsageError for another file, and
    where no class can be assigned.
    """
    path = SHIPPED / f"{name}.yaml" if (SHIPPED / f"{name}.yaml").is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise UsageError(f"--markers {short(name)}: neither a file nor one of {known}")
    content = parse_yaml(read_text(path, UsageError), path, UsageError)
    good = isinstance(content, dict) and all(isinstance(genes, list) and genes for genes in content.values())
    if not good or not 0 < len(content) <= MOST_CLASSES:
        raise UsageError(f"{path}: no marker list; expected `class: [gene, gene, ...]`")
    asked = {str(label): tuple(dict.fromkeys(map(str, genes))) for label, genes in content.items()}
    if unknown := sorted(set(classes) - set(asked)):
        raise UsageError(f"--classes {short(unknown[0])}: not in {path.name}, which has {', '.join(asked)}")
    asked = {label: of for label, of in asked.items() if not classes or label in classes}
    spelled = {_plain(gene): gene for gene in panel}
    genes = {label: tuple(spelled[g] for gene in of if (g := _plain(gene)) in spelled) for label, of in asked.items()}
    markers = Markers(genes, asked)
    if not markers.assignable:
        raise UsageError(f"{path}: no class has {LEAST_MARKERS} markers on the panel; give another --markers FILE")
    return markers


def _plain(gene: str) -> str:
    return gene.strip().upper().replace(".", "-")


def name_clusters(z: Float64, genes: Sequence[str], markers: Markers, least_margin: float) -> ClusterNames:
    """Name clusters by their mean expression, z (K, G) in SDs of all cells from their mean.

    The score of a class is the mean z of its markers. The best is assigned where it is above `least_margin` and leads
    the second by as much; else the cluster is ambiguous.
    """
    classes, place = markers.assignable, {gene: k for k, gene in enumerate(genes)}
    scores = np.stack([z[:, [place[gene] for gene in markers.genes[name]]].mean(axis=1) for name in classes], axis=1)
    if len(classes) == 1:
        scores, classes = np.column_stack([scores, np.zeros(len(z))]), (*classes, "none")
    order = np.argsort(-scores, axis=1, kind="stable")
    top, next_ = (np.take_along_axis(scores, order[:, k : k + 1], axis=1)[:, 0] for k in (0, 1))
    best, second = ([classes[k] for k in order[:, column]] for column in (0, 1))
    sure = (top > least_margin) & (top - next_ > least_margin)
    label = tuple(name if good else AMBIGUOUS for name, good in zip(best, sure, strict=True))
    return ClusterNames(label, tuple(best), tuple(second), top, top - next_)


def write_names(path: Path, names: ClusterNames, sizes: Sequence[int]) -> None:
    """Write the table that a user edits and gives back: cluster, label, and what speaks for it."""
    rows = ["cluster,label,cells,best,second,score,margin"]
    columns = zip(names.label, sizes, names.best, names.second, names.score, names.margin, strict=True)
    for k, (label, n, best, second, score, margin) in enumerate(columns):
        rows.append(f"{k},{label},{n},{best},{second},{score:.3f},{margin:.3f}")
    write_text(path, "\n".join(rows) + "\n")


def override_names(path: Path, names: ClusterNames, assignable: Sequence[str]) -> ClusterNames:
    """Return the names with those of a CSV `cluster,label` in their place; raises UsageError for what does not fit."""
    try:
        rows = list(csv.DictReader(read_text(path, UsageError).splitlines()))
        given = {int(row["cluster"]): row["label"].strip() for row in rows}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: no table of clusters ({short(error)}); expected columns cluster,label") from error
    wrong = sorted(set(given) - set(range(len(names.label))))
    if wrong:
        raise UsageError(f"{path}: cluster {wrong[0]} is none of the {len(names.label)}; was it made by another run?")
    unknown = sorted(set(given.values()) - {*assignable, AMBIGUOUS})
    if unknown:
        raise UsageError(
            f"{path}: label {short(unknown[0])} is no class with enough markers; one of "
            f"{', '.join(assignable)}, {AMBIGUOUS}"
        )
    label = tuple(given.get(k, name) for k, name in enumerate(names.label))
    return ClusterNames(label, names.best, names.second, names.score, names.margin)
