"""The rule that decides, as it stands in the record and as the page has moved it; applied anew to a whole slide."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.classify.decision import DecisionConfig, decide, floors
from cellslide.errors import UsageError
from cellslide.store.cell_table import BLOCK_ROWS, CellTable
from cellslide.types import Calibration, Float32, Int64, PathProbs

Int16 = NDArray[np.int16]
# So many decisions over all cells are kept (6 bytes a cell each), for sliders that go back and forth.
KEPT = 3


@dataclass(frozen=True, slots=True)
class StoredRule:
    """How the cells of a table were decided; `has_paths` is False where no classifier of two paths has typed them."""

    decision: DecisionConfig
    calibration: Calibration
    has_paths: bool

    @classmethod
    def of(cls, table: CellTable) -> StoredRule:
        """Return the rule that the table's record names; one that accepts every class where there is none."""
        typing = table.run.config.get("classify")
        known = {"prob_local", "prob_global"} <= set(table.matrices) and "gate" in table.columns
        if typing is None or not known:
            return cls(DecisionConfig(), Calibration(), False)
        rule = typing["rule"]
        return cls(_record(DecisionConfig, rule["decision"]), _record(Calibration, rule["calibration"]), True)

    @property
    def in_force(self) -> DecisionConfig:
        """The rule that the column `class` holds, with what it takes from the calibration written out."""
        return replace(self.decision, thresholds=self.thresholds, abstain=self.abstain)

    @property
    def can_be_safe(self) -> bool:
        """Whether the calibration holds what the safe gate needs."""
        return self.calibration.reliability_local is not None and self.calibration.reliability_global is not None

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """The probability that each class needs, where the rule has such."""
        return self._floors_from.thresholds

    @property
    def abstain(self) -> float:
        """The probability that every class needs."""
        return self._floors_from.abstain or 0.0

    @property
    def _floors_from(self) -> DecisionConfig | Calibration:
        given = self.decision.thresholds is not None or self.decision.abstain is not None
        return self.decision if given else self.calibration


def _record(kind: type[Any], values: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


@dataclass(frozen=True, slots=True)
class DecisionRule:
    """What the page asks for: how to decide, and the least score of a nucleus that is shown."""

    decision: DecisionConfig
    score: float = 0.0

    @classmethod
    def asked(cls, query: Mapping[str, str], stored: StoredRule) -> DecisionRule:
        """Return the policy of a query (gate, tau, gamma, abstain, floors, score); raises UsageError for a wrong one.

        What is not asked for is as stored; `floors=0` leaves out what the rule asks of single classes.
        """
        given = {name: _number(query, name) for name in ("tau", "gamma", "abstain", "score")}
        gate: Any = query.get("gate", stored.decision.gate)
        asked: dict[str, Any] = {name: given[name] for name in ("tau", "gamma", "abstain") if given[name] is not None}
        decision: DecisionConfig = replace(stored.in_force, gate=gate, **asked)
        if query.get("floors") == "0":
            decision = replace(decision, thresholds=None)
        if gate == "safe" and not stored.can_be_safe:
            raise UsageError("gate=safe: this table's calibration holds no reliability of the paths")
        return cls(decision, given["score"] or 0.0)


def _number(query: Mapping[str, str], name: str) -> float | None:
    if name not in query:
        return None
    try:
        value = float(query[name])
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise UsageError(f"{name}={query[name]}: must be a number from 0 to 1")
    return value


class Decisions:
    """What every cell of a table is under a policy; decided block by block, the last few kept."""

    def __init__(self, table: CellTable, stored: StoredRule) -> None:
        self.table, self.stored = table, stored
        self.n_classes = len(table.class_names)
        self._kept: OrderedDict[tuple[object, ...], tuple[Int16, Float32]] = OrderedDict()
        self._stored: Int16 | None = None
        self._lock = threading.Lock()

    def marks(self, policy: DecisionRule, rows: Int64 | None = None) -> Int16:
        """Return what rows (all if None) are shown as: the class, K where it abstains, K + 1 where it has none.

        By the rule in force that is what the table says, not what comes of deciding anew.
        """
        if policy.decision == self.stored.in_force:
            codes = self._decision()
            return np.where(codes < 0, self.n_classes + 1, codes)[slice(None) if rows is None else rows]
        index, prob = self._top(policy.decision)
        if rows is not None:
            index, prob = index[rows], prob[rows]
        floor = floors(policy.decision, Calibration(), self.n_classes)
        known = index >= 0
        marks = np.where(known, index, self.n_classes + 1).astype(np.int16)
        marks[known & (prob < floor[np.maximum(index, 0)])] = self.n_classes
        return marks

    def _top(self, decision: DecisionConfig) -> tuple[Int16, Float32]:
        """Return each cell's most probable class (-1 untyped) and its probability, (N,) both."""
        stored = self.stored.decision
        as_stored = (decision.gate, decision.tau, decision.gamma) == (stored.gate, stored.tau, stored.gamma)
        key: tuple[object, ...] = () if as_stored else (decision.gate, decision.tau, decision.gamma)
        with self._lock:
            if key not in self._kept:
                anew = self.stored.has_paths and not as_stored
                self._kept[key] = self._decided(decision) if anew else self._from_columns()
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _decision(self) -> Int16:
        with self._lock:
            if self._stored is None:
                self._stored = self.table.codes("class").astype(np.int16)
            return self._stored

    def _from_columns(self) -> tuple[Int16, Float32]:
        return self.table.codes("class_top").astype(np.int16), self.table.vector("class_prob").astype(np.float32)

    def _decided(self, decision: DecisionConfig) -> tuple[Int16, Float32]:
        n = len(self.table)
        index, prob = np.full(n, -1, np.int16), np.full(n, np.nan, np.float32)
        rule = DecisionConfig(decision.gate, decision.tau, decision.gamma, prior=decision.prior)
        for start in range(0, n, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, n)
            local, global_ = (self.table.matrix(name, start, stop) for name in ("prob_local", "prob_global"))
            known = np.flatnonzero(~np.isnan(local).any(axis=1))
            gate = self.table.vector("gate", start, stop)
            made = decide(PathProbs(local[known], global_[known], gate[known]), rule, self.stored.calibration)
            index[start + known], prob[start + known] = made.class_index, made.class_prob
        return index, prob
