from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import psutil
import pytest

from cellslide.config import InferConfig
from cellslide.inference.stream import (
    Detector,
    TileResult,
    decode_alone,
    decode_task,
    default_workers,
    read_ahead,
    start_processes,
)
from cellslide.inference.torch_engine import TileOutput, TorchEngine
from cellslide.types import HoverDecode, HoverMaps, Instances, ModelSpec, Seconds, Tile, UInt8
from tests.conftest import CHECKOUT
from tests.support.fakes import FakeBox, FakeMask, fake_spec

SIZE = 64


def tile(index: int) -> Tile:
    box = (SIZE * index, 0, SIZE * (index + 1), SIZE)
    return Tile(index, 0, index, box, box)


def paint(t: Tile) -> UInt8:
    """Return a tile with `index` discs; tile 0 is empty."""
    image = np.full((SIZE, SIZE, 3), 240, np.uint8)
    rows, cols = np.mgrid[:SIZE, :SIZE]
    for k in range(t.index):
        x, y = 10 + 20 * (k % 3), 10 + 20 * (k // 3)
        image[(rows + 0.5 - y) ** 2 + (cols + 0.5 - x) ** 2 < 49] = (120, 60, 150)
    return image


def detector(batch: int = 2, workers: int = 0) -> Detector:
    engine = TorchEngine(FakeMask(), fake_spec(), InferConfig(device="cpu", batch_size=batch), SIZE)
    return Detector(engine, workers)


def found(results: Iterator[TileResult]) -> list[tuple[int, list[list[float]], list[list[float]]]]:
    listed = []
    for r in results:
        i = r.instances
        listed.append(
            (r.tile.index, [], []) if i is None else (r.tile.index, i.centroid_xy.tolist(), i.contour_xy.tolist())
        )
    return listed


def test_each_tile_gives_its_discs_in_order() -> None:
    results = list(detector().run(paint, map(tile, range(6)), Seconds()))
    assert [r.tile.index for r in results] == list(range(6))
    assert [0 if r.instances is None else len(r.instances) for r in results] == list(range(6))
    assert results[1].instances is not None
    np.testing.assert_allclose(results[1].instances.centroid_xy, [[10, 10]])


def test_batch_and_workers_change_nothing() -> None:
    expected = found(detector().run(paint, map(tile, range(6)), Seconds()))
    assert found(detector(batch=1).run(paint, map(tile, range(6)), Seconds())) == expected
    assert found(detector(batch=16).run(paint, map(tile, range(6)), Seconds())) == expected
    seconds = Seconds()
    with detector(batch=3, workers=2) as pool:
        assert found(pool.run(paint, map(tile, range(6)), seconds)) == expected
        assert (
            found(pool.run(paint, map(tile, range(6)), seconds)) == expected
        )  # the processes serve the next slide too
    assert min(seconds.read, seconds.infer, seconds.decode) > 0


def test_order_holds_when_early_reads_are_slow() -> None:
    def slow_first(t: Tile) -> UInt8:
        time.sleep(0.02 * (5 - t.index))
        return paint(t)

    assert [i for i, _, _ in found(detector().run(slow_first, map(tile, range(6)), Seconds()))] == list(range(6))


def test_boxes_pass_through() -> None:
    engine = TorchEngine(FakeBox(), fake_spec("box"), InferConfig(device="cpu"), SIZE)
    results = list(Detector(engine, 0).run(paint, map(tile, range(3)), Seconds()))
    assert results[0].instances is None and results[2].instances is not None
    assert results[2].instances.box_xyxy is not None and len(results[2].instances.box_xyxy) == 2


def test_a_tile_that_cannot_be_read_fails_alone() -> None:
    def read(t: Tile) -> UInt8:
        if t.index == 2:
            raise OSError("bad block")
        return paint(t)

    for batch in (1, 2, 8):
        results = list(detector(batch).run(read, map(tile, range(4)), Seconds()))
        assert [r.error for r in results] == [None, None, "read: OSError: bad block", None]
        assert results[3].instances is not None and len(results[3].instances) == 3


@pytest.mark.parametrize("device", ["cpu", "a device"])
def test_a_result_comes_while_the_network_has_the_next_tiles(device: str) -> None:
    taken = threading.Event()

    class Slow(Scripted):
        def launch(self, images: UInt8) -> Callable[[], list[TileOutput]]:
            fetch = super().launch(images)
            # On a CPU the second tile is done when its launch returns; elsewhere two may be under way.
            if len(self.outputs) == (1 if device == "cpu" else 0):
                assert taken.wait(20), "the network is done with another tile before the first result is taken"
            return fetch

    with Detector(Slow([maps_of(tile(i)) for i in (1, 2, 3)], device=device), 0) as chain:
        results = chain.run(paint, map(tile, range(1, 4)), Seconds())
        first = next(results)
        taken.set()
        assert [r.tile.index for r in (first, *results)] == [1, 2, 3]


def test_a_failing_network_ends_the_run_and_its_thread() -> None:
    with Detector(Scripted([]), 0) as chain, pytest.raises(IndexError):
        list(chain.run(paint, [tile(1)], Seconds()))
    assert not [t for t in threading.enumerate() if t.name.startswith("cellslide-network")]


def test_processes_started_beforehand_decode() -> None:
    pool = start_processes(1)
    assert pool is not None and start_processes(0) is None
    with Detector(detector(workers=1).engine, 1, pool) as chain:
        (pid,) = pool._processes
        assert found(chain.run(paint, [tile(2)], Seconds())) == found(detector().run(paint, [tile(2)], Seconds()))
        assert chain._pool is pool and list(pool._processes) == [pid]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not psutil.pid_exists(pid)


@dataclass
class Scripted:
    """An engine that gives maps made beforehand."""

    outputs: list[TileOutput]
    batch_size: int = 1
    spec: ModelSpec = fake_spec()
    name: str = "scripted"
    precision: str = "fp32"
    device: str = "cpu"

    def launch(self, images: UInt8) -> Callable[[], list[TileOutput]]:
        given = [self.outputs.pop(0) for _ in images]
        return lambda: given

    def peak_device_bytes(self) -> int:
        return 0


def maps_of(t: Tile) -> HoverMaps:
    out = TorchEngine(FakeMask(), fake_spec(), InferConfig(device="cpu"), SIZE).launch(paint(t)[None])()[0]
    assert isinstance(out, HoverMaps)
    return out


def test_a_tile_that_cannot_be_decoded_fails_alone() -> None:
    good = maps_of(tile(2))
    bad = replace(good, hv=np.zeros((2, 3, 3), np.float32))
    for workers in (0, 1):
        with Detector(Scripted([good, bad, good]), workers) as chain:
            results = list(chain.run(paint, map(tile, range(3)), Seconds()))
        assert [r.error is None for r in results] == [True, False, True]
        assert results[1].error is not None and results[1].error.startswith("decode: ")
        assert results[2].instances is not None and len(results[2].instances) == 2


def test_a_killed_worker_is_replaced_and_its_tiles_are_done_again(caplog: pytest.LogCaptureFixture) -> None:
    expected = found(detector().run(paint, map(tile, range(6)), Seconds()))
    with detector(batch=1, workers=1) as chain:
        assert len(found(chain.run(paint, [tile(1)], Seconds()))) == 1
        (pid,) = chain._pool._processes
        # Halted first, so that tiles wait for it when it is killed.
        os.kill(pid, signal.SIGSTOP)
        killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
        killer.start()
        listed = list(chain.run(paint, map(tile, range(6)), Seconds()))
        killer.join()
        assert found(iter(listed)) == expected and [r.error for r in listed] == [None] * 6
        assert "a decoding process died; the tile at" in caplog.text
        assert len(found(chain.run(paint, [tile(1)], Seconds()))) == 1
        (other,) = chain._pool._processes
        assert other != pid


def test_a_tile_that_kills_its_process_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def dies(maps: HoverMaps, config: HoverDecode) -> tuple[Instances, float]:
        asked.append("alone")
        return decode_alone(maps, config)

    monkeypatch.setattr("cellslide.inference.stream.decode_alone", dies)
    bad = Deadly(*(getattr(maps_of(tile(2)), f.name) for f in fields(HoverMaps)))
    with Detector(Scripted([maps_of(tile(1)), bad, maps_of(tile(2))]), 1) as chain:
        results = list(chain.run(paint, map(tile, range(3)), Seconds()))
    assert [r.error is None for r in results] == [True, False, True] and "alone" in asked
    assert results[1].error is not None and "again and again" in results[1].error and "--workers" in results[1].error
    assert results[2].instances is not None and len(results[2].instances) == 2


def test_maps_take_the_pipe_where_a_process_cannot_see_its_parents_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.inference.shared_memory._Block.path", "/nowhere")
    tiles = [tile(i) for i in range(3)]
    with detector(workers=1) as seen_by_none, detector() as usual:
        assert found(seen_by_none.run(paint, tiles, Seconds())) == found(usual.run(paint, tiles, Seconds()))
        assert seen_by_none._blocks._given_up or not seen_by_none._blocks._room


class Deadly(HoverMaps):
    """Maps that end the process that unpacks them."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (9,)


def test_decoding_processes_end_with_a_parent_that_was_killed() -> None:
    code = (
        "import os, signal, numpy as np\n"
        "from cellslide.inference.stream import _processes\n"
        "if __name__ == '__main__':\n"
        "    pool = _processes(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == -signal.SIGKILL
    child, deadline = int(answer.stdout), time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the decoding process outlives its parent"
        time.sleep(0.05)


def test_decoding_processes_do_not_import_torch() -> None:
    with detector(workers=1) as chain:
        instances, _ = chain._executor().submit(decode_task, maps_of(tile(2)), fake_spec().decode).result()
        loaded = chain._executor().submit(eval, "set(__import__('sys').modules)").result()
    assert len(instances) == 2 and "cellslide.nuclei.hover_decode" in loaded
    assert not loaded & {"torch", "timm", "zarr", "geopandas"}


def test_reading_ahead_is_bounded_and_stops_when_the_reader_leaves() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def read(t: Tile) -> UInt8:
        with lock:
            begun.append(t.index)
        return paint(t)

    stream = read_ahead(read, map(tile, range(100)), 2, lambda: 5)
    assert [next(stream).tile.index for _ in range(3)] == [0, 1, 2]
    stream.close()
    assert len(begun) <= 3 + 5
    assert not [t for t in threading.enumerate() if t.name.startswith("cellslide-read")]


def test_pending_work_is_bounded() -> None:
    begun: list[int] = []

    def read(t: Tile) -> UInt8:
        begun.append(t.index)
        return paint(tile(1))

    results = detector(batch=2).run(read, map(tile, range(200)), Seconds())
    for _ in range(3):
        next(results)
    assert len(begun) < 30
    results.close()


def test_default_workers_leave_a_core_and_have_a_limit() -> None:
    assert [default_workers(n) for n in (1, 2, 8, 256)] == [1, 1, 7, 16]


def test_engine_without_cells_gives_none() -> None:
    empty = Instances(np.zeros((0, 2)), np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, np.bool_))
    results = list(Detector(Scripted([empty]), 0).run(paint, [tile(0)], Seconds()))
    assert results == [TileResult(tile(0), None)]
