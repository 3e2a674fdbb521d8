"""The tiles of a slide: where it is searched, and what is found there, kept on disk tile by tile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from shapely.geometry.base import BaseGeometry

from cellslide.config import SegmentConfig, TissueConfig
from cellslide.errors import CellslideError, SlideError
from cellslide.inference.segmenter import Segmenter, Setup
from cellslide.inference.stream import TileResult
from cellslide.nuclei.merge import merge_stream, same_point_um, to_cells
from cellslide.plausibility.fields import JPEG_PX, centres, measure_fields
from cellslide.progress import Watch
from cellslide.slides.missing import missing_tissue
from cellslide.slides.slide import Slide
from cellslide.slides.tiles import TileGrid, fitting_grid, select_tiles
from cellslide.slides.tissue import TissueMask, find_tissue, write_tissue
from cellslide.store.tile_checkpoint import Parts, TilePart
from cellslide.types import Cells, FailedTile, Fields, ModelSpec, Plane, RunRecord, SlideInfo, Tile, UInt8

TISSUE_FILE = "tissue.geojson"
# A part is written after so many tiles or seconds: a killed run loses little, and a slide is not a thousand files.
PART_TILES = 64
PART_SECONDS = 20.0
# Why a tile of the file is listed as failed, though nothing went wrong with reading it.
MISSING = "missing in the file, inside the tissue"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a slide is searched: the plane, the grid over it, the tissue (None: everywhere), the tiles in order.

    missing  level-0 boxes of tiles inside the tissue that the file leaves out.
    """

    plane: Plane
    grid: TileGrid
    mask: TissueMask | None
    tiles: list[Tile]
    missing: tuple[tuple[float, float, float, float], ...] = ()


def lay_out(slide: Slide, setup: Segmenter | Setup) -> Layout:
    """Decide where to search: the plane at the model's pixel size, its tissue and the tiles that meet it."""
    spec, config = setup.spec, setup.config
    tissue, tiles = config.tissue, config.tiles
    plane = Plane.of(slide.info, spec.mpp)
    step = None if config.infer.engine == "onnx" else spec.multiple_px
    grid = fitting_grid(plane, tiles.size_px or spec.tile_px, tiles.overlap_px or 0, step)
    everywhere = not tissue.enabled and tissue.roi is None
    mask = None if everywhere else find_tissue(slide, tissue)
    return Layout(plane, grid, mask, select_tiles(grid, mask), _missing(slide, plane, mask, tissue))


def _missing(
    slide: Slide, plane: Plane, mask: TissueMask | None, tissue: TissueConfig
) -> tuple[tuple[float, float, float, float], ...]:
    """Return what the file leaves out of the tissue that is to be searched, on the level that is read."""
    level, gaps = slide.best_level(plane), slide.reader.header.missing
    if not gaps or not gaps[level].is_gap.any():
        return ()
    found = mask if mask is not None and tissue.enabled and tissue.mask is None else find_tissue(slide, TissueConfig())
    return tuple(box for box in missing_tissue(slide, level, found) if mask is None or mask.near(box))


def write_searched(
    folder: Path,
    layout: Layout,
    slide: Slide,
    config: SegmentConfig,
    artefacts: Mapping[str, BaseGeometry] | None = None,
) -> float:
    """Write `tissue.geojson`, the regions that are searched and those that are no clean tissue, by what they are.

    Returns the area that is searched (mm²).
    """
    mask = layout.mask or find_tissue(slide, replace(config.tissue, enabled=False))
    return write_tissue(mask, folder / TISSUE_FILE, slide.info, config.output.geojson_origin, artefacts)


def read_tile(slide: Slide, plane: Plane, tile: Tile) -> UInt8:
    """Return the pixels of a tile's read box, uint8 (H, W, 3)."""
    return slide.read_plane(plane, tile.read_xyxy)


class TileReader:
    """Reads the pixels of tiles and measures the fields on them, from any thread; `take` gives a tile's fields once."""

    def __init__(self, slide: Slide, layout: Layout) -> None:
        self._slide, self._layout = slide, layout
        plane = layout.plane
        self._block_px = JPEG_PX * slide.level_scales[slide.best_level(plane)] / plane.scale_x
        self._fields: dict[int, Fields] = {}

    def __call__(self, tile: Tile) -> UInt8:
        """Return the pixels of a tile's read box, uint8 (H, W, 3)."""
        image, plane, mask = read_tile(self._slide, self._layout.plane, tile), self._layout.plane, self._layout.mask
        fields = measure_fields(image, tile, plane, self._slide.info.mpp_x, self._block_px)
        if mask is not None:
            inside = mask.contains(centres(fields.place, plane))
            fields = Fields(fields.place[inside], fields.values[inside])
        self._fields[tile.index] = fields
        return image

    def take(self, tile: Tile) -> Fields | None:
        """Return the fields of a tile that was read, None where it could not be."""
        return self._fields.pop(tile.index, None)


