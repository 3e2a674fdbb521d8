"""A slide in, a cell table out: the whole flow.

slide -> plane -> tissue -> tiles -> (read, network, decode) -> cells -> parts on disk -> merge -> table -> files
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellslide import __version__
from cellslide.config import OutputConfig, SegmentConfig, TissueConfig
from cellslide.errors import CellslideError, Interrupted, SlideError, TileError, UsageError, in_words
from cellslide.formats.registry import FORMATS, export_table, find_formats, present_formats
from cellslide.inference.segmenter import Segmenter, Setup, open_segmenter, resolved
from cellslide.inference.stream import TileResult
from cellslide.nuclei.merge import merge_stream, same_point_um, to_cells
from cellslide.progress import IDLE, Watch
from cellslide.slides.inputs import SlideInput
from cellslide.slides.missing import missing_tissue
from cellslide.slides.slide import Slide, open_slide, slide_from_array
from cellslide.slides.tiles import TileGrid, fitting_grid, select_tiles
from cellslide.slides.tissue import TissueMask, find_tissue, write_tissue
from cellslide.store.atomic import remove_folder
from cellslide.store.cell_table import CellTableWriter, open_table
from cellslide.store.file_list import changed_sizes
from cellslide.store.foreign_files import is_plain
from cellslide.store.lock import hold
from cellslide.store.recovery import restore
from cellslide.store.run_record import (
    TABLE,
    describe_slide,
    differences,
    fingerprint,
    now_utc,
    other_slide,
    peak_rss_bytes,
    read_record,
    write_record,
)
from cellslide.store.tile_checkpoint import PARTS_FOLDER, Parts, TilePart
from cellslide.types import (
    Cells,
    FailedTile,
    ModelSpec,
    Plane,
    RunRecord,
    Seconds,
    SlideInfo,
    Tile,
    UInt8,
    WeightsRef,
    concat,
)
from cellslide.weights import LoadedModel

TISSUE_FILE = "tissue.geojson"
# A part is written after so many tiles or seconds: a killed run loses little, and a slide is not a thousand files.
PART_TILES = 64
PART_SECONDS = 20.0
# Why a tile of the file is listed as failed, though nothing went wrong with reading it.
MISSING = "missing in the file, inside the tissue"


log = logging.getLogger(__name__)


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


def segment_slide(source: SlideInput, segmenter: Segmenter, out_dir: Path, watch: Watch = IDLE) -> RunRecord:
    """Find every nucleus of one slide and write its folder `out_dir/<slide_id>`; goes on from tiles that are finished.

    Raises UsageError when the folder holds work done with other settings, Interrupted when asked to stop, SlideError
    when the slide cannot be read.
    """
    return run_slide(source, segmenter, out_dir, watch)[0]


def run_slide(
    source: SlideInput, segmenter: Segmenter, out_dir: Path, watch: Watch = IDLE, *, tiles_only: bool = False
) -> tuple[RunRecord, bool]:
    """Do what `segment_slide` does; also tell whether the slide was complete before.

    tiles_only  ends when the tiles are done and kept on disk; `write_slide` does the rest, in any process.
    """
    folder, config, began = out_dir / source.slide_id, segmenter.config, time.perf_counter()
    with open_source(source, config) as slide, held(folder, watch) as watch:
        record = begin_record(describe_slide(slide.info), segmenter)
        refuse_other_slide(folder, record, config.output.overwrite)
        if earlier := finished(folder, record, config.output, watch):
            if TISSUE_FILE in changed_sizes(folder):
                write_searched(folder, lay_out(slide, segmenter), slide, config)
                write_record(folder, earlier)
            return earlier, True
        parts = Parts.open(folder, fingerprint(record), config.output.overwrite)
        with recorded_run(record, folder, segmenter, began):
            layout = lay_out(slide, segmenter)
            write_searched(folder, layout, slide, config)
            detect_tiles(slide, layout, segmenter, parts, record, watch)
            if tiles_only:
                return record, False
            write_cells(folder, slide.info, layout, segmenter, parts, record, watch)
            write_formats(folder, with_present(folder, config.output), record, watch)
        if record.status == "done":
            parts.remove()
    return record, False


def write_slide(source: SlideInput, setup: Setup, out_dir: Path, watch: Watch = IDLE) -> RunRecord:
    """Write the cells of a slide whose tiles `run_slide` has done, here or on another machine; needs no network.

    Raises SlideError when the tiles are not there, Interrupted when asked to stop.
    """
    folder, config, began = out_dir / source.slide_id, setup.config, time.perf_counter()
    record = read_record(folder)
    if record is None:
        raise SlideError(f"{folder}: no tiles are done here; run the same command again")
    if record.status == "done":
        return record  # Written by a process that died before it could tell.
    record.status, record.error, record.counts.nuclei = "running", None, 0
    with open_source(source, config) as slide, held(folder, watch) as watch:
        parts = Parts.open(folder, fingerprint(record))
        with recorded_run(record, folder, setup, began):
            layout = lay_out(slide, setup)
            count_tiles(layout, parts, record)
            write_cells(folder, slide.info, layout, setup, parts, record, watch)
            write_formats(folder, with_present(folder, config.output), record, watch)
        if record.status == "done":
            parts.remove()
    return record


@contextmanager
def held(folder: Path, watch: Watch) -> Iterator[Watch]:
    """Hold a slide's folder, put right what a killed run left in it, and yield the watch that also heeds the lock.

    Raises BusyError when another run works there.
    """
    with hold(folder, watch.check) as lock:
        restore(folder)
        yield replace(watch, lock=lock.check)


def segment_array(model: LoadedModel | Segmenter, image: UInt8, mpp: float, config: SegmentConfig) -> Cells:
    """Return the nuclei of an image uint8 (H, W, 3) RGB of `mpp` µm/px, by the stages that a slide passes, in memory.

    Coordinates are pixels of the image. Raises TileError when a tile cannot be done.
    """
    if isinstance(model, LoadedModel):
        # Few tiles: decoding them here is quicker than starting processes.
        infer = replace(config.infer, workers=config.infer.workers or 0, batch_size=config.infer.batch_size or 1)
        with open_segmenter(model, replace(config, infer=infer)) as segmenter:
            return segment_array(segmenter, image, mpp, config)
    slide = slide_from_array(image, mpp)
    everywhere = replace(model, config=replace(model.config, tissue=TissueConfig(enabled=False)))
    layout = lay_out(slide, everywhere)
    results = model.detector.run(partial(read_tile, slide, layout.plane), layout.tiles, Seconds())
    parts = [to_part(result, layout, slide.info) for result in results]
    for part in parts:
        if part.error is not None:
            raise TileError(f"tile {part.tile_index} of the image: {part.error}")
    found_in = (p.cells for p in parts if p.cells is not None)
    found = list(merge_stream(found_in, layout.grid, same_point_um(model.spec)))
    return concat(found) if found else no_cells(model.spec)


def open_source(source: SlideInput, config: SegmentConfig) -> Slide:
    """Open a slide with the pixel size that `--mpp` or the list gives, if any."""
    given = source.mpp if config.mpp is None else config.mpp
    how: Literal["list", "flag"] = "list" if config.mpp is None else "flag"
    if source.path.exists() and not is_plain(source.path):
        raise SlideError(f"{source.path}: neither a plain file nor a folder")
    return open_slide(source.path, given, how, source.slide_id, source.local, config.allow_fluorescence)


def begin_record(slide: dict[str, Any], segmenter: Segmenter) -> RunRecord:
    """Return the record of a run that starts now on a slide, as `describe_slide` tells of it, its settings resolved."""
    spec, engine, config = segmenter.spec, segmenter.engine, segmenter.config
    return RunRecord(
        cellslide_version=__version__,
        status="running",
        slide=slide,
        config=resolved(config, spec),
        weights=[WeightsRef(spec.weights_id, spec.weights_sha256, spec.licence)],
        device=engine.device,
        engine=engine.name,
        precision=engine.precision,
        seed=config.infer.seed,
        started=now_utc(),
    )


def refuse_other_slide(folder: Path, record: RunRecord, overwrite: bool) -> None:
    """Raise UsageError where a folder holds the work of another slide of the same name; warn where that is given up."""
    if not (folder / TABLE).is_dir() and not (folder / PARTS_FOLDER).is_dir():
        return
    try:
        words = other_slide(read_record(folder), record.slide)
    except SlideError:
        return  # What is no record is answered where it is needed.
    if words and overwrite:
        log.warning("%s: %s; its results are replaced", folder, words)
    elif words:
        raise UsageError(f"{folder}: {words}; give another --output, or name both slides in one command")


def finished(folder: Path, record: RunRecord, output: OutputConfig, watch: Watch = IDLE) -> RunRecord | None:
    """Return the record of a slide that is complete, after making formats that are asked for and missing; else None.

    Raises UsageError, naming the differences, when the slide was done with other settings.
    """
    earlier = None if output.overwrite else read_record(folder)
    if earlier is None or earlier.status != "done" or not (folder / TABLE).is_dir():
        return None
    if words := differences(fingerprint(earlier), fingerprint(record)):
        raise UsageError(f"{folder}: done with other settings ({words}); --overwrite starts anew")
    changed = changed_sizes(folder)
    if TABLE in changed and not _replaced_since(folder, earlier):
        log.warning("%s: %s is not as it was written; the slide is done again", folder, TABLE)
        return None
    write_missing(folder, output, earlier, watch, changed)
    remove_folder(folder / PARTS_FOLDER)  # A run that was killed at its very end left it.
    return earlier


def _replaced_since(folder: Path, record: RunRecord) -> bool:
    """Tell whether a table is newer than its record: who typed or read its cells was killed before it wrote that."""
    try:
        with open_table(folder / TABLE) as table:
            kept = table.run
    except CellslideError:
        return False
    return any(kept.config.get(name) != record.config.get(name) for name in ("classify", "embed"))


def write_missing(
    folder: Path, output: OutputConfig, record: RunRecord, watch: Watch, damaged: Sequence[str] = ()
) -> None:
    """Write the formats that are asked for and not there, and anew those that other flags have made.

    damaged  names of files that are not as they were written; they are made again, too.
    """
    missing = {format.name for format in find_formats(output.formats) if not format.is_in(folder)}
    again = {format.name for format in FORMATS.values() for file in damaged if fnmatch(file, format.files)}
    if again:
        log.warning("%s: %s not as written; made again", folder, ", ".join(sorted(damaged)))
        missing |= again
    earlier = record.config.get("output", {})
    asked = {flag: getattr(output, flag) for format in FORMATS.values() for flag in format.shaped_by}
    changed = {flag for flag, value in asked.items() if earlier.get(flag, value) != value}
    outdated = {format.name for format in present_formats(folder) if changed.intersection(format.shaped_by)}
    wanted = tuple(name for name in FORMATS if name in missing | outdated)
    if wanted:
        write_formats(folder, replace(output, formats=wanted), record, watch)
    if changed:
        record.config = {**record.config, "output": {**earlier, **asked}}
    if changed or wanted:
        write_record(folder, record)


@contextmanager
def recorded_run(record: RunRecord, folder: Path, segmenter: Segmenter | Setup, began: float) -> Iterator[None]:
    """Keep `run.json` true: "running" now, at the end complete, or how it stopped and why."""
    write_record(folder, record)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        record.status = "interrupted" if stopped else "failed"
        record.error = None if stopped else in_words(error)
        # On a disk that is full or gone this fails too; what went wrong first is what counts.
        with suppress(OSError):
            close_record(record, folder, segmenter, began)
        raise
    close_record(record, folder, segmenter, began)


def close_record(record: RunRecord, folder: Path, segmenter: Segmenter | Setup, began: float) -> None:
    """Fill in what is known at the end, and write `run.json`."""
    record.finished = now_utc()
    record.seconds.total += time.perf_counter() - began
    record.peak_rss_bytes = max(record.peak_rss_bytes, peak_rss_bytes())
    record.peak_device_bytes = max(record.peak_device_bytes, segmenter.peak_device_bytes())
    write_record(folder, record)


def lay_out(slide: Slide, segmenter: Segmenter | Setup) -> Layout:
    """Decide where to search: the plane at the model's pixel size, its tissue and the tiles that meet it."""
    spec, config = segmenter.spec, segmenter.config
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


