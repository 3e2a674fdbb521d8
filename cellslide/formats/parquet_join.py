"""A column added to a Parquet file as it stands, still packed, in another: its pages are copied and the footer is
written anew.

pyarrow would unpack and pack it again, which takes most of the time that such a file takes. The footer is a struct in
Thrift's compact protocol; what is not changed in it is carried over unread. Numbers of fields are those of
`parquet.thrift`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

MAGIC = b"PAR1"
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
# Of FileMetaData.
_NUM_ROWS, _ROW_GROUPS = 3, 4
# Of RowGroup.
_COLUMNS, _BYTES, _ROWS, _PACKED_BYTES = 1, 2, 3, 6
# Of ColumnChunk; places of indexes, from 4 on, are not carried over.
_FILE_OFFSET, _META_DATA = 2, 3
# Of ColumnMetaData; that of a Bloom filter, from 14 on, neither.
_PATH, _UNPACKED, _PACKED, _DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _BLOOM = 3, 6, 7, 9, 10, 11, 14


@dataclass(slots=True)
class _List:
    kind: int
    values: list[Any]


# A struct is a dict from the number of a field to its type and value, in their order.
_Struct = dict[int, tuple[int, Any]]


def join_column(path: Path, schema: pa.Schema, source: Path, name: str) -> None:
    """Add column `name` of the file `source` to that at `path`, as the last one; `schema` is what comes out.

    Both have the same row groups. Raises ValueError where they have not.
    """
    footer = _footer_of_none(schema)
    with path.open("r+b") as stream, source.open("rb") as other:
        (ours, end), (theirs, _) = _read_footer(stream), _read_footer(other)
        groups, more = (one[_ROW_GROUPS][1].values for one in (ours, theirs))
        if [group[_ROWS] for group in groups] != [group[_ROWS] for group in more]:
            raise ValueError(f"{path} and {source} have other row groups")
        stream.seek(end)
        stream.truncate()
        for group, giving in zip(groups, more, strict=True):
            _add(group, _copied(_find(giving, name), other, stream))
        footer[_NUM_ROWS], footer[_ROW_GROUPS] = ours[_NUM_ROWS], ours[_ROW_GROUPS]
        raw = io.BytesIO()
        _write(raw, _STRUCT, footer)
        stream.write(raw.getvalue() + len(raw.getvalue()).to_bytes(4, "little") + MAGIC)


def _footer_of_none(schema: pa.Schema) -> _Struct:
    """Return the footer of a file without rows."""
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema).close()
    return _read_footer(io.BytesIO(sink.getvalue()))[0]


def _read_footer(stream: BinaryIO) -> tuple[_Struct, int]:
    """Return the footer of a file and where it begins."""
    end = stream.seek(-8, io.SEEK_END)
    begin = end - int.from_bytes(stream.read(4), "little")
    stream.seek(begin)
    footer: _Struct = _Reader(stream.read(end - begin)).value(_STRUCT)
    return footer, begin


def _find(group: _Struct, name: str) -> _Struct:
    for chunk in group[_COLUMNS][1].values:
        if chunk[_META_DATA][1][_PATH][1].values == [name.encode()]:
            found: _Struct = chunk
            return found
    raise ValueError(f"no column {name}")


def _copied(chunk: _Struct, source: BinaryIO, target: BinaryIO) -> _Struct:
    """Copy the pages of a column chunk to the end of `target`; returns what says where they are."""
    meta: _Struct = {number: field for number, field in chunk[_META_DATA][1].items() if number < _BLOOM}
    places = [number for number in (_DICTIONARY_PAGE, _DATA_PAGE, _INDEX_PAGE) if number in meta]
    begin = min(meta[number][1] for number in places)
    shift = target.tell() - begin
    source.seek(begin)
    target.write(source.read(meta[_PACKED][1]))
    for number in places:
        meta[number] = _I64, meta[number][1] + shift
    return {_FILE_OFFSET: (_I64, 0), _META_DATA: (_STRUCT, meta)}


def _add(group: _Struct, chunk: _Struct) -> None:
    meta = chunk[_META_DATA][1]
    group[_COLUMNS][1].values.append(chunk)
    for number, size in ((_BYTES, _UNPACKED), (_PACKED_BYTES, _PACKED)):
        if number in group:
            group[number] = _I64, group[number][1] + meta[size][1]


class _Reader:
    """Reads values of Thrift's compact protocol from bytes."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def value(self, kind: int) -> Any:
        """Return the next value, of the type `kind`."""
        if kind in (_BYTE, _TRUE, _FALSE):
            return self._take(1)[0]
        if kind in (_I16, _I32, _I64):
            number = self._varint()
            return number >> 1 ^ -(number & 1)
        if kind == _DOUBLE:
            return self._take(8)
        if kind == _BINARY:
            return self._take(self._varint())
        if kind in (_LIST, _SET):
            return self._list()
        if kind == _STRUCT:
            return self._struct()
        raise ValueError(f"a footer of Parquet has no field of type {kind}")

    def _take(self, size: int) -> bytes:
        self.at += size
        return self.raw[self.at - size : self.at]

    def _varint(self) -> int:
        number, shift = 0, 0
        while True:
            byte = self.raw[self.at]
            self.at += 1
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7

    def _list(self) -> _List:
        head = self._take(1)[0]
        size = head >> 4 if head >> 4 < 15 else self._varint()
        return _List(head & 15, [self.value(head & 15) for _ in range(size)])

    def _struct(self) -> _Struct:
        found: _Struct = {}
        number = 0
        while head := self._take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self.value(_I16)
            kind = head & 15
            # A truth is its type, without a byte.
            found[number] = kind, None if kind in (_TRUE, _FALSE) else self.value(kind)
        return found


def _write(out: io.BytesIO, kind: int, value: Any) -> None:
    """Write a value as `_Reader` reads it."""
    if kind in (_BYTE, _TRUE, _FALSE):
        out.write(bytes([value]))
    elif kind in (_I16, _I32, _I64):
        _write_varint(out, value << 1 ^ value >> 63)
    elif kind == _DOUBLE:
        out.write(value)
    elif kind == _BINARY:
        _write_varint(out, len(value))
        out.write(value)
    elif kind in (_LIST, _SET):
        size = len(value.values)
        out.write(bytes([min(size, 15) << 4 | value.kind]))
        if size >= 15:
            _write_varint(out, size)
        for item in value.values:
            _write(out, value.kind, item)
    else:
        _write_struct(out, value)


def _write_struct(out: io.BytesIO, fields: _Struct) -> None:
    before = 0
    for number, (kind, value) in fields.items():
        if 0 < number - before < 16:
            out.write(bytes([number - before << 4 | kind]))
        else:
            out.write(bytes([kind]))
            _write(out, _I16, number)
        if kind not in (_TRUE, _FALSE):
            _write(out, kind, value)
        before = number
    out.write(b"\0")


def _write_varint(out: io.BytesIO, number: int) -> None:
    while number > 127:
        out.write(bytes([number & 127 | 128]))
        number >>= 7
    out.write(bytes([number]))
