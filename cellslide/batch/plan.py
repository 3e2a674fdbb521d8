"""What a request would do, for `--dry-run`: each slide's state, tiles or cells, and what all of it takes here."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellslide.batch.fetch import Fetch
from cellslide.batch.preflight import Checked, nearest_there
from cellslide.batch.work import SlideWork
from cellslide.classify import SlideClassifier, prepare
from cellslide.classify.slide import choose_cells, estimate, in_time, read_places
from cellslide.classify.targets import check_slide
from cellslide.errors import CellslideError, in_words
from cellslide.inference.search import Layout, lay_out, read_tile
from cellslide.inference.segmenter import Segmenter, begin_record, worker_count
from cellslide.inference.torch_engine import TorchEngine
from cellslide.slides.identity import describe_slide
from cellslide.slides.slide import Slide
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import TABLE, differences, fingerprint, peak_rss_bytes, read_record

# Dense tissue on H&E has 2,000 to 8,000 nuclei a mm²; a nucleus takes this much in all files, a page as much again.
NUCLEI_PER_MM2 = 4_000
BYTES_PER_NUCLEUS, PAGE_BYTES = 600, 1 << 19
# A process that decodes, and what tiles and tables in flight take beside the networks.
WORKER_BYTES, WORK_BYTES = 300 << 20, 500 << 20
# Edge of the part of a tile that is tried on a CPU.
TRIED_PX = 256


@dataclass(slots=True)
class Needs:
    """What slides take: tiles, cells, seconds of the networks, bytes on the disk; `paced` is seconds a tile."""

    tiles: int = 0
    cells: float = 0
    seconds: float = 0.0
    disk_bytes: float = 0.0
    paced: float | None = None


def plan_request(work: SlideWork, checked: Sequence[Checked], device: str, output: Path) -> Iterator[str]:
    """Yield a line a slide, and one for all: what would be done, and how long, in what memory and room on the disk.

    Seconds are those of the networks, from one batch that is tried; reading and decoding run beside them.
    """
    work, total, states = work.on(device, 1), Needs(), Counter[str]()
    with ExitStack() as resources:
        by = None if work.classify is None else work.classify.open()
        segmenter = None if work.segment is None else resources.enter_context(work.segment.open())
        for one in checked:
            state, words = _plan_slide(one, work, segmenter, by, total)
            states[state] += 1
            yield f"{one.target.source.slide_id}  {words}  {one.target.source.path}"
    if segmenter is not None:
        size, spec = segmenter.config.tiles.size_px, segmenter.spec
        where = f"{size} px at {spec.mpp} µm/px, {spec.weights_id} on {segmenter.engine.device}"
        yield f"{len(checked)} slides, {total.tiles:,} tiles of {where}"
    yield _sum(states, total, output, 0 if segmenter is None else worker_count(segmenter.config.infer))


def _sum(states: Counter[str], total: Needs, output: Path, workers: int) -> str:
    memory = peak_rss_bytes() + WORK_BYTES + workers * WORKER_BYTES
    free = shutil.disk_usage(nearest_there(output)).free
    counted = ", ".join(f"{n} {state}" for state, n in states.items())
    room = "" if total.disk_bytes < free else ": NOT ENOUGH ROOM"
    return (
        f"{counted}; about {in_time(total.seconds)}, {memory / 1e9:.1f} GB of memory, "
        f"{total.disk_bytes / 1e6:,.0f} MB of {free / 1e6:,.0f} MB on the disk{room}"
    )


def _plan_slide(
    one: Checked, work: SlideWork, segmenter: Segmenter | None, by: SlideClassifier | None, total: Needs
) -> tuple[str, str]:
    """Return the state of a slide and what would be done with it, in words; adds what it needs to `total`."""
    if one.state == "running":
        return "running", "another run works on it"
    if one.error is not None:
        return "failing", f"cannot be done: {in_words(one.error)}"
    if one.target.source.remote is not None:
        return one.state, _plan_fetch(one)
    try:
        with work.open_slide(one.target) as slide:
            if segmenter is None:
                if by is None:
                    raise ValueError("nothing to do")
                return one.state, _plan_typing(one, slide, by, total)
            overwrite = segmenter.config.output.overwrite
            if not overwrite and (words := _stale(one, slide, segmenter)):
                return "stale", f"stale, left as it is without --overwrite ({words})"
            if one.state == "done" and not overwrite and by is None:
                return "done", "done already, is skipped"
            return one.state, _plan_tiles(slide, segmenter, by, total)
    except CellslideError as error:
        return "failing", f"cannot be done: {in_words(error)}"


def _plan_fetch(one: Checked) -> str:
    """Return in words what becomes of a slide at an address; its tiles are not known before it is here."""
    if one.state == "done":
        return "done already, is not fetched if the settings are the same"
    size = Fetch(one.target.source).ask().size_bytes
    return "would be fetched" if size is None else f"would be fetched, {size / 1e6:,.0f} MB"


def _stale(one: Checked, slide: Slide, segmenter: Segmenter) -> str:
    """Return in words where a finished slide was done with other settings, or ""."""
    earlier = read_record(one.target.folder) if one.state == "done" else None
    if earlier is None:
        return ""
    return differences(fingerprint(earlier), fingerprint(begin_record(describe_slide(slide.info), segmenter)))


def _plan_tiles(slide: Slide, segmenter: Segmenter, by: SlideClassifier | None, total: Needs) -> str:
    layout = lay_out(slide, segmenter)
    if total.paced is None and layout.tiles:
        total.paced = _time_one_tile(slide, layout, segmenter)
    n, tiles = len(layout.tiles), segmenter.config.tiles
    step_mm = ((tiles.size_px or 0) - (tiles.overlap_px or 0)) * segmenter.spec.mpp / 1e3
    cells = n * step_mm**2 * NUCLEI_PER_MM2
    seconds = n * (total.paced or 0.0)
    if by is not None:
        pace = by.classifier.pace
        seconds += cells * (pace.local + (pace.fusion + pace.context if by.classifier.has_global else 0.0))
    total.tiles, total.cells, total.seconds = total.tiles + n, total.cells + cells, total.seconds + seconds
    total.disk_bytes += PAGE_BYTES + cells * BYTES_PER_NUCLEUS
    return f"{n:,} tiles  about {in_time(seconds)}"


def _plan_typing(one: Checked, slide: Slide, by: SlideClassifier, total: Needs) -> str:
    classifier = by.classifier
    check_slide(one.target, slide)
    with open_table(one.target.folder / TABLE) as table:
        xy = read_places(table)
    chosen = prepare(slide, xy[choose_cells(xy, slide, classifier.config)], classifier)
    total.cells += len(chosen)
    total.seconds += chosen.seconds(classifier.pace)[1]
    total.disk_bytes += PAGE_BYTES + len(xy) * BYTES_PER_NUCLEUS
    return estimate(chosen, classifier)


def _time_one_tile(slide: Slide, layout: Layout, segmenter: Segmenter) -> float:
    """Return the seconds of a tile in a batch; on a CPU from a part of one, as time there goes with pixels."""
    tile, engine = layout.tiles[len(layout.tiles) // 2], segmenter.engine
    image = read_tile(slide, layout.plane, tile)[None]
    whole = image.shape[1] * image.shape[2]
    # A CPU does the tiles of a batch one after another, and has nothing to warm up.
    if engine.device.startswith("cpu") and isinstance(engine, TorchEngine) and not segmenter.config.infer.compile:
        image = image[:, :TRIED_PX, :TRIED_PX]
    else:
        image = np.repeat(image, engine.batch_size, axis=0)
        engine.launch(image)()  # The first pass also allocates and compiles.
    start = time.perf_counter()
    engine.launch(image)()
    return float((time.perf_counter() - start) * whole / (len(image) * image.shape[1] * image.shape[2]))
