"""All numbers of one slide's folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from cellslide.errors import UsageError
from cellslide.measure.counts import measure_counts, measure_sizes
from cellslide.measure.errors import known_errors
from cellslide.measure.neighbours import measure_neighbours
from cellslide.measure.nuclei import Nuclei, read_nuclei
from cellslide.measure.regions import Region, annotated, bands, grid, pieces
from cellslide.report.regions import read_searched
from cellslide.slides.regions import Origin, load_regions
from cellslide.store.cell_table import CellTable, open_table
from cellslide.store.run_record import TABLE
from cellslide.types import Float64

# Neighbours are measured in the whole slide, pieces, annotations and bands of this many nuclei at least.
LEAST_FOR_NEIGHBOURS = 200
MAP_UM = 50.0


@dataclass(frozen=True, slots=True)
class MeasureConfig:
    """What is measured where.

    regions         GeoJSON of annotations, as QuPath writes it; `origin` is what it is relative to.
    grid_um         edge of the squares of a grid; None leaves it out.
    border_um       width of the bands along the tumour's border; None leaves them out.
    with_artefacts  also count nuclei in regions that are no clean tissue.
    """

    regions: Path | None = None
    origin: Origin = "bounds"
    grid_um: float | None = None
    border_um: float | None = None
    with_artefacts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value in (("--grid", self.grid_um), ("--border", self.border_um)):
            if value is not None and not 20 <= value <= 20_000:
                raise UsageError(f"{flag} {value:g}: must be 20 to 20,000 µm")


@dataclass(slots=True)
class SlideNumbers:
    """Rows of the four tables, and maps of the classes: nuclei per mm² on squares of MAP_UM (rows, cols).

    errors  in words where the classifier's errors come from that are taken out, or why none are.
    """

    slide: str
    regions: list[dict[str, Any]] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)
    neighbours: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    maps: dict[str, Float64] = field(default_factory=dict)
    outlines: list[tuple[str, shapely.Geometry]] = field(default_factory=list)
    size_um: tuple[float, float] = (0.0, 0.0)
    errors: str = ""


def measure_slide(folder: Path, config: MeasureConfig) -> SlideNumbers:
    """Measure a finished slide; raises UsageError for regions that do not suit it, TableError for a damaged table."""
    with open_table(folder / TABLE) as table:
        nuclei = read_nuclei(table, config.with_artefacts)
        tissue = searched_um(folder, table, config.with_artefacts)
        info = table.slide
        errors, words = known_errors(table.run.config.get("classify"), table.class_names, config.seed)
        size_um = (info.width_px * info.mpp_x, info.height_px * info.mpp_y)
        numbers = SlideNumbers(folder.name, size_um=size_um, errors=words)
        named = [] if config.regions is None else [
            (name, _in_um(shape, table)) for name, shape in load_regions(config.regions, info, config.origin)
        ]  # fmt: skip
    for region in _regions(nuclei, tissue, named, config):
        chosen = nuclei if region.kind == "slide" else nuclei.of(region.contains(nuclei.um))
        numbers.regions.append(measure_counts(chosen, region, errors))
        if region.kind == "grid":
            continue
        numbers.classes += measure_sizes(chosen, region)
        if region.kind != "slide":
            numbers.outlines.append((region.name, region.shape))
        if len(chosen) >= LEAST_FOR_NEIGHBOURS or region.kind == "slide":
            found, curves = measure_neighbours(chosen, region.name, region.kind, config.seed)
            numbers.neighbours += found
            numbers.curves += curves
    numbers.maps = dict(_maps(nuclei, numbers.size_um))
    return numbers


def searched_um(folder: Path, table: CellTable, with_artefacts: bool) -> shapely.Geometry:
    """Return what was searched in µm, without what is no clean tissue; the whole slide where no file tells."""
    info = table.slide
    searched = read_searched(folder, info, table.run)
    shape = shapely.union_all(searched.polygons) if searched.polygons else None
    if shape is None:
        shape = shapely.box(0, 0, info.width_px, info.height_px)
    if not with_artefacts and searched.artefacts:
        shape = shapely.difference(shape, shapely.union_all([polygon for _, polygon in searched.artefacts]))
    return _in_um(shape, table)


def _in_um(shape: shapely.Geometry, table: CellTable) -> shapely.Geometry:
    return shapely.transform(shape, lambda xy: xy * (table.slide.mpp_x, table.slide.mpp_y))


def _regions(
    nuclei: Nuclei, tissue: shapely.Geometry, named: list[tuple[str, shapely.Geometry]], config: MeasureConfig
) -> Iterator[Region]:
    yield Region("all", "slide", tissue)
    yield from annotated(named, tissue)
    if shapely.get_num_geometries(tissue) > 1:
        yield from pieces(tissue)
    if config.border_um is not None:
        yield from bands(nuclei, tissue, config.border_um)
    if config.grid_um is not None:
        yield from grid(tissue, config.grid_um)


def _maps(nuclei: Nuclei, size_um: tuple[float, float]) -> Iterator[tuple[str, Float64]]:
    cols, rows = (max(1, int(np.ceil(length / MAP_UM))) for length in size_um)
    at = np.clip((nuclei.um / MAP_UM).astype(np.int64), 0, (cols - 1, rows - 1))
    flat = at[:, 1] * cols + at[:, 0]
    for k, name in enumerate(nuclei.classes):
        counts = np.bincount(flat[nuclei.code == k], minlength=rows * cols).reshape(rows, cols)
        yield name, counts.astype(np.float64) / (MAP_UM / 1e3) ** 2