def write_searched(folder: Path, layout: Layout, slide: Slide, config: SegmentConfig) -> None:
    """Write `tissue.geojson`: the regions that are searched."""
    mask = layout.mask or find_tissue(slide, replace(config.tissue, enabled=False))
    write_tissue(mask, folder / TISSUE_FILE, slide.info, config.output.geojson_origin)


def read_tile(slide: Slide, plane: Plane, tile: Tile) -> UInt8:
    """Return the pixels of a tile's read box, uint8 (H, W, 3)."""
    return slide.read_plane(plane, tile.read_xyxy)


def to_part(result: TileResult, layout: Layout, info: SlideInfo) -> TilePart:
    """Return what a tile gave in level-0 pixels: what it answers for, and only inside what is to be searched.

    Without the second rule, how far beyond the tissue nuclei are found would depend on the tile size.
    """
    tile, instances = result.tile, result.instances
    if instances is None:
        return TilePart(tile.index, None, 0, result.error)
    cells = to_cells(instances, tile, layout.plane, info)
    if layout.mask is not None:
        cells = cells.take(layout.mask.contains(cells.centroid_xy))
    return TilePart(tile.index, cells, len(instances))


def detect_tiles(
    slide: Slide, layout: Layout, segmenter: Segmenter, parts: Parts, record: RunRecord, watch: Watch
) -> None:
    """Find the nuclei of all tiles that are not finished yet and keep them in `parts`; fills counts and failed tiles.

    Raises Interrupted when asked to stop, SlideError when not one tile could be done.
    """
    done = parts.done()
    todo = [tile for tile in layout.tiles if tile.index not in done]
    watch.progress.begin(slide.info.slide_id, len(layout.tiles), len(layout.tiles) - len(todo))
    results = segmenter.detector.run(partial(read_tile, slide, layout.plane), todo, record.seconds)
    try:
        with closing(results):
            keep_parts(results, layout, slide.info, parts, watch)
    except CellslideError:
        watch.check()  # A signal to the whole group ends the decoding processes too; that is a stop, not a failure.
        raise
    finally:
        count_tiles(layout, parts, record)
    if layout.tiles and record.counts.tiles_failed == len(layout.tiles):
        raise SlideError(
            f"{slide.info.path}: not one of {len(layout.tiles)} tiles could be done; {record.failed_tiles[0].error}"
        )


