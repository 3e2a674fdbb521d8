"""What is asked of a GPU: networks of the published sizes with random weights, on painted tissue; not measured without.

What a network costs does not depend on its weights. What random ones find is noise, so that the decoding processes get
drawn maps instead.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from torch import Tensor

from cellslide.bench.decode import synthetic_maps
from cellslide.bench.fake import DrawnMaps, covered_mm2, picture
from cellslide.bench.read import write_tiled
from cellslide.bench.rows import BenchOptions, Row, Target, row, timed
from cellslide.config import ClassifyConfig, InferConfig
from cellslide.inference.device import available_cpus, resolve_device
from cellslide.inference.search import read_tile
from cellslide.inference.stream import Detector, default_workers
from cellslide.inference.torch_engine import Engine, TileOutput, TorchEngine
from cellslide.models import layers
from cellslide.slides.slide import Slide, open_slide
from cellslide.slides.tiles import tile_grid
from cellslide.types import Float64, HoverDecode, ModelSpec, Plane, Seconds, UInt8
from cellslide.weights.classifier import LoadedClassifier

# The published CellVTA on UNI.
FULL = ModelSpec(
    "CellVTA-UNI, random weights", "mask", 0.25, 1024, 128, (0.5,) * 3, (0.5,) * 3, decode=HoverDecode("fixed")
)
SAMPLING = "deformable attention"
SLIDE_PX, NUCLEI_A_TILE = 8192, 300
NUCLEI = 300_000
HOURS = f"hours for {NUCLEI:,} nuclei"


@dataclass(frozen=True, slots=True)
class Typing:
    """A way to type nuclei and what is asked of it; `per_second` counts nuclei, else hours for NUCLEI of them."""

    name: str
    config: ClassifyConfig
    target: Target
    per_second: bool = False


TYPINGS = (
    Typing("local path", ClassifyConfig(paths="local"), Target(1000, more=True), per_second=True),
    Typing("local + global, shared contexts", ClassifyConfig(context_grid=128), Target(0.12)),
    Typing("local + global of 512 px, a context a nucleus", ClassifyConfig(context_size=512), Target(0.25)),
)


def gpu(options: BenchOptions) -> str | None:
    """Return the CUDA device that is meant, None where there is none."""
    device = resolve_device(options.device if options.device.startswith("cuda") else "auto")
    return str(device) if device.type == "cuda" else None


def segment_rows(options: BenchOptions) -> Iterator[Row]:
    """Yield seconds per mm2 of the segmentation network, and how much of a slide's time the GPU computes."""
    device = gpu(options)
    if device is None:
        yield row("infer", f"{FULL.name}, cuda bf16", [], "s a mm2", 0, None, Target(0.7))
        yield row("infer", SAMPLING, [], "of the network's time", 0, None, Target(0.25))
        yield row("infer", "GPU busy on a slide", [], "of the time", 0, None, Target(0.9, more=True))
        return
    from cellslide.models.cellvta import CellVTA, CellVTAConfig

    config = InferConfig(device=device, precision="bf16", batch_size=options.batch_size)
    engine = TorchEngine(CellVTA(CellVTAConfig()), FULL, config, FULL.tile_px)
    whole = network_row(engine, options.rounds)
    yield whole
    yield sampling_row(engine, options.rounds, whole)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "slide.svs"
        write_tiled(file, "jpeg", SLIDE_PX)
        with open_slide(file) as slide:
            yield busy_row(engine, slide, default_workers(available_cpus()))


def network_row(engine: Engine, rounds: int) -> Row:
    """Return the seconds per mm2 of a network alone, batch after batch."""
    spec, size = engine.spec, engine.batch_size
    images = picture(spec.tile_px, size)
    covered = size * covered_mm2(spec)
    seconds = [s / covered for s in timed(lambda: engine.launch(images)(), rounds, time.perf_counter)]
    return row("infer", f"{spec.name}, cuda {engine.precision}", seconds, "s a mm2", size, None, Target(0.7))


def sampling_row(engine: Engine, rounds: int, whole: Row) -> Row:
    """Return the share of a network's time, `whole`, that deformable attention samples in."""
    with patch.object(layers, "sample_deformable", sample_nothing):
        rest = network_row(engine, rounds)
    share = [1 - rest.value / whole.value] if rest.value and whole.value else []
    return row("infer", SAMPLING, share, "of the network's time", whole.count, None, Target(0.25))


def sample_nothing(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Give zeros in the place of `layers.sample_deformable`."""
    return value.new_zeros(*locations.shape[:2], value.shape[2] * value.shape[3])


def busy_row(engine: Engine, slide: Slide, workers: int) -> Row:
    """Return the share of a slide's time in which the network computes: its time alone over that of the whole flow."""
    spec = engine.spec
    plane = Plane.of(slide.info, spec.mpp)
    tiles = list(tile_grid(plane, spec.tile_px, spec.overlap_px).tiles())
    drawn = DrawnMaps(spec, synthetic_maps(NUCLEI_A_TILE, spec.tile_px).hover_maps(), engine)
    with Detector(drawn, workers) as detector:
        read = partial(read_tile, slide, plane)
        for _ in detector.run(read, tiles[: engine.batch_size], Seconds()):
            pass  # starts the processes
        wall = passed(lambda: [None for _ in detector.run(read, tiles, Seconds())])
    images = np.zeros((engine.batch_size, spec.tile_px, spec.tile_px, 3), np.uint8)
    alone = passed(lambda: one_after_another(engine, images, len(tiles)))
    return row("infer", "GPU busy on a slide", [alone / wall], "of the time", len(tiles), None, Target(0.9, more=True))


def one_after_another(engine: Engine, images: UInt8, n: int) -> None:
    """Pass `n` tiles through a network, each batch started before the last one is fetched."""
    waiting: Callable[[], list[TileOutput]] | None = None
    for first in range(0, n, len(images)):
        current = engine.launch(images[: n - first])
        if waiting is not None:
            waiting()
        waiting = current
    if waiting is not None:
        waiting()


def classify_rows(options: BenchOptions) -> Iterator[Row]:
    """Yield how fast the published classifier types painted nuclei on a GPU, in each of TYPINGS."""
    device = gpu(options)
    if device is None:
        for typing in TYPINGS:
            yield _typed(typing, [], 0)
        return
    from cellslide.classify.effects import painted_cells, random_classifier

    loaded, infer = random_classifier("full"), InferConfig(device=device, precision="bf16")
    slide, xy = painted_cells(options.nuclei or 4000)
    for typing in TYPINGS:
        yield typing_row(typing, loaded, infer, slide, xy, options.rounds)


def typing_row(
    typing: Typing, loaded: LoadedClassifier, infer: InferConfig, slide: Slide, xy: Float64, rounds: int
) -> Row:
    """Return the speed of one way of typing the nuclei (N, 2; level-0 px) of a slide."""
    from cellslide.classify.cells import gather
    from cellslide.classify.engine import open_classifier

    classifier = open_classifier(loaded, replace(typing.config, infer=infer))
    return _typed(typing, timed(lambda: gather(slide, xy, 0, classifier), rounds, time.perf_counter), len(xy))


def _typed(typing: Typing, seconds: Sequence[float], count: int) -> Row:
    values = [count / s if typing.per_second else s / count * NUCLEI / 3600 for s in seconds]
    form = f"NuClass, random weights, cuda bf16: {typing.name}"
    return row("classify", form, values, "nuclei/s" if typing.per_second else HOURS, count, None, typing.target)


def passed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
