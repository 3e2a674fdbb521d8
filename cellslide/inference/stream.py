"""Tiles -> Instances: reader threads, the network, and a pool of decoding processes, with bounded work in between.

Results come in tile order whatever finishes first, and do not depend on batch size or workers. This module imports no
torch, so that a decoding process starts fast and stays small.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event, Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from cellslide.errors import TileError
from cellslide.inference.cpu_memory import keep_freed_blocks
from cellslide.inference.finite import checked
from cellslide.inference.shared_memory import Blocks, MapsNotSeen, SharedMaps, attach
from cellslide.nuclei.hover_decode import decode_hover, prepare
from cellslide.types import HoverDecode, HoverMaps, Instances, NoOutput, Seconds, Tile, UInt8

if TYPE_CHECKING:
    from cellslide.inference.torch_engine import Engine, TileOutput

ReadTile = Callable[[Tile], UInt8]
MAX_READERS = 8
MAX_WORKERS = 16
# A tile whose decoding process died is done again so often, in a process that does nothing else.
TRIES_ALONE = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TileResult:
    """What one tile gave: its instances (None when it holds no nucleus), or why it could not be done."""

    tile: Tile
    instances: Instances | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Read:
    tile: Tile
    image: UInt8 | None
    error: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class _Pending:
    tile: Tile
    future: Future[tuple[Instances, float]] | None = None
    instances: Instances | None = None
    error: str | None = None
    maps: HoverMaps | None = None

    def before(self, other: Future[Any]) -> bool:
        """Wait for this or `other`; tell whether this is done."""
        if self.future is None:
            return True
        futures.wait((self.future, other), return_when=futures.FIRST_COMPLETED)
        return self.future.done()


# What the network made of tiles; None where a tile could not be read.
Batch = list[tuple[_Read, "TileOutput | None"]]


class _Inline(Executor):
    """Runs each task when it is submitted, for `--workers 0`."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        future: Future[object] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def default_workers(cpus: int) -> int:
    """Return how many decoding processes serve a machine that grants `cpus` cores; one is left for the rest."""
    return max(1, min(cpus - 1, MAX_WORKERS))


