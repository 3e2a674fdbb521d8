"""Whole: what the measured stages come to on a slide of 300,000 nuclei, typed by crops of both sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cellslide.bench.rows import Row, Target, row

STAGE = "whole"
NUCLEI, AREA_MM2, MPP = 300_000, 60, 0.25
TILE_PX, STEP_PX = 1024, 896
PIXELS = AREA_MM2 * 1e6 / MPP**2


def whole_rows(measured: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return the CPU side of such a slide in core-seconds, nothing where a stage that it needs was not measured.

    Every tile is decoded as one of 800 nuclei, though these have 250; the table is written three times: as zarr,
    GeoParquet and for QuPath.
    """
    found = {(stage, one.form): one.value for stage, rows in measured.items() for one in rows if one.unit != "×"}
    overlap = next((one.value for one in measured.get("read", ()) if one.form.endswith("overlap")), None)
    read = next(
        (value for (stage, form), value in found.items() if stage == "read" and form.endswith("cellslide")), None
    )
    costs = {
        "read": _product(read, overlap, PIXELS / TILE_PX**2 / 1e3),
        "decode": _product(found.get(("decode", "fixed, cellslide")), PIXELS / STEP_PX**2 / 1e3),
        "merge": _product(found.get(("merge", "cellslide")), NUCLEI / 1e6),
        "table": _product(found.get(("write", "table + geoparquet")), NUCLEI / 1e6),
        "qupath": _product(found.get(("write", "qupath")), NUCLEI / 1e6),
        "crops of 224": _product(found.get(("crops", "224 px: shared regions")), NUCLEI / 1e5),
        "crops of 1024": _product(found.get(("crops", "1024 px: shared regions")), NUCLEI / 1e5),
    }
    seconds = [cost for cost in costs.values() if cost is not None]
    if len(seconds) < len(costs):
        return []
    note = ", ".join(f"{name} {cost:.3g}" for name, cost in zip(costs, seconds, strict=True))
    form = f"CPU side of {NUCLEI:,} nuclei on {AREA_MM2} mm2"
    return [row(STAGE, form, [sum(seconds)], "core-s", NUCLEI, None, Target(150), note)]


def _product(*factors: float | None) -> float | None:
    result = 1.0
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result
