"""Features of a GeoJSON file as text, thousands at once: compiled where numba is at hand, else by columns of bytes.

Both forms write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.formats.ascii_columns import (
    LARGEST,
    MISSING,
    UUID_BYTES,
    check_pixels,
    choice,
    constant,
    decimals,
    pack,
    strings,
    text_table,
    to_words,
    vertices,
)
from cellslide.geometry import kernels
from cellslide.store.shapes import close_rings
from cellslide.types import Int64, UInt8

_OPENING = ',\n{"type":"Feature","id":"'
_MEASUREMENTS, _END = '"measurements":{', "}}}"


def compact(value: object) -> str:
    """Return a value as JSON without blanks."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def ten_thousandths(values: NDArray[Any], places: int) -> Int64:
    """Return numbers (N,) rounded to 2 or 4 decimals, times 10,000; MISSING for what is not finite.

    Raises ValueError for a number that is too large for a measurement.
    """
    finite = np.isfinite(values)
    scaled = np.rint(np.where(finite, values, 0.0) * 10.0**places)
    if (np.abs(scaled) >= (LARGEST + 1) * 10.0**places).any():
        raise ValueError(f"{np.abs(scaled).max() / 10**places:.0f} is too large to be a measurement")
    return np.where(finite, scaled.astype(np.int64) * 10 ** (4 - places), MISSING)


@dataclass(frozen=True, slots=True)
class Features:
    """N features.

    uuid          ASCII (N,), at most 36 each.
    cents, start  points (P, 2) in hundredths of a pixel and where rings begin (N + 1,); `point` where they are points.
    kind          (N,) index into `classes`, JSON objects; -1 is none.
    measured      by name, values (N,) as `ten_thousandths` gives them.
    """

    uuid: NDArray[Any]
    point: bool
    cents: Int64
    start: Int64
    classes: Sequence[str]
    kind: NDArray[Any]
    measured: dict[str, Int64]

    def __len__(self) -> int:
        return len(self.uuid)

    @property
    def geometry(self) -> str:
        """What stands between id and points."""
        return '","geometry":{"type":' + ('"Point","coordinates":' if self.point else '"Polygon","coordinates":[[')

    @property
    def properties(self) -> str:
        """What stands between points and class."""
        return ("}" if self.point else "]]}") + ',"properties":{"objectType":"detection",'

    @property
    def kinds(self) -> list[str]:
        """What the classes look like, the last of them none."""
        return [*('"classification":' + text + "," for text in self.classes), ""]

    @property
    def keys(self) -> list[str]:
        """What stands before each measurement."""
        return [compact(name) + ":" for name in self.measured]

    def text(self) -> UInt8:
        """Return the features, each as `,\\n{...}`; raises ValueError for a place that no pixel has."""
        check_pixels(self.cents)
        return _compiled(self) if kernels.available() else np.frombuffer(_plain(self), np.uint8)


def _compiled(features: Features) -> UInt8:
    from cellslide.formats.geojson_kernels import FIRST_KEY, write_features

    fixed = [_OPENING, features.geometry, features.properties, _MEASUREMENTS, _END]
    texts, lengths = text_table([*fixed, *features.keys, *features.kinds])
    uuid = strings(features.uuid, UUID_BYTES).view(np.uint32)
    first = FIRST_KEY + len(features.measured)
    kind = np.where(features.kind < 0, len(features.classes), features.kind).astype(np.int64) + first
    values = np.stack([*features.measured.values()], axis=1)
    start, close = features.start, not features.point
    return np.asarray(write_features(texts, lengths, uuid, features.cents, start, close, kind, values))


def _plain(features: Features) -> bytes:
    n, cents, start = len(features), features.cents, features.start
    head = [constant(_OPENING, n), strings(features.uuid, UUID_BYTES), constant(features.geometry, n)]
    kind = choice(features.kinds, features.kind)
    tail = [constant(features.properties, n), kind, constant(_MEASUREMENTS, n), *_columns(features), constant(_END, n)]
    if not features.point:
        cents, start = close_rings(cents, start)
    is_first = np.zeros(len(cents), np.bool_)
    is_first[start[:-1]] = True
    return pack(to_words(head), vertices(cents, is_first).view(np.uint64), np.diff(start), to_words(tail))


def _columns(features: Features) -> list[UInt8]:
    """Return the measurements as columns of bytes; one that is missing, and a comma with none before it, is nothing."""
    n, columns = len(features), []
    seen = np.zeros(n, np.bool_)
    for key, values in zip(features.keys, features.measured.values(), strict=True):
        there = values != MISSING
        before = np.concatenate([constant(",", n), constant(key, n)], axis=1)
        before[~seen, 0] = 0
        text = np.concatenate([before, decimals(np.where(there, values, 0) / 10_000, 4)], axis=1)
        text[~there] = 0
        seen |= there
        columns.append(text)
    return columns
