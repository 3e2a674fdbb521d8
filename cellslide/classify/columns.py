"""From probabilities of cells to columns of the table, by the rule that decides; no network here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from cellslide.classify.decision import PATHS, Decision, DecisionConfig, decide
from cellslide.classify.taxonomy import Taxonomy, project
from cellslide.store.anndata_columns import Categorical, Column, Columns, write_values
from cellslide.store.table_schema import NOT_NUCLEUS, decided, decision_words
from cellslide.types import Bool, Calibration, Float32, Int64, PathProbs


@dataclass(frozen=True, slots=True)
class Rule:
    """How cells are decided: the rule, the calibration it reads, the classes, and what they are projected to."""

    decision: DecisionConfig
    calibration: Calibration
    classes: tuple[str, ...]
    taxonomy: Taxonomy | None = None

    def for_organ(self, trained: bool | None) -> Rule:
        """Return the rule for a slide whose organ was trained, or not: then it abstains as fitted for such organs."""
        floor = self.calibration.abstain_unseen
        if trained is not False or floor is None:
            return self
        stricter = max(floor, self.calibration.abstain or 0.0)
        return replace(self, calibration=replace(self.calibration, abstain=stricter))

    def check(self) -> None:
        """Raise UsageError where the rule needs what the calibration does not hold, before any network runs."""
        uniform = np.full((1, len(self.classes)), 1 / len(self.classes), np.float32)
        decide(PathProbs(uniform, uniform, np.full(1, 0.5, np.float32)), self.decision, self.calibration)


@dataclass(slots=True)
class Tally:
    """What was decided, summed over the cells: typed, not typed, global path skipped, abstained, mass on no class.

    `rejected` are typed as no nucleus; neither `typed` nor `classes` counts them.
    """

    typed: int = 0
    rejected: int = 0
    left_out: int = 0
    global_skipped: int = 0
    abstained: int = 0
    mass_lost: float = 0.0
    classes: dict[str, int] = field(default_factory=dict)

    def add(self, decision: Decision, probs: PathProbs, known: Bool, names: tuple[str, ...]) -> None:
        """Count one block; `decision` is of its known rows."""
        rejected = is_rejected(decision, names)
        self.rejected += int(rejected.sum())
        self.typed += int(known.sum()) - int(rejected.sum())
        self.left_out += int((~known).sum())
        self.global_skipped += int(np.isnan(probs.gate[known]).sum())
        self.abstained += int(decision.abstained.sum())
        counts = np.bincount(decision.class_index[~decision.abstained], minlength=len(names))
        for name, count in zip(names, counts.tolist(), strict=True):
            if name != NOT_NUCLEUS:
                self.classes[name] = self.classes.get(name, 0) + count


def is_rejected(decision: Decision, names: tuple[str, ...]) -> Bool:
    """Return bool (N,): the cells that are no nucleus, and surely enough not to abstain."""
    if NOT_NUCLEUS not in names:
        return np.zeros(len(decision.class_index), np.bool_)
    return np.asarray((decision.class_index == names.index(NOT_NUCLEUS)) & ~decision.abstained, np.bool_)


class DecidedColumns:
    """What a rule makes of typed cells, as columns of the table, block by block; `tally` counts what came.

    read   gives the probabilities of rows [start, stop), and which rows are known.
    organ  word of the column `organ`.
    """

    def __init__(self, read: Callable[[int, int], tuple[PathProbs, Bool]], rule: Rule, organ: str) -> None:
        self.read, self.rule, self.organ, self.tally = read, rule, organ, Tally()

    def block(self, start: int, stop: int) -> Columns:
        """Return the columns of rows [start, stop); each row is to be asked for once."""
        probs, known = self.read(start, stop)
        columns = decided_columns(probs, known, self.rule, self.tally)
        organ = Categorical(np.where(known, 0, -1).astype(np.int8), (self.organ,))
        return Columns({**columns.obs, "organ": organ}, columns.obsm)

    def name_projected(self, group: zarr.Group) -> None:
        """Write the names of the classes that were projected to, where there are such."""
        if self.rule.taxonomy is not None:
            write_values(group, "uns/projected_names", self.rule.taxonomy.names)


def decided_columns(probs: PathProbs, known: Bool, rule: Rule, tally: Tally) -> Columns:
    """Return the columns of a block of N cells; rows that are not `known` hold nothing (NaN, missing, False)."""
    rows = np.flatnonzero(known)
    part = PathProbs(probs.local[rows], probs.global_[rows], probs.gate[rows])
    decision = decide(part, rule.decision, rule.calibration)
    rejected = is_rejected(decision, rule.classes)
    tally.add(decision, probs, known, rule.classes)
    n = len(known)
    codes, path = np.full(n, -1, np.int16), np.full(n, -1, np.int8)
    codes[rows], path[rows] = decision.class_index, decision.path
    abstained, is_nucleus = np.zeros(n, np.bool_), np.ones(n, np.bool_)
    abstained[rows] = decision.abstained
    is_nucleus[rows] = ~rejected
    obs: dict[str, Column] = {
        "class": Categorical(decided(codes, abstained, len(rule.classes)), decision_words(rule.classes)),
        "class_top": Categorical(codes, rule.classes),
        "class_prob": _spread(decision.class_prob, rows, n),
        "is_nucleus": is_nucleus,
        "gate": probs.gate.astype(np.float32),
        "path": Categorical(path, PATHS),
        "abstained": abstained,
    }
    obsm = {"prob": _spread(decision.prob, rows, n), "prob_local": probs.local, "prob_global": probs.global_}
    if rule.taxonomy is None:
        return Columns(obs, obsm)
    further, lost = _projected(decision.prob, rows, n, rule.taxonomy)
    tally.mass_lost += float(np.sum(lost[~rejected]))
    return Columns({**obs, **further.obs}, {**obsm, **further.obsm})


def _projected(prob: Float32, rows: Int64, n: int, taxonomy: Taxonomy) -> tuple[Columns, Float32]:
    """Return the classes of a taxonomy (the most probable, its probability, all), and what falls on none of `rows`."""
    p_eval, lost = project(prob, taxonomy)
    codes = np.full(n, -1, np.int16)
    # Where nothing is left, no class is named.
    codes[rows] = np.where(p_eval.max(axis=1, initial=0) > 0, p_eval.argmax(axis=1), -1)
    obs: dict[str, Column] = {
        "projected": Categorical(codes, taxonomy.names),
        "projected_prob": _spread(p_eval.max(axis=1, initial=0), rows, n),
        "mass_lost": _spread(lost, rows, n),
    }
    return Columns(obs, {"prob_projected": _spread(p_eval, rows, n)}), lost


def _spread(values: NDArray[Any], rows: Int64, n: int) -> Float32:
    out = np.full((n, *values.shape[1:]), np.nan, np.float32)
    out[rows] = values
    return out
