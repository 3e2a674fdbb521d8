"""Which classes lie beside which, and how far: shares of the neighbours, distances, and what chance would give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from cellslide.measure.nuclei import Nuclei
from cellslide.types import Float64, Int64

RADII_UM = (10.0, 20.0, 30.0, 50.0, 75.0, 100.0)
NEAR_UM = 30.0
# Neighbours are read around so many nuclei, drawn by the seed; distances of so many.
MOST_CENTRES, MOST_DISTANCES = 10_000, 100_000
SHUFFLES = 99
LEAST_NUCLEI = 20
BLOCK = 1_000


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Pairs around drawn centres: class of the centre and row of the other (P,), and the ring of `RADII_UM`."""

    centre: Int64
    other: Int64
    ring: Int64


def measure_neighbours(nuclei: Nuclei, region: str, kind: str, seed: int) -> tuple[list[dict[str, Any]], ...]:
    """Return rows for `neighbours.csv` and for `curves.csv`; both empty where fewer than LEAST_NUCLEI have a class.

    The ratio of a curve is that of Ripley's cross K (1976) to its mean over shuffled classes at the same places, so
    that neither the edge of the region nor empty tissue biases it: 1 is chance.
    """
    typed = nuclei.of((nuclei.code >= 0) & (nuclei.code < len(nuclei.classes)))
    k = len(typed.classes)
    if len(typed) < LEAST_NUCLEI or k < 2:
        return [], []
    rng = np.random.default_rng(seed)
    pairs = _pairs(typed, rng)
    found = _cumulated(pairs, typed.code, k)
    shuffled = np.stack([_cumulated(pairs, rng.permutation(typed.code), k) for _ in range(SHUFFLES)])
    mean, spread = shuffled.mean(axis=0), shuffled.std(axis=0)
    low, high = np.quantile(shuffled, (0.025, 0.975), axis=0)
    near = RADII_UM.index(NEAR_UM)
    nearest = _nearest(typed, rng)
    neighbours, curves = [], []
    for a, b in _present(typed.code, k):
        names = {"region": region, "kind": kind, "of": typed.classes[a], "near": typed.classes[b]}
        around = found[a, :, near].sum()
        neighbours.append({
            **names, "share_within_30_um": _over(found[a, b, near], around),
            "times_chance": _over(found[a, b, near], mean[a, b, near]),
            "z": _over(found[a, b, near] - mean[a, b, near], spread[a, b, near]),
            "median_nearest_um": nearest.get((a, b)),
        })  # fmt: skip
        for r, radius in enumerate(RADII_UM):
            values = (_over(v[a, b, r], mean[a, b, r]) for v in (found, low, high))
            words = ("times_chance", "chance_low", "chance_high")
            curves.append({**names, "radius_um": radius, **dict(zip(words, values, strict=True))})
    return neighbours, curves


def _present(code: Int64, k: int) -> Iterator[tuple[int, int]]:
    there = np.flatnonzero(np.bincount(code, minlength=k))
    yield from ((int(a), int(b)) for a in there for b in there)


def _over(value: float, by: float) -> float | None:
    return float(value / by) if by > 0 else None


def _pairs(nuclei: Nuclei, rng: np.random.Generator) -> Neighbours:
    """Return the neighbours within the largest radius of drawn centres; a nucleus is none of itself."""
    rows = np.sort(rng.permutation(len(nuclei))[:MOST_CENTRES])
    tree = cKDTree(nuclei.um)
    parts = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        lists = tree.query_ball_point(nuclei.um[block], RADII_UM[-1], return_sorted=True)
        centre = np.repeat(block, [len(found) for found in lists])
        other = np.concatenate([np.asarray(found, np.int64) for found in lists])
        apart = np.linalg.norm(nuclei.um[centre] - nuclei.um[other], axis=1)
        kept = centre != other
        parts.append((centre[kept], other[kept], np.searchsorted(RADII_UM, apart[kept])))
    centre, other, ring = (np.concatenate(column) for column in zip(*parts, strict=True))
    near = ring < len(RADII_UM)
    return Neighbours(centre[near], other[near], ring[near].astype(np.int64))


def _cumulated(pairs: Neighbours, code: Int64, k: int) -> Float64:
    """Return neighbours within each radius by class of centre and neighbour, (k, k, radii), a centre's mean."""
    n = len(RADII_UM)
    flat = (code[pairs.centre] * k + code[pairs.other]) * n + pairs.ring
    counts = np.bincount(flat, minlength=k * k * n).reshape(k, k, n).cumsum(axis=2).astype(np.float64)
    centres = np.bincount(code[np.unique(pairs.centre)], minlength=k).astype(np.float64)
    return counts / np.maximum(centres, 1)[:, None, None]


def _nearest(nuclei: Nuclei, rng: np.random.Generator) -> dict[tuple[int, int], float]:
    """Return the median distance (µm) from a nucleus of one class to the nearest of another, or of its own."""
    found = {}
    k = len(nuclei.classes)
    trees = {b: cKDTree(nuclei.um[nuclei.code == b]) for b in range(k) if (nuclei.code == b).any()}
    for a in trees:
        rows = np.flatnonzero(nuclei.code == a)
        rows = rows[np.sort(rng.permutation(len(rows))[:MOST_DISTANCES])]
        for b, tree in trees.items():
            if a == b and tree.n < 2:
                continue
            apart = tree.query(nuclei.um[rows], k=[2 if a == b else 1])[0]
            found[a, b] = float(np.median(apart))
    return found
