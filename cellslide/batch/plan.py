"""What a run would do, for `--dry-run`: tiles or cells of each slide, and how long they would take here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from cellslide import weights
from cellslide.batch.work import ClassifyWork, on_device
from cellslide.classify import prepare
from cellslide.classify.slide import choose_cells, estimate, read_places
from cellslide.classify.targets import Target, check_slide, open_target, require_cells
from cellslide.config import SegmentConfig
from cellslide.inference.search import Layout, lay_out, read_tile
from cellslide.inference.segmenter import Segmenter, open_segmenter
from cellslide.pipeline import open_source
from cellslide.slides.inputs import SlideInput
from cellslide.slides.slide import Slide
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import TABLE


def plan_tiles(sources: Sequence[SlideInput], config: SegmentConfig, device: str) -> Iterator[str]:
    """Yield a line for each slide, its tiles and their time from one tile that is tried, and a line for all."""
    total, seconds_per_tile = 0, None
    config = replace(config, infer=on_device(config.infer, device, 1))
    with open_segmenter(weights.load_model(config.model, config.weights), config) as segmenter:
        for source in sources:
            tiles, seconds_per_tile = plan(source, segmenter, seconds_per_tile)
            total += tiles
            yield f"{source.slide_id}  {tiles:,} tiles  about {tiles * seconds_per_tile:,.0f} s  {source.path}"
    size, name = segmenter.config.tiles.size_px, segmenter.spec.weights_id
    where = f"{size} px at {segmenter.spec.mpp} µm/px, {name} on {segmenter.engine.device}"
    yield f"{len(sources)} slides, {total:,} tiles of {where}"


def plan_cells(targets: Sequence[Target], work: ClassifyWork, device: str) -> Iterator[str]:
    """Yield a line for each slide: its cells, and how long typing them takes."""
    config = replace(work.config, infer=on_device(work.config.infer, device, 1))
    classifier = replace(work, config=config).open().classifier
    for target in targets:
        require_cells(target)
        with (
            open_target(target, config.mpp, config.allow_fluorescence) as slide,
            open_table(target.folder / TABLE) as table,
        ):
            check_slide(target, slide)
            xy = read_places(table)
            chosen = prepare(slide, xy[choose_cells(xy, slide, classifier.config)], classifier)
            yield f"{target.source.slide_id}  {estimate(chosen, classifier)}  {slide.info.path}"


def plan(source: SlideInput, segmenter: Segmenter, seconds_per_tile: float | None = None) -> tuple[int, float]:
    """Return how many tiles a slide has and how long one takes here (s), measured with one tile unless given.

    Reading and decoding run beside the network and are not counted.
    """
    with open_source(source, segmenter.config) as slide:
        layout = lay_out(slide, segmenter)
        if seconds_per_tile is None and layout.tiles:
            seconds_per_tile = _time_one_tile(slide, layout, segmenter)
    return len(layout.tiles), seconds_per_tile or 0.0


def _time_one_tile(slide: Slide, layout: Layout, segmenter: Segmenter) -> float:
    tile = layout.tiles[len(layout.tiles) // 2]
    image = np.stack([read_tile(slide, layout.plane, tile)] * segmenter.engine.batch_size)
    segmenter.engine.launch(image)()  # The first pass also allocates and compiles.
    start = time.perf_counter()
    segmenter.engine.launch(image)()
    return (time.perf_counter() - start) / len(image)
