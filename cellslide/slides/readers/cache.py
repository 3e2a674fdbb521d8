"""Decoded tiles that are kept for the reads to come, bounded in bytes and shared by threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from cellslide.types import UInt8


class TileCache:
    """At most `most_bytes` of decoded tiles; each is decoded once, also where several threads want it at a time.

    `made` counts the tiles that were decoded.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.made = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, UInt8] = OrderedDict()
        self._passing: OrderedDict[Hashable, UInt8] = OrderedDict()
        self._bytes = 0
        self._under_way: dict[Hashable, Future[UInt8]] = {}

    def get(self, key: Hashable, make: Callable[[], UInt8], keep: bool = True) -> UInt8:
        """Return a tile, made by `make` unless it is here; raises what `make` raises.

        keep  says that the next reads are likely to want it again: such tiles are the last to go.
        """
        with self._lock:
            tile = self._take(key)
            if tile is not None:
                (self._kept if keep else self._passing)[key] = tile
                return tile
            future = self._under_way.get(key)
            if mine := future is None:
                future = self._under_way[key] = Future()
        assert future is not None
        if not mine:
            return future.result()
        return self._make(key, make, keep, future)

    def forget(self) -> None:
        """Drop all tiles and begin to count anew."""
        with self._lock:
            self._kept.clear()
            self._passing.clear()
            self._bytes = self.made = 0

    def _take(self, key: Hashable) -> UInt8 | None:
        tile = self._kept.pop(key, None)
        return self._passing.pop(key, None) if tile is None else tile

    def _make(self, key: Hashable, make: Callable[[], UInt8], keep: bool, future: Future[UInt8]) -> UInt8:
        try:
            tile = make()
        except BaseException as error:
            with self._lock:
                del self._under_way[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._under_way[key]
            self.made += 1
            (self._kept if keep else self._passing)[key] = tile
            self._bytes += tile.nbytes
            self._make_room()
        future.set_result(tile)
        return tile

    def _make_room(self) -> None:
        while self._bytes > self.most_bytes and len(self._kept) + len(self._passing) > 1:
            oldest = self._passing or self._kept
            self._bytes -= oldest.popitem(last=False)[1].nbytes
