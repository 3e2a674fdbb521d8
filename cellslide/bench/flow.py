"""How well stages overlap: tiles through stages that only wait, beside the time that the busiest of them needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from unittest.mock import patch

import numpy as np

from cellslide.bench.rows import Row, Target, row
from cellslide.inference import stream as detect
from cellslide.inference.stream import Detector
from cellslide.inference.torch_engine import TileOutput
from cellslide.types import HoverDecode, HoverMaps, Instances, ModelSpec, Seconds, Tile, UInt8

TILES, TILE_PX = 60, 64
SPEC = ModelSpec("waits", "mask", 0.5, TILE_PX, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# Seconds a tile takes to read, in the network, to decode and to write: each stage is the busiest once.
WAITS = {
    "reading": (0.100, 0.025, 0.025, 0.001),
    "the network": (0.025, 0.050, 0.025, 0.001),
    "decoding": (0.025, 0.025, 0.100, 0.001),
}
READERS = WORKERS = 2
TARGET = Target(1.1)


def flow_rows() -> Iterator[Row]:
    """Yield wall time over the time of the busiest stage, for each stage in turn as the busiest."""
    for name, waits in WAITS.items():
        read, infer, decode, _ = waits
        floor = TILES * max(read / READERS, infer, decode / WORKERS)
        wall = passed(*waits)
        yield row("infer", f"overlap, {name} the busiest", [wall / floor], "of its time", TILES, None, TARGET)


class WaitingEngine:
    """A device of its own that takes its time over each tile and finds something everywhere."""

    spec, name, precision, device, batch_size = SPEC, "waits", "fp32", "none", 1

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.stream = ThreadPoolExecutor(1)

    def launch(self, images: UInt8) -> Callable[[], list[TileOutput]]:
        """Put tiles on the device; the returned call waits for them."""
        future: Future[list[TileOutput]] = self.stream.submit(self._run, len(images))
        return future.result

    def _run(self, n: int) -> list[TileOutput]:
        time.sleep(n * self.seconds)
        one = np.ones((TILE_PX, TILE_PX), np.uint8)
        return [HoverMaps(one, one.astype(np.float16), np.zeros((2, *one.shape), np.float32)) for _ in range(n)]

    def peak_device_bytes(self) -> int:
        """Return 0: no memory is held."""
        return 0


def passed(read_s: float, infer_s: float, decode_s: float, write_s: float) -> float:
    """Return the seconds that TILES tiles take through stages which take so long for each."""

    def read(tile: Tile) -> UInt8:
        time.sleep(read_s)
        return np.zeros((TILE_PX, TILE_PX, 3), np.uint8)

    def decode(maps: HoverMaps, config: HoverDecode) -> tuple[Instances, float]:
        time.sleep(decode_s)
        none = np.zeros(0, np.float32)
        return Instances(np.zeros((0, 2)), none, none, none > 0), decode_s

    tiles = [Tile(i, 0, i, *[(i * TILE_PX, 0, (i + 1) * TILE_PX, TILE_PX)] * 2) for i in range(TILES)]
    begin = time.perf_counter()
    with (
        Detector(WaitingEngine(infer_s), WORKERS) as detector,
        patch.object(detect, "_processes", ThreadPoolExecutor),
        patch.object(detect, "decode_task", decode),
    ):
        for _ in detector.run(read, tiles, Seconds()):
            time.sleep(write_s)
    return time.perf_counter() - begin
