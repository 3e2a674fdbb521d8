"""Counts of a region, densities, shares with their uncertainty, sizes by class, and the TIL score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellslide.measure.errors import Errors
from cellslide.measure.nuclei import Nuclei
from cellslide.measure.regions import Region

# Of the standard normal distribution, for intervals of 95 %.
Z = 1.96
# A lymphocyte with its thin cytoplasm covers about this (8 µm across).
LYMPHOCYTE_UM2 = 50.0
# Stroma is told from tumour on squares of this edge.
TIL_SQUARE_UM = 50.0


def measure_counts(nuclei: Nuclei, region: Region, errors: Errors | None = None) -> dict[str, Any]:
    """Return the numbers of the nuclei of a region, by the names of the columns of `regions.csv`.

    A share is of the nuclei of which a class is said. Its interval has two parts: that of a sample of so many nuclei
    (Wilson 1927), at each end of what the share would be if none, or all, of those that abstained were of the class.

    errors  also give the share of all typed nuclei without the errors of the classifier (`Errors.undone`).
    """
    counts, n, mm2 = nuclei.counts(), len(nuclei), region.mm2
    said, abstained = int(counts[:-1].sum()), int(counts[-1])
    row: dict[str, Any] = {
        "region": region.name, "kind": region.kind, "mm2": round(mm2, 6), "nuclei": n,
        "per_mm2": n / mm2 if mm2 else None, "abstained": abstained, "untyped": n - said - abstained,
        "median_area_um2": _quantile(nuclei, slice(None), 0.5),
    }  # fmt: skip
    for name, count in zip(nuclei.classes, counts[:-1].tolist(), strict=True):
        row[f"n_{name}"] = count
        row[f"per_mm2_{name}"] = count / mm2 if mm2 else None
        row[f"share_{name}"] = count / said if said else None
        row[f"share_{name}_low"] = wilson(count, said + abstained)[0] if said else None
        row[f"share_{name}_high"] = wilson(count + abstained, said + abstained)[1] if said else None
    if errors is not None:
        for name, values in zip(nuclei.classes, errors.undone(nuclei.named()).tolist(), strict=True):
            for end, value in zip(("", "_low", "_high"), values, strict=True):
                row[f"share_{name}_corrected{end}"] = None if np.isnan(value) else value
    row["stromal_til_percent"] = til_percent(nuclei)
    return row


def measure_sizes(nuclei: Nuclei, region: Region) -> list[dict[str, Any]]:
    """Return number, median and quartiles of the area (µm²) of each class of a region."""
    rows = []
    for k, name in enumerate(nuclei.classes):
        chosen = nuclei.code == k
        if not chosen.any():
            continue
        low, median, high = (_quantile(nuclei, chosen, share) for share in (0.25, 0.5, 0.75))
        diameter = None if median is None else 2 * float(np.sqrt(median / np.pi))
        rows.append({
            "region": region.name, "kind": region.kind, "class": name, "nuclei": int(chosen.sum()),
            "area_um2_quartile_1": low, "median_area_um2": median, "area_um2_quartile_3": high,
            "median_diameter_um": diameter,
        })  # fmt: skip
    return rows


def _quantile(nuclei: Nuclei, chosen: Any, share: float) -> float | None:
    area = nuclei.area[chosen]
    area = area[area > 0]
    return float(np.quantile(area, share)) if len(area) else None


def wilson(count: int, n: int) -> tuple[float, float]:
    """Return the interval (95 %) of a share of `count` in `n`; Wilson 1927. (0, 1) where n is 0."""
    if not n:
        return 0.0, 1.0
    share = count / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def til_percent(nuclei: Nuclei) -> float | None:
    """Return how much of the stroma lymphocytes cover, in percent; None without such classes or without stroma.

    The TIL working group (Salgado et al. 2015) reads the share of the stroma within the tumour that mononuclear cells
    take. Here squares count as stroma where most nuclei that are no lymphocytes are no tumour's, and a lymphocyte as
    50 µm². Empty squares, plasma cells, necrosis and the invasive margin are not told apart.
    """
    tumour, lymphocyte = nuclei.kind("tumour"), nuclei.kind("lymphocyte")
    if tumour is None or lymphocyte is None or not len(nuclei):
        return None
    at = np.floor(nuclei.um / TIL_SQUARE_UM).astype(np.int64)
    at -= at.min(axis=0)
    flat = at[:, 1] * (int(at[:, 0].max()) + 1) + at[:, 0]
    _, square = np.unique(flat, return_inverse=True)
    of = {name: np.bincount(square, nuclei.code == k) for name, k in (("t", tumour), ("l", lymphocyte))}
    others = np.bincount(square, (nuclei.code >= 0) & (nuclei.code != tumour) & (nuclei.code != lymphocyte))
    stroma = others + of["l"] > of["t"]
    stroma &= others >= of["t"]
    if not stroma.any():
        return None
    covered = float(of["l"][stroma].sum()) * LYMPHOCYTE_UM2
    return min(100.0, 100 * covered / (int(stroma.sum()) * TIL_SQUARE_UM**2))


def column_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row))
