"""Start: how long help takes, and the first tile from when weights are in memory, each in processes of their own.

    python -m cellslide.bench.start [ID]

is such a process: it prints the seconds from weights in memory to the first tile's nuclei.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cellslide.bench.read import tissue
from cellslide.bench.rows import Row, Target, row
from cellslide.config import SegmentConfig, TissueConfig
from cellslide.inference.search import lay_out, read_tile
from cellslide.inference.segmenter import load_segmenter
from cellslide.slides.slide import slide_from_array
from cellslide.types import Seconds
from cellslide.weights import LoadedModel, load_model

STAGE, UNIT = "infer", "seconds"
# Of 0.25 µm/px; larger than a tile of the models that ship.
IMAGE_PX, MPP = 2048, 0.25


def start_rows(ids: list[str], rounds: int) -> Iterator[Row]:
    """Yield wall seconds of `--help`, and of the first tile of each model."""
    helped = [in_process("cellslide", "--help")[0] for _ in range(rounds)]
    yield row(STAGE, "start: --help", helped, UNIT, 1, None, Target(0.5))
    for name in ids:
        # The first one, not counted, compiles what this machine never ran.
        seconds = [float(in_process(__name__, name)[1]) for _ in range(rounds + 1)][1:]
        yield row(STAGE, f"start: first tile, {name}", seconds, UNIT, 1, None, Target(2))


def in_process(module: str, *arguments: str) -> tuple[float, str]:
    """Return the seconds that a module takes as a program, and the last line of what it prints."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, capture_output=True, text=True)
    return time.perf_counter() - begin, done.stdout.splitlines()[-1]


def first_tile(name: str | None) -> float:
    """Return the seconds from when a model's weights are in memory to the nuclei of the first tile."""
    slide = slide_from_array(tissue(IMAGE_PX), MPP)
    loaded = list[float]()

    def load(model: str | None, weights: Path | None) -> LoadedModel:
        found = load_model(model, weights)
        loaded.append(time.perf_counter())
        return found

    with load_segmenter(load, SegmentConfig(model=name, tissue=TissueConfig(enabled=False))) as segmenter:
        layout = lay_out(slide, segmenter)
        results = segmenter.detector.run(partial(read_tile, slide, layout.plane), layout.tiles[:1], Seconds())
        result = next(results)
        seconds = time.perf_counter() - loaded[0]
        if result.instances is None:
            raise SystemExit(f"the first tile has no nuclei: {result.error}")
    return seconds


if __name__ == "__main__":
    print(first_tile(sys.argv[1] if sys.argv[1:] else None))
