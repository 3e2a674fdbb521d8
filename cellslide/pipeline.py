"""A slide in, a cell table out: the whole flow.

slide -> tissue, tiles -> network -> cells of tiles, kept on disk -> merged -> classifier -> table -> other formats
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from cellslide.classify.columns import DecidedColumns, Rule
from cellslide.classify.slide import (
    SlideClassifier,
    Typing,
    classify_table,
    note,
    note_typing,
    type_cells,
    typed_store,
)
from cellslide.classify.store import PartialProbs
from cellslide.classify.targets import Target, check_slide, open_target, require_cells
from cellslide.config import SegmentConfig, TissueConfig
from cellslide.errors import Interrupted, SlideError, TileError
from cellslide.formats.files import renew_files, write_formats, write_missing
from cellslide.inference.search import (
    TISSUE_FILE,
    Layout,
    count_tiles,
    detect_tiles,
    lay_out,
    merged_cells,
    read_tile,
    to_part,
    write_searched,
)
from cellslide.inference.segmenter import Segmenter, Setup, begin_record, open_segmenter
from cellslide.nuclei.merge import merge_stream, same_point_um
from cellslide.plausibility.artefacts import find_artefacts, read_fields, write_fields
from cellslide.plausibility.verdict import judge_folder
from cellslide.progress import IDLE, Watch
from cellslide.slides.identity import describe_slide, refuse_other_slide
from cellslide.slides.inputs import SlideInput
from cellslide.slides.slide import Slide, open_slide, slide_from_array
from cellslide.store.cell_table import open_table
from cellslide.store.file_list import changed_sizes
from cellslide.store.foreign_files import is_plain
from cellslide.store.run_record import TABLE, fingerprint, read_record, write_record
from cellslide.store.slide_folder import find_finished, held, recorded_run
from cellslide.store.table_writer import CellTableWriter
from cellslide.store.tile_checkpoint import Parts
from cellslide.types import Cells, ModelSpec, RunRecord, Seconds, UInt8, concat
from cellslide.types.address import full_name
from cellslide.weights import LoadedModel
from cellslide.weights.organs import Organ

# The record of a slide, and whether it was complete before.
Done = tuple[RunRecord, bool]


def segment_slide(source: SlideInput, segmenter: Segmenter, out_dir: Path, watch: Watch = IDLE) -> Done:
    """Find every nucleus of one slide and write its folder `out_dir/<slide_id>`; goes on from tiles that are finished.

    Raises UsageError when the folder holds work done with other settings, Interrupted when asked to stop, SlideError
    when the slide cannot be read.
    """
    return run_slide(source, segmenter, None, out_dir, watch)


def classify_slide(target: Target, by: SlideClassifier, watch: Watch = IDLE) -> Done:
    """Type the cells in a slide's folder and write its files anew; goes on from cells that are typed.

    Raises UsageError where there are no cells or they were typed with other settings, SlideError without the slide.
    """
    require_cells(target)
    config, organ = by.classifier.config, by.find_organ(target.source.organ)
    with open_target(target, config.mpp, config.allow_fluorescence) as slide, held(target.folder, watch) as watch:
        check_slide(target, slide)
        return classify_table(target.folder, slide, by.classifier, by.rule, organ, watch)


def run_slide(
    source: SlideInput,
    segmenter: Segmenter,
    by: SlideClassifier | None,
    out_dir: Path,
    watch: Watch = IDLE,
    *,
    tiles_only: bool = False,
) -> Done:
    """Find the nuclei of one slide, type them where there is a classifier, and write each file of its folder once.

    tiles_only  ends when the tiles are done and kept on disk; `type_slide` and `write_slide` do the rest, anywhere.
    Nuclei that cannot be typed are written all the same, then the error is raised; others as `segment_slide`.
    """
    folder, setup, began = out_dir / source.slide_id, segmenter.setup, time.perf_counter()
    organ = None if by is None else by.find_organ(source.organ)
    with open_source(source, setup.config) as slide, held(folder, watch) as watch:
        record = begin_record(describe_slide(slide.info, source.local), segmenter)
        refuse_other_slide(folder, record, setup.config.output.overwrite, source.local)
        if earlier := finished(slide, folder, record, setup):
            if by is not None and organ is not None:
                return classify_table(folder, slide, by.classifier, by.rule, organ, watch)
            return _kept(folder, setup, earlier, watch)
        parts, typing = Parts.open(folder, fingerprint(record), setup.config.output.overwrite), None
        with recorded_run(record, folder, segmenter.peak_device_bytes, began):
            layout = lay_out(slide, setup)
            record.searched_mm2 = write_searched(folder, layout, slide, setup.config)
            found = Found(slide, folder, setup, layout, parts, record)
            detect_tiles(slide, layout, segmenter, parts, record, watch)
            if tiles_only:
                return record, False
            if by is not None and organ is not None:
                typing = found.type_or_error(by, organ, watch)
            found.write(typing, None if by is None else by.rule, watch)
        found.forget(typing)
    if isinstance(typing, Exception):
        raise typing
    return record, False


def _kept(folder: Path, setup: Setup, earlier: RunRecord, watch: Watch) -> Done:
    """Put right the files of a finished slide, and return its record."""
    renew_files(folder, watch)
    write_missing(folder, setup.config.output, earlier, watch, changed_sizes(folder))
    return earlier, True


def done_before(
    target: Target, segmenter: Segmenter | None, by: SlideClassifier | None, watch: Watch = IDLE
) -> Done | None:
    """Return the record of a slide that is done and of whose pixels nothing is needed, its files put right; else None.

    Its folder alone tells, so a slide that takes long to fetch is not fetched for this.
    Raises UsageError where it was done with other settings, naming the differences.
    """
    folder, source = target.folder, target.source
    earlier = read_record(folder)
    if earlier is None or earlier.status != "done" or earlier.slide["path"] != full_name(source.path):
        return None
    if TISSUE_FILE in changed_sizes(folder) or (by is not None and "classify" not in earlier.config):
        return None
    config = None if segmenter is None else segmenter.config
    given = (config and config.mpp) or (by and by.classifier.config.mpp) or source.mpp
    slide = earlier.slide if given is None else {**earlier.slide, "mpp": given}
    if segmenter is None and slide != earlier.slide:
        return None
    with held(folder, watch) as watch:
        if segmenter is not None and find_finished(folder, begin_record(slide, segmenter)) is None:
            return None
        if by is not None:
            return classify_table(folder, None, by.classifier, by.rule, by.find_organ(source.organ), watch)
        return None if segmenter is None else _kept(folder, segmenter.setup, earlier, watch)


@dataclass(frozen=True, slots=True)
class Found:
    """A slide whose nuclei are found: where it was searched, its tiles on disk, its record."""

    slide: Slide
    folder: Path
    setup: Setup
    layout: Layout
    parts: Parts
    record: RunRecord

    def merged(self) -> Iterator[Cells]:
        """Yield the cells in their final order."""
        return merged_cells(self.parts, self.layout, self.setup.spec)

    def type(self, by: SlideClassifier, organ: Organ, watch: Watch) -> Typing:
        """Run the classifier on the cells; its probabilities are kept on disk."""
        places = [np.asarray(cells.centroid_xy, np.float64) for cells in self.merged()]
        xy = np.concatenate([np.empty((0, 2)), *places])
        return type_cells(self.folder, xy, self.slide, by.classifier, organ, watch)

    def type_or_error(self, by: SlideClassifier, organ: Organ, watch: Watch) -> Typing | Exception:
        """Return what `type` does, or why it cannot; raises Interrupted."""
        try:
            return self.type(by, organ, watch)
        except Interrupted:
            raise
        except Exception as error:
            return error

    def write(self, typing: Typing | Exception | None, rule: Rule | None, watch: Watch) -> None:
        """Merge the cells and write `cells.zarr`, in one pass and bounded memory, then the other formats."""
        columns = None
        if isinstance(typing, Typing) and rule is not None:
            store, settings = typed_store(self.folder, typing), typing.settings
            columns = DecidedColumns(store.block, rule.for_organ(settings["organ_trained"]), settings["organ"])
            note_typing(self.record, typing)
        watch.progress.stage("merge")
        spec, classes = self.setup.spec, typing.spec.classes if isinstance(typing, Typing) else None
        artefacts = find_artefacts(self.parts.fields(), self.layout.plane)
        write_searched(self.folder, self.layout, self.slide, self.setup.config, artefacts.regions())
        further = None if columns is None else columns.block
        writer = CellTableWriter(self.folder / TABLE, self.slide.info, spec, further, classes, artefacts.contains)
        seconds = self.record.seconds
        try:
            for cells in timed(self.merged(), seconds):
                start = time.perf_counter()
                writer.append(cells)
                seconds.write += time.perf_counter() - start
                self.record.counts.nuclei += len(cells)
                watch.check()
            start = time.perf_counter()
            writer.flush()
            # A network that types as it finds may reject; a classifier that comes after decides anew.
            self.record.counts.rejected = writer.n_rejected
            self.record.counts.nuclei -= writer.n_rejected
            self.record.status = "done_with_errors" if self.record.failed_tiles else "done"
            if columns is not None and isinstance(typing, Typing):
                note(self.record, columns, typing.settings)
                columns.name_projected(writer.group)
            write_fields(writer.group, artefacts.fields)
            writer.close(self.record)
            seconds.write += time.perf_counter() - start
        except BaseException:
            writer.abort()
            raise
        self.record.verdict = judge_folder(self.folder, self.record)
        write_formats(self.folder, self.setup.config.output, self.record, watch, anew=True)

    def forget(self, typing: Typing | Exception | None) -> None:
        """Delete what was kept for a run that goes on; called when the record is that of a complete slide."""
        if isinstance(typing, Typing):
            PartialProbs.discard(self.folder)
        if self.record.status == "done":
            self.parts.remove()


@contextmanager
def reopened(source: SlideInput, setup: Setup, out_dir: Path, watch: Watch) -> Iterator[tuple[Found, Watch]]:
    """Yield a slide whose tiles `run_slide` has done, here or on another machine, and the watch of its folder.

    Raises SlideError when the tiles are not there.
    """
    folder = out_dir / source.slide_id
    record = read_record(folder)
    if record is None:
        raise SlideError(f"{folder}: no tiles are done here; run the same command again")
    with open_source(source, setup.config) as slide, held(folder, watch) as watch:
        parts = Parts.open(folder, fingerprint(record))
        layout = lay_out(slide, setup)
        count_tiles(layout, parts, record)
        yield Found(slide, folder, setup, layout, parts, record), watch


def type_slide(source: SlideInput, setup: Setup, by: SlideClassifier, out_dir: Path, watch: Watch = IDLE) -> Typing:
    """Type the nuclei of a slide whose tiles `run_slide` has done; raises as `reopened` and `classify_slide`."""
    organ = by.find_organ(source.organ)
    with reopened(source, setup, out_dir, watch) as (found, watch):
        return found.type(by, organ, watch)


def write_slide(
    source: SlideInput,
    setup: Setup,
    out_dir: Path,
    watch: Watch = IDLE,
    typing: Typing | None = None,
    rule: Rule | None = None,
) -> RunRecord:
    """Write the files of a slide whose tiles `run_slide` has done, and `type_slide` has typed; needs no network.

    Raises SlideError when the tiles are not there, Interrupted when asked to stop.
    """
    began, record = time.perf_counter(), read_record(out_dir / source.slide_id)
    if record is not None and record.status == "done":
        return record  # Written by a process that died before it could tell.
    with reopened(source, setup, out_dir, watch) as (found, watch):
        found.record.status, found.record.error = "running", None
        found.record.counts.nuclei = found.record.counts.rejected = 0
        with recorded_run(found.record, found.folder, lambda: 0, began):
            found.write(typing, rule, watch)
        found.forget(typing)
    return found.record


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
    layout = lay_out(slide, everywhere.setup)
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


def finished(slide: Slide, folder: Path, record: RunRecord, setup: Setup) -> RunRecord | None:
    """Return the record of a slide whose nuclei are complete; what was searched is written again where it is gone.

    Raises UsageError, naming the differences, when the slide was done with other settings.
    """
    earlier = None if setup.config.output.overwrite else find_finished(folder, record)
    if earlier is not None and TISSUE_FILE in changed_sizes(folder):
        layout = lay_out(slide, setup)
        with open_table(folder / TABLE) as table:
            artefacts = find_artefacts(read_fields(table), layout.plane)
        write_searched(folder, layout, slide, setup.config, artefacts.regions())
        write_record(folder, earlier)
    return earlier


def timed(cells: Iterator[Cells], seconds: Seconds) -> Iterator[Cells]:
    """Pass the merged cells on and add up the time they took."""
    start = time.perf_counter()
    for chunk in cells:
        seconds.merge += time.perf_counter() - start
        yield chunk
        start = time.perf_counter()
    seconds.merge += time.perf_counter() - start


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