def keep_parts(results: Iterator[TileResult], layout: Layout, info: SlideInfo, parts: Parts, watch: Watch) -> None:
    """Write results to `parts` as they come, in groups; also those at hand when something stops the run."""
    group: list[TilePart] = []
    written = time.monotonic()
    try:
        for result in results:
            group.append(to_part(result, layout, info))
            watch.progress.advance(group[-1].n_raw)
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


def write_cells(
    folder: Path,
    info: SlideInfo,
    layout: Layout,
    segmenter: Segmenter | Setup,
    parts: Parts,
    record: RunRecord,
    watch: Watch,
) -> None:
    """Merge the parts and write `cells.zarr`, in one pass and bounded memory."""
    watch.progress.stage("merge")
    if gone := {t.index for t in layout.tiles} - parts.done() - parts.failed().keys():
        raise SlideError(f"{folder}: {len(gone)} finished tiles are not there any more; run the same command again")
    writer = CellTableWriter(folder / TABLE, info, segmenter.spec)
    merged = merge_stream(parts.stream(t.index for t in layout.tiles), layout.grid, same_point_um(segmenter.spec))
    try:
        for cells in timed(merged, record.seconds):
            start = time.perf_counter()
            writer.append(cells)
            record.seconds.write += time.perf_counter() - start
            record.counts.nuclei += len(cells)
            watch.check()
        record.status = "done_with_errors" if record.failed_tiles else "done"
        start = time.perf_counter()
        writer.close(record)
        record.seconds.write += time.perf_counter() - start
    except BaseException:
        writer.abort()
        raise


