"""Maps of tiles handed to decoding processes in memory that both see: a pipe copies them six times, page by page.

Linux only, and where `/dev/shm` has room; elsewhere there is no block, and maps take the pipe.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.types import HoverMaps

FOLDER = "/dev/shm"
# Arrays begin where the processor's cache lines do.
ALIGN = 64

Place = tuple[str, str, tuple[int, ...], int]


class MapsNotSeen(Exception):
    """A process may not open the memory of the one that started it: some sandboxes hide open files."""


@dataclass(frozen=True, slots=True)
class SharedMaps:
    """Where the maps of one tile lie: the block's number and file, and name, dtype, shape and offset of each array."""

    block: int
    path: str
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class _Block:
    number: int
    file: int
    memory: mmap.mmap

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.file}"


class Blocks:
    """Blocks of shared memory, each for one tile at a time; without names, so that none is left when all have died."""

    def __init__(self) -> None:
        self._free: list[_Block] = []
        self._used: dict[int, _Block] = {}
        self._room = os.path.isdir(FOLDER) and os.path.isdir("/proc/self/fd")
        self._given_up = False

    def put(self, maps: HoverMaps) -> SharedMaps | None:
        """Copy maps into a block until it is given back; None where there is no memory for it, or all is given up."""
        if self._given_up:
            return None
        places, size = _laid_out(maps)
        block = self._take(size)
        if block is None:
            return None
        handed = SharedMaps(block.number, block.path, places)
        for (name, *_), array in zip(places, _arrays(handed, block.memory), strict=True):
            array[...] = getattr(maps, name)
        self._used[block.number] = block
        return handed

    def give_up(self) -> None:
        """Hand nothing over from now on."""
        self._given_up = True

    def give_back(self, handed: SharedMaps) -> None:
        """Let another tile have the block, unless all were freed meanwhile."""
        block = self._used.pop(handed.block, None)
        if block is not None:
            self._free.append(block)

    def close(self) -> None:
        """Free all blocks."""
        for block in (*self._free, *self._used.values()):
            os.close(block.file)
        self._free.clear()
        self._used.clear()

    def _take(self, size: int) -> _Block | None:
        for place, block in enumerate(self._free):
            if len(block.memory) >= size:
                return self._free.pop(place)
        if self._room:
            try:
                return _new_block(size)
            except OSError:  # a container's is 64 MB
                self._room = False
        return None


_numbers = count()


def _new_block(size: int) -> _Block:
    """Raises OSError where there is no room."""
    with tempfile.TemporaryFile(dir=FOLDER) as scratch:
        # Without it a write where there is no room would end the process.
        os.posix_fallocate(scratch.fileno(), 0, size)
        return _Block(next(_numbers), os.dup(scratch.fileno()), mmap.mmap(scratch.fileno(), size))


def _laid_out(maps: HoverMaps) -> tuple[tuple[Place, ...], int]:
    places, end = [], 0
    for field in fields(maps):
        array = getattr(maps, field.name)
        if array is not None:
            places.append((field.name, array.dtype.str, array.shape, end))
            end += -(-array.nbytes // ALIGN) * ALIGN
    return tuple(places), end


def _arrays(handed: SharedMaps, memory: mmap.mmap) -> list[NDArray[Any]]:
    return [np.ndarray(shape, dtype, memory, offset) for _, dtype, shape, offset in handed.places]


_seen: dict[int, mmap.mmap] = {}


def attach(handed: SharedMaps) -> HoverMaps:
    """Return the maps that another process handed over, as they lie there; raises MapsNotSeen."""
    if handed.block not in _seen:
        try:
            file = os.open(handed.path, os.O_RDWR)
        except OSError as error:
            raise MapsNotSeen(str(error)) from error
        try:
            _seen[handed.block] = mmap.mmap(file, 0)
        finally:
            os.close(file)
    arrays = _arrays(handed, _seen[handed.block])
    return HoverMaps(**{name: array for (name, *_), array in zip(handed.places, arrays, strict=True)})
