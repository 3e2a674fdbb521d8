"""Fine histograms that are summed block by block, and the bars and quantiles that are made from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.types import Float64, Int64

MOST_BARS = 40
# What lies beyond is shown in the last bar, so that one odd nucleus does not squeeze all the others.
SHOWN_SHARE = 0.995


@dataclass(slots=True)
class Histogram:
    """Counts of values of several groups (G) in equal steps from `low` to `high`; what lies beyond counts at the end.

    `counts` int64 (G, steps). Values that are not numbers are not counted.
    """

    low: float
    high: float
    steps: int
    groups: int = 1
    counts: Int64 = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.groups, self.steps), np.int64)

    @property
    def edges(self) -> Float64:
        """Limits of the steps, (steps + 1,)."""
        return np.linspace(self.low, self.high, self.steps + 1)

    @property
    def n(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    def add(self, values: NDArray[Any], group: NDArray[Any] | None = None) -> None:
        """Count values (N,), each in its group (N,); a group below 0 is not counted."""
        known = np.isfinite(values) if group is None else np.isfinite(values) & (group >= 0)
        place = (values[known].astype(np.float64) - self.low) / (self.high - self.low) * self.steps
        step = np.clip(place.astype(np.int64), 0, self.steps - 1)
        row = 0 if group is None else group[known].astype(np.int64)
        flat = np.bincount(row * self.steps + step, minlength=self.counts.size)
        self.counts += flat.reshape(self.counts.shape)

    def quantile(self, share: float, group: int | None = None) -> float:
        """Return the value below which `share` of the values lie, to the width of a step; NaN where there are none."""
        counts = self.counts.sum(axis=0) if group is None else self.counts[group]
        total = np.cumsum(counts)
        if not total[-1]:
            return float("nan")
        step = int(np.searchsorted(total, share * total[-1], side="left"))
        before = total[step - 1] if step else 0
        inside = (share * total[-1] - before) / max(counts[step], 1)
        return float(self.edges[step] + inside * (self.high - self.low) / self.steps)

    def bars(self) -> tuple[Float64, Int64]:
        """Return limits (B + 1,) and counts (G, B) of at most MOST_BARS bars over what holds nearly all values."""
        total = np.cumsum(self.counts.sum(axis=0))
        last = int(np.searchsorted(total, SHOWN_SHARE * total[-1], side="left")) + 1
        width = -(-last // MOST_BARS)
        n_bars = max(1, -(-last // width))
        padded = np.zeros((self.groups, max(n_bars * width, self.steps)), np.int64)
        padded[:, : self.steps] = self.counts
        counts = padded[:, : n_bars * width].reshape(self.groups, n_bars, width).sum(axis=2)
        counts[:, -1] += padded[:, n_bars * width :].sum(axis=1)
        step = (self.high - self.low) / self.steps
        return self.low + step * width * np.arange(n_bars + 1, dtype=np.float64), counts