def timed(cells: Iterator[Cells], seconds: Seconds) -> Iterator[Cells]:
    """Pass the merged cells on and add up the time they took."""
    start = time.perf_counter()
    for chunk in cells:
        seconds.merge += time.perf_counter() - start
        yield chunk
        start = time.perf_counter()
    seconds.merge += time.perf_counter() - start


def with_present(folder: Path, output: OutputConfig) -> OutputConfig:
    """Return the settings with the formats added that lie there already, which a new table makes outdated."""
    there = (format.name for format in present_formats(folder))
    return replace(output, formats=tuple(dict.fromkeys((*output.formats, *there))))


def write_formats(folder: Path, output: OutputConfig, record: RunRecord, watch: Watch) -> None:
    """Write the other formats from the table."""
    watch.progress.stage("write")
    start = time.perf_counter()
    with open_table(folder / TABLE) as table:
        for name in output.formats:
            watch.check()
            export_table(table, folder, [name], output.geojson_origin, output.profile)
    record.seconds.write += time.perf_counter() - start


def no_cells(spec: ModelSpec) -> Cells:
    """Return an empty record with the columns that a model gives."""
    kind, n_classes = spec.kind, len(spec.classes)
    none = np.zeros(0, np.float32)
    whole = np.zeros(0, np.int32)
    return Cells(
        np.zeros((0, 2)), whole, whole, none, none,
        class_prob=np.zeros((0, n_classes), np.float32) if n_classes else None,
        box_xyxy=np.zeros((0, 4)) if kind == "box" else None,
        contour_xy=np.zeros((0, 2)) if kind == "mask" else None,
        contour_start=np.zeros(1, np.int64) if kind == "mask" else None,
        embedding=np.zeros((0, spec.embedding_dim), np.float32) if spec.embedding_dim else None,
    )  # fmt: skip
