"""Shares with the errors of the classifier taken out, as far as they were measured when it was calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellslide.store.table_schema import NOT_NUCLEUS
from cellslide.types import Float64, Int64

DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Errors:
    """How often a nucleus of one class is named another, undone.

    inverse  (K, K): named shares @ inverse are the true ones.
    drawn    (DRAWS, K, K): the same, from as many labelled nuclei drawn anew from those that were counted.
    n        labelled nuclei that were counted.
    """

    inverse: Float64
    drawn: Float64
    n: int
    seed: int

    def undone(self, named: Int64) -> Float64:
        """Return share, low and high (K, 3) of the classes of nuclei of which so many (K,) are named each class.

        Rogan and Gladen 1978 for K classes: the shares from which the confusion makes the named ones, none below 0. The
        interval holds 95 % of draws of the nuclei and of the labelled ones. NaN without a nucleus.
        """
        n = int(named.sum())
        if not n:
            return np.full((len(named), 3), np.nan)
        rng = np.random.default_rng(self.seed)
        drawn = rng.multinomial(n, named / n, DRAWS)[:, None, :] / n @ self.drawn
        low, high = np.quantile(_as_shares(drawn[:, 0]), (0.025, 0.975), axis=0)
        return np.stack([_as_shares((named / n) @ self.inverse), low, high], axis=1)


def _as_shares(values: Float64) -> Float64:
    """Return rows (..., K) with what lies below 0 at 0, each of sum 1; a row that is all 0 becomes even."""
    kept = np.maximum(values, 0.0)
    total = kept.sum(axis=-1, keepdims=True)
    return np.where(total > 0, kept / np.where(total > 0, total, 1.0), 1.0 / values.shape[-1])


def known_errors(typing: Mapping[str, Any] | None, names: tuple[str, ...], seed: int) -> tuple[Errors | None, str]:
    """Return the errors of the classifier that typed a table, and in words where they come from or why there are none.

    typing  `config.classify` of the record; names are those of all classes of the table, in its order.
    """
    if typing is None:
        return None, "the errors of what typed these nuclei were not measured"
    weights, rule = typing["spec"].get("weights_id") or "the classifier", typing["rule"]
    calibration, decision = rule["calibration"], rule["decision"]
    counts = calibration.get("confusion")
    if counts is None:
        return (
            None,
            f"{weights} holds no confusion; `cellslide calibrate` counts it, `classify --regate` brings it here",
        )
    measured = "local" if calibration.get("paths") == "local" else "mix"
    if decision["gate"] != measured or decision.get("prior") is not None:
        return (
            None,
            f"the confusion of {weights} was counted with --gate {measured} and without --prior, these were not",
        )
    if typing.get("organ_trained") is False:
        return None, f"the confusion of {weights} was counted on organs that it was trained on"
    if np.shape(counts) != (len(names), len(names)):
        return None, f"the confusion of {weights} is not one of {len(names)} classes"
    rows = [k for k, name in enumerate(names) if name != NOT_NUCLEUS]
    table = np.array(counts, np.int64)[np.ix_(rows, rows)]
    if not table.sum(axis=1).all() or np.linalg.matrix_rank(table) < len(rows):
        return None, f"the confusion of {weights} lacks a class, or does not tell two apart"
    return errors_of(table, seed), f"{int(table.sum()):,} labelled nuclei on which {weights} was calibrated"


def errors_of(counts: Int64, seed: int) -> Errors:
    """Return the errors of counts (K, K), rows truth, columns what was named; each class must have been seen."""
    totals, rng = counts.sum(axis=1), np.random.default_rng(seed)
    rates = counts / totals[:, None]
    drawn = np.stack(
        [rng.multinomial(n, row, DRAWS) / n for n, row in zip(totals.tolist(), rates, strict=True)], axis=1
    )
    return Errors(np.linalg.inv(rates), np.linalg.pinv(drawn), int(totals.sum()), seed)
