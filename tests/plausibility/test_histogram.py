"""Histograms that are summed block by block give counts and quantiles of all values."""

from __future__ import annotations

import numpy as np
import pytest

from cellslide.plausibility.histogram import Histogram


def test_histograms_count_and_measure() -> None:
    values = np.random.default_rng(0).gamma(4, 10, 20_000)
    histogram = Histogram(0, 1000, 1000, 2)
    group = np.random.default_rng(1).integers(-1, 2, len(values))
    for part in np.array_split(np.arange(len(values)), 9):
        histogram.add(np.append(values[part], np.nan), np.append(group[part], 0))
    for k in (0, 1):
        for share in (0.05, 0.5, 0.95):
            assert histogram.quantile(share, k) == pytest.approx(np.quantile(values[group == k], share), abs=1)
    edges, counts = histogram.bars()
    assert counts.sum() == (group >= 0).sum() and len(edges) == counts.shape[1] + 1 <= 41
    assert edges[-1] < 2 * np.quantile(values, 0.995), "the tail is in the last bar"
    assert np.isnan(Histogram(0, 1, 10).quantile(0.5))