class Detector:
    """An engine with its decoding pool, used for one slide after another; a context manager.

    workers  decoding processes; 0 decodes in this one.
    pool     so many processes that `start_processes` started before, else they start with the first tile to decode.
    """

    def __init__(self, engine: Engine, workers: int, pool: Executor | None = None) -> None:
        self.engine, self.workers = engine, workers
        self._pool = pool
        self._blocks = Blocks()

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding processes; tasks that wait are dropped."""
        self._end_pool()
        self._blocks.close()

    def _end_pool(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, read: ReadTile, tiles: Iterable[Tile], seconds: Seconds) -> Generator[TileResult, None, None]:
        """Yield one result per tile, in the order given, as soon as it is there; `seconds` gains each stage's time.

        A tile that cannot be read or decoded, or does not fit into the device's memory, is yielded with its error. A
        decoding process that dies is replaced and its tile done again.
        """
        pending: deque[_Pending] = deque()
        limit = 2 * max(self.workers, 1)
        passed = self._passed(read, tiles, seconds)
        # The network runs in a thread of its own: it need not wait for whoever takes the results.
        network, ends = ThreadPoolExecutor(1, thread_name_prefix="cellslide-network"), False
        try:
            coming = network.submit(next, passed, None)
            while (batch := coming.result()) is not None:
                coming = network.submit(next, passed, None)
                pending.extend(self._submit(*item) for item in batch)
                while pending and (len(pending) > limit or pending[0].before(coming)):
                    yield self._result(pending.popleft(), seconds)
            while pending:
                yield self._result(pending.popleft(), seconds)
        except KeyboardInterrupt:
            # The process is to end now: what the network is at is not waited for.
            ends = True
            raise
        finally:
            network.shutdown(wait=not ends, cancel_futures=True)
            if not ends:
                passed.close()

    def _passed(self, read: ReadTile, tiles: Iterable[Tile], seconds: Seconds) -> Generator[Batch, None, None]:
        """Yield what the network makes of the tiles, batch by batch."""
        last: tuple[list[_Read], Callable[[], list[TileOutput]]] | None = None
        # The next batch is put on the device before the last one is fetched, so that the device never waits; on a CPU
        # a launch has done all the work when it returns.
        ahead = not self.engine.device.startswith("cpu")
        for batch in self._batches(read, tiles):
            seconds.read += sum(r.seconds for r in batch)
            current = (batch, self._launch(batch, seconds))
            if last is not None:
                yield self._outputs(*last, seconds)
            last = current if ahead else None
            if not ahead:
                yield self._outputs(*current, seconds)
        if last is not None:
            yield self._outputs(*last, seconds)

    def _batches(self, read: ReadTile, tiles: Iterable[Tile]) -> Iterator[list[_Read]]:
        readers = max(2, min(self.workers, MAX_READERS))
        stream = read_ahead(read, tiles, readers, lambda: 2 * self.engine.batch_size + readers)
        while batch := list(islice(stream, self.engine.batch_size)):
            yield batch

    def _launch(self, batch: list[_Read], seconds: Seconds) -> Callable[[], list[TileOutput]]:
        images = [r.image for r in batch if r.image is not None]
        if not images:
            return list
        start = time.perf_counter()
        call = self.engine.launch(np.stack(images))
        seconds.infer += time.perf_counter() - start
        return call

    def _outputs(self, batch: list[_Read], fetch: Callable[[], list[TileOutput]], seconds: Seconds) -> Batch:
        start = time.perf_counter()
        outputs = iter(fetch())
        seconds.infer += time.perf_counter() - start
        return [(read, next(outputs) if read.error is None else None) for read in batch]

    def _submit(self, read: _Read, output: TileOutput | None) -> _Pending:
        if output is None:
            return _Pending(read.tile, error=read.error)
        output = checked(output)
        if isinstance(output, NoOutput):
            return _Pending(read.tile, error=f"infer: {output.error}")
        if isinstance(output, Instances):
            return _Pending(read.tile, instances=output if len(output) else None)
        if not output.foreground.any():
            return _Pending(read.tile)
        return _Pending(read.tile, self._decode(output), maps=output)

    def _decode(self, maps: HoverMaps) -> Future[tuple[Instances, float]]:
        handed = self._blocks.put(maps) if self.workers and type(maps) is HoverMaps else None
        if handed is None:
            return self._begin(maps)
        future = self._begin(handed)
        future.add_done_callback(lambda _: self._blocks.give_back(handed))
        return future

    def _begin(self, maps: HoverMaps | SharedMaps) -> Future[tuple[Instances, float]]:
        task = partial(decode_task, maps, self.engine.spec.decode)
        try:
            return self._executor().submit(task)
        except BrokenProcessPool:
            self._end_pool()
            return self._executor().submit(task)

    def _result(self, item: _Pending, seconds: Seconds) -> TileResult:
        if item.future is None:
            return TileResult(item.tile, item.instances, item.error)
        try:
            instances, spent = self._decoded(item.future, item)
        except TileError as error:
            return TileResult(item.tile, None, f"decode: {error}")
        except Exception as error:
            # Whatever it is, it is this tile's: it is recorded with the tile, and the run ends non-zero.
            return TileResult(item.tile, None, f"decode: {type(error).__name__}: {error}")
        seconds.decode += spent
        return TileResult(item.tile, instances if len(instances) else None)

    def _decoded(self, future: Future[tuple[Instances, float]], item: _Pending) -> tuple[Instances, float]:
        try:
            return future.result()
        except MapsNotSeen as error:
            log.info("maps take the pipe to decoding processes: %s", error)
            self._blocks.give_up()
            if item.maps is not None:
                return self._decoded(self._begin(item.maps), item)
        except BrokenProcessPool:
            # All tiles that were with the dead process's pool come here; which of them killed it, nobody can tell.
            x, y = item.tile.read_xyxy[:2]
            log.warning("a decoding process died; the tile at (%d, %d) is done again", x, y)
        if item.maps is None:
            raise TileError("its decoding process died")
        return decode_alone(item.maps, self.engine.spec.decode)

    def _executor(self) -> Executor:
        if self._pool is None:
            self._pool = _processes(self.workers) if self.workers else _Inline()
        return self._pool


def decode_alone(maps: HoverMaps, config: HoverDecode) -> tuple[Instances, float]:
    """Decode one tile in a process of its own; raises TileError when that dies time and again."""
    for _ in range(TRIES_ALONE):
        try:
            with _processes(1) as alone:
                return alone.submit(decode_task, maps, config).result()
        except BrokenProcessPool:
            continue
    raise TileError(
        "its decoding process died again and again, most likely killed for want of memory: use fewer --workers, or a "
        "smaller --tile-size"
    )


def start_processes(workers: int) -> Executor | None:
    """Start processes that decode, for a network that is still to be loaded; None where there are to be none."""
    if not workers:
        return None
    pool = _processes(workers)
    with _deaf_to_interrupts():
        for _ in range(workers):  # one starts with each task
            pool.submit(os.getpid)
    return pool


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Have processes that start inside ignore Ctrl-C from their first moment, and not only when they are ready."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _processes(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _start_worker, (context.Lock(), context.Event()))


def _start_worker(turn: Lock, prepared: Event) -> None:
    # Ctrl-C, and Slurm's warning, reach the whole process group; the main process decides when to stop.
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One process a core is the parallelism; OpenCV's own threads would only fight over them.
    cv2.setNumThreads(1)
    keep_freed_blocks()
    _prepare(turn, prepared)


def _prepare(turn: Lock, prepared: Event) -> None:
    """Load compiled code; where there is none yet one process compiles it, and the others wait for what it kept."""
    if not prepared.is_set():
        with turn:
            if not prepared.is_set():
                prepare()
                prepared.set()
    prepare()


def _end_with_parent() -> None:
    """End this process when its parent was killed, which could not tell it so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def decode_task(maps: HoverMaps | SharedMaps, config: HoverDecode) -> tuple[Instances, float]:
    """Decode one tile; return its instances (tile frame) and the seconds it took."""
    start = time.perf_counter()
    instances = decode_hover(attach(maps) if isinstance(maps, SharedMaps) else maps, config)
    return instances, time.perf_counter() - start


def read_ahead(read: ReadTile, tiles: Iterable[Tile], readers: int, ahead: Callable[[], int]) -> Iterator[_Read]:
    """Yield the tiles' images in order, reading at most `ahead()` of them beforehand on `readers` threads."""
    rest = iter(tiles)
    queue: deque[Future[_Read]] = deque()
    pool = ThreadPoolExecutor(readers, thread_name_prefix="cellslide-read")
    try:
        while True:
            queue.extend(pool.submit(_read, read, tile) for tile in islice(rest, max(0, ahead() - len(queue))))
            if not queue:
                return
            yield queue.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read(read: ReadTile, tile: Tile) -> _Read:
    start = time.perf_counter()
    try:
        image, error = read(tile), None
    except Exception as failure:
        # As in decoding: recorded with the tile; the run of the slide goes on and ends non-zero.
        image, error = None, f"read: {type(failure).__name__}: {failure}"
    return _Read(tile, image, error, time.perf_counter() - start)
