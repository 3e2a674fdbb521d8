"""What was read or made once and is likely to be asked for again, as far as there is room for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LruCache(Generic[Value]):
    """Values by key, the least used thrown away beyond `most_bytes`; used from several threads.

    size_of  gives the bytes of a value, `size` is their sum.
    """

    def __init__(self, most_bytes: int, size_of: Callable[[Value], int]) -> None:
        self.most_bytes, self.size_of, self.size = most_bytes, size_of, 0
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return a value, made by `make` if it is not kept; nobody waits for what another thread makes."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self.size += self.size_of(value)
            while self.size > self.most_bytes and len(self._values) > 1:
                self.size -= self.size_of(self._values.popitem(last=False)[1])
        return value