def to_part(result: TileResult, layout: Layout, info: SlideInfo, fields: Fields | None = None) -> TilePart:
    """Return what a tile gave in level-0 pixels: what it answers for, and only inside what is to be searched.

    Without the second rule, how far beyond the tissue nuclei are found would depend on the tile size.
    """
    tile, instances = result.tile, result.instances
    if instances is None:
        return TilePart(tile.index, None, 0, result.error, fields)
    cells = to_cells(instances, tile, layout.plane, info)
    if layout.mask is not None:
        cells = cells.take(layout.mask.contains(cells.centroid_xy))
    return TilePart(tile.index, cells, len(instances), None, fields)


def detect_tiles(
    slide: Slide, layout: Layout, segmenter: Segmenter, parts: Parts, record: RunRecord, watch: Watch
) -> None:
    """Find the nuclei of all tiles that are not finished yet and keep them in `parts`; fills counts and failed tiles.

    Raises Interrupted when asked to stop, SlideError when not one tile could be done.
    """
    done = parts.done()
    todo = [tile for tile in layout.tiles if tile.index not in done]
    watch.progress.begin(slide.info.slide_id, len(layout.tiles), len(layout.tiles) - len(todo))
    reader = TileReader(slide, layout)
    results = segmenter.detector.run(reader, todo, record.seconds)
    try:
        with closing(results):
            keep_parts(results, layout, slide.info, parts, watch, reader.take)
    except CellslideError:
        watch.check()  # A signal to the whole group ends the decoding processes too; that is a stop, not a failure.
        raise
    finally:
        count_tiles(layout, parts, record)
        record.batch_size.tiles = segmenter.engine.batch_size
    if layout.tiles and record.counts.tiles_failed == len(layout.tiles):
        raise SlideError(
            f"{slide.info.path}: not one of {len(layout.tiles)} tiles could be done; {record.failed_tiles[0].error}"
        )


def keep_parts(
    results: Iterator[TileResult],
    layout: Layout,
    info: SlideInfo,
    parts: Parts,
    watch: Watch,
    fields_of: Callable[[Tile], Fields | None],
) -> None:
    """Write results to `parts` as they come, in groups; also those at hand when something stops the run."""
    group: list[TilePart] = []
    written = time.monotonic()
    try:
        for result in results:
            group.append(to_part(result, layout, info, fields_of(result.tile)))
            found = group[-1].cells
            watch.progress.advance(0 if found is None else len(found))
            watch.check()
            if len(group) >= PART_TILES or time.monotonic() - written > PART_SECONDS:
                parts.add(group)
                group, written = [], time.monotonic()
    finally:
        parts.add(group)


def count_tiles(layout: Layout, parts: Parts, record: RunRecord) -> None:
    """Fill in the record what the tiles gave."""
    failed = parts.failed()
    corner = {
        t.index: layout.plane.to_level0(np.array([t.read_xyxy[:2]]))[0] for t in layout.tiles if t.index in failed
    }
    record.failed_tiles = [FailedTile(int(corner[i][0]), int(corner[i][1]), error) for i, error in failed.items()]
    record.failed_tiles += [FailedTile(int(box[0]), int(box[1]), MISSING) for box in layout.missing]
    record.counts.tiles, record.counts.tiles_failed = len(layout.tiles), len(failed)
    record.counts.tiles_missing = len(layout.missing)
    record.counts.tiles_empty, record.counts.nuclei_raw = parts.n_empty, parts.n_raw


def merged_cells(parts: Parts, layout: Layout, spec: ModelSpec) -> Iterator[Cells]:
    """Yield the cells of all tiles in their final order, each nucleus once.

    Raises SlideError where tiles that were finished are gone.
    """
    if gone := {t.index for t in layout.tiles} - parts.done() - parts.failed().keys():
        raise SlideError(f"{parts.folder}: {len(gone)} finished tiles are gone; run the same command again")
    streamed = parts.stream(t.index for t in layout.tiles)
    return merge_stream(streamed, layout.grid, same_point_um(spec))
