"""What checks cost: of what a slide is when it is opened, of what a network gives, and of what is written.

`python -m benchmarks.checks` segments a painted slide with the network that ships, on the CPU, and prints each check's
share of the CPU time of the run; it ends with 1 where they come to more than 1 % together. What is done when a slide is
opened costs a large one no more than a small one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from cellslide.bench.read import write_tiled
from cellslide.config import InferConfig, OutputConfig, SegmentConfig, TissueConfig
from cellslide.inference.segmenter import open_segmenter
from cellslide.pipeline import segment_slide
from cellslide.slides.inputs import SlideInput
from cellslide.weights import load_model

MOST_SHARE = 0.01
CHECKS = {
    "a sample decoded, levels compared": "cellslide.slides.readers.looked_at",
    "tiles that are missing": "cellslide.inference.search.missing_tissue",
    "ends and blocks of the slide hashed": "cellslide.slides.identity.slide_sha256",
    "values of the network finite": "cellslide.inference.stream.checked",
    "size and CRC of all files": "cellslide.store.file_list.listed",
    "files brought to the disk": "cellslide.store.atomic.to_disk",
}


class Clock:
    """CPU seconds and calls of functions by name, over all threads."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - start
                with self._lock:
                    self.seconds[name] += spent
                    self.calls[name] += 1

        return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the slide; returns 1 where the checks cost more than they may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="edge of the slide in pixels")
    parser.add_argument("--task", choices=("segment", "detect"), default="segment")
    options = parser.parse_args(arguments)
    config = SegmentConfig(
        tissue=TissueConfig(enabled=False), infer=InferConfig(device="cpu", workers=0), output=OutputConfig()
    )
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="cellslide-checks-") as folder, ExitStack() as patches:
        path = Path(folder) / "slide.svs"
        write_tiled(path, "jpeg", options.size)
        segmenter = patches.enter_context(open_segmenter(load_model(task=options.task), config))
        for name, place in CHECKS.items():
            patch = mock.patch(place, clock.timed(name, _named(place)))
            patches.enter_context(patch)
        start = time.process_time()
        record = segment_slide(SlideInput(path, slide_id="slide"), segmenter, Path(folder) / "out")[0]
        total = time.process_time() - start
    for name in CHECKS:
        spent = clock.seconds[name]
        print(f"{name:40} {clock.calls[name]:5} calls {1e3 * spent:8.1f} ms {spent / total:8.3%}")
    share = sum(clock.seconds.values()) / total
    print(f"{'together':40} {record.counts.tiles:5} tiles {1e3 * total:8.0f} ms {share:8.3%}")
    return int(share > MOST_SHARE)


def _named(place: str) -> Callable[..., Any]:
    module, _, name = place.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


if __name__ == "__main__":
    sys.exit(main())
