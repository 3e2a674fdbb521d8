"""Whole: what the measured stages come to on a slide of 300,000 nuclei, typed by crops of both sizes, and what finding
and writing them takes from end to end, with a network that costs nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from cellslide.bench.decode import synthetic_maps
from cellslide.bench.fake import DrawnMaps
from cellslide.bench.read import write_tiled
from cellslide.bench.rows import Row, Target, row
from cellslide.config import InferConfig, OutputConfig, SegmentConfig
from cellslide.inference.segmenter import Segmenter, resolve_tiles
from cellslide.inference.stream import Detector
from cellslide.pipeline import segment_slide
from cellslide.slides.inputs import SlideInput
from cellslide.types import ClassSpec, HoverDecode, HoverMaps, ModelSpec
from cellslide.weights import LoadedModel, WeightsEntry

STAGE = "whole"
NUCLEI, AREA_MM2, MPP = 300_000, 60, 0.25
TILE_PX, STEP_PX = 1024, 896
PIXELS = AREA_MM2 * 1e6 / MPP**2
TILES = PIXELS / STEP_PX**2
# Edges of two painted slides: what the larger one takes more is what its tiles take.
SMALL_PX, LARGE_PX = 2048, 8192
SPEC = ModelSpec(
    "drawn", "mask", MPP, TILE_PX, TILE_PX - STEP_PX, (0.5,) * 3, (0.5,) * 3,
    classes=tuple(ClassSpec(f"class {i}", (50 * i, 80, 160)) for i in range(5)),
    decode=HoverDecode("fixed"), weights_id="drawn", weights_sha256="0" * 64, licence="Apache-2.0",
)  # fmt: skip


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


def segmented_row(small_px: int = SMALL_PX, large_px: int = LARGE_PX) -> Row:
    """Return what `segment` takes for such a slide from reading to the files, crops and network excluded.

    All processes and all that lies between the stages count; two painted slides are measured and the difference scaled.
    """
    form = f"segment {NUCLEI:,} nuclei on {AREA_MM2} mm2, no network"
    if os.name == "nt":
        return row(
            STAGE, form, [], "core-s", NUCLEI, note="not measured: Windows does not tell what ended processes took"
        )
    maps = synthetic_maps(round(NUCLEI / TILES), TILE_PX).hover_maps()
    with tempfile.TemporaryDirectory() as scratch:
        # The first, not counted, loads what this process needs.
        _, few, most = (
            segmented(maps, px, Path(scratch) / str(i)) for i, px in enumerate((small_px, small_px, large_px))
        )
    per_tile = (most[1] - few[1]) / (most[0] - few[0])
    note = f"{per_tile * 1e3:.0f} CPU ms a tile, {most[0] - few[0]} tiles measured"
    return row(STAGE, form, [few[1] + per_tile * (TILES - few[0])], "core-s", NUCLEI, None, Target(), note)


def segmented(maps: HoverMaps, size_px: int, folder: Path, workers: int = 1) -> tuple[int, float]:
    """Return how many tiles a painted slide of that size has, and the CPU seconds that segmenting it takes."""
    folder.mkdir()
    file = folder / "slide.svs"
    write_tiled(file, "jpeg", size_px)
    config = SegmentConfig(infer=InferConfig(device="cpu"), output=OutputConfig(formats=("zarr", "geojson", "parquet")))
    config = replace(config, tiles=resolve_tiles(SPEC, config.tiles))
    model = LoadedModel(SPEC, nn.Identity(), WeightsEntry("drawn", "segment", "drawn", file="none"))
    begin = cpu_seconds()
    with Segmenter(model, config, Detector(DrawnMaps(SPEC, maps), workers)) as segmenter:
        record, _ = segment_slide(SlideInput(file, slide_id=file.stem), segmenter, folder / "out")
    return record.counts.tiles, cpu_seconds() - begin


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those it started that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _product(*factors: float | None) -> float | None:
    result = 1.0
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result
