"""JSON files of nuclei: GeoJSON in all its forms, CellViT's and HoVer-Net's cells, HoVer-NeXt's `class_inst.json`.

Which one a file is shows in its keys as they come, so that it is read once: a bare array or `features` is GeoJSON,
`cells` CellViT, `nuc` HoVer-Net, numbers as keys HoVer-NeXt.
"""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from cellslide.errors import UsageError
from cellslide.formats.importers.drafts import Draft, Drafts, number, point
from cellslide.formats.importers.geojson_objects import feature_drafts, walk_feature
from cellslide.formats.importers.json_stream import LONG, JsonText
from cellslide.formats.importers.records import Block, NucleiReport, Source
from cellslide.types import Float64, SlideInfo

EXPECTED = (
    "expected GeoJSON (an array of Features or a FeatureCollection), CellViT's cells.json or cell_detection.json, "
    "HoVer-Net's JSON, or HoVer-NeXt's class_inst.json"
)
JSON_ENDINGS = (".geojson", ".json", ".geojsonl", ".ndjson")


class JsonReader:
    """Reads the nuclei of a JSON file, plain or packed as .gz, .zip or .snappy."""

    ordered = False

    def __init__(self, path: Path, info: SlideInfo, source: Source, report: NucleiReport) -> None:
        self.path, self.info, self.source, self.report = path, info, source, report
        self.names: dict[str, int] = {}
        self.labels: dict[str, str] = {}
        self.known = False  # whether anything of a format was met
        self.place = 0

    def blocks(self) -> Iterator[Block]:
        """Yield the nuclei in the order of the file; raises UsageError for what is none of the formats."""
        try:
            for name, stream in open_texts(self.path):
                yield from self._values(JsonText(stream, name))
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UsageError(f"{self.path}: cannot be unpacked ({error}); is the file complete?") from error
        if not self.known:
            raise UsageError(f"{self.path}: holds no nuclei in a form that is known; {EXPECTED}")

    def _values(self, text: JsonText) -> Iterator[Block]:
        while char := text.peek():  # one value, or one a line
            if char == "[":
                yield from self._array(text)
            elif char == "{":
                yield from self._object(text)
            else:
                raise UsageError(f"{text.name}: begins with {char!r}; {EXPECTED}")

    def _array(self, text: JsonText) -> Iterator[Block]:
        """Read an array of Features, or of cells as CellViT has them; the first element tells."""
        self.known = True
        drafts: Drafts | None = None
        for element in text.elements():
            element = walk_feature(text) if element is LONG else element
            is_cell = isinstance(element, dict) and "geometry" not in element and "centroid" in element
            drafts = drafts or Drafts(self.names, self._matrix(qupath=not is_cell))
            for draft in self._drafts_of(element, is_cell):
                yield from drafts.add(draft)
        if drafts is not None:
            yield from drafts.rest()

    def _drafts_of(self, element: Any, is_cell: bool) -> Iterator[Draft]:
        place, self.place = self.place, self.place + 1
        if is_cell:
            yield cell_draft(element, str(place))
        elif isinstance(element, dict):
            yield from feature_drafts(element, place, self.report)
        else:
            yield Draft(str(place))

    def _object(self, text: JsonText) -> Iterator[Block]:
        """Read a FeatureCollection, one Feature, or the files of CellViT, HoVer-Net and HoVer-NeXt."""
        rest: dict[str, Any] = {}
        numbered: Drafts | None = None
        for key in text.members():
            opens = text.peek()
            if key in ("features", "cells") and opens == "[":
                yield from self._array(text)
            elif key == "nuc" and opens == "{":
                yield from self._hovernet(text, number(rest.get("mag")))
            elif key.isdigit() and opens == "[":
                numbered = numbered or Drafts(self.names, self._hovernext())
                yield from numbered.add(numbered_draft(key, text.value()))
            else:
                rest[key] = text.value()
        if numbered is not None:
            yield from numbered.rest()
        self._keep_labels(rest.get("type_map"))
        if rest.get("type") == "Feature":
            yield from self._feature(rest)

    def _feature(self, feature: dict[str, Any]) -> Iterator[Block]:
        self.known = True
        drafts = Drafts(self.names, self._matrix(qupath=True))
        for draft in self._drafts_of(feature, False):
            yield from drafts.add(draft)
        yield from drafts.rest()

    def _hovernet(self, text: JsonText, magnification: float) -> Iterator[Block]:
        """Read cells by id, in pixels of the magnification at which HoVer-Net ran."""
        self.known = True
        power = self.info.objective_power
        drafts = Drafts(self.names, self._matrix(power / magnification if power and magnification > 0 else 1.0))
        for key in text.members():
            yield from drafts.add(cell_draft(text.value(), key))
        yield from drafts.rest()

    def _hovernext(self) -> Float64:
        self.known = True
        if self.source.mpp is None and self.source.alignment is None:
            raise UsageError(
                f"{self.path}: HoVer-NeXt's class_inst.json is in pixels of its model and does not say their size: "
                "give --cells-mpp (0.5 for Lizard, 0.25 for PanNuke models), or the poly.geojson of --save_polygon"
            )
        return self._matrix(qupath=True)

    def _matrix(self, scale: float = 1.0, qupath: bool = False) -> Float64:
        return self.source.to_level0(self.info, self.source.unit, scale, qupath)

    def _keep_labels(self, mapping: Any) -> None:
        """Keep CellViT's `type_map`, which older versions write the other way round."""
        for key, value in mapping.items() if isinstance(mapping, dict) else ():
            named = isinstance(value, str)
            self.labels[str(key if named else value)] = str(value if named else key)


def cell_draft(cell: Any, source_id: str) -> Draft:
    """Return a cell of CellViT or HoVer-Net: `contour` [[x, y], ...] or only `centroid` [x, y]; `type` a number."""
    if not isinstance(cell, dict):
        return Draft(source_id)
    own, contour, kind = cell.get("cell_id", cell.get("id")), cell.get("contour"), cell.get("type")
    source_id = source_id if own is None or own == "" else str(own)
    ring = contour if isinstance(contour, list) and contour else None
    name = "" if kind is None else str(kind)
    return Draft(source_id, ring, point(cell.get("centroid")), class_name=name)


def numbered_draft(key: str, value: Any) -> Draft:
    """Return a cell of HoVer-NeXt's `class_inst.json`: id -> [class, [y, x]]."""
    place = value[1] if isinstance(value, list) and len(value) > 1 else None
    y, x = point(place)
    return Draft(key, centroid=(x, y), class_name=str(value[0]) if value else "")


def open_texts(path: Path) -> Iterator[tuple[str, TextIO]]:
    """Yield (name for messages, text) of a file, or of each JSON entry of a .zip; closed when the next is asked for."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            entries = [name for name in archive.namelist() if name.lower().endswith(JSON_ENDINGS)]
            if not entries:
                raise UsageError(f"{path}: no .geojson or .json in this zip; {EXPECTED}")
            for entry in entries:
                with archive.open(entry) as raw:
                    yield f"{path}:{entry}", _text(raw)
    elif path.suffix == ".snappy":
        yield str(path), _text(io.BytesIO(unsnap(path)))
    else:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else nullcontext(raw) as plain:
            yield str(path), _text(plain)


def _text(raw: Any) -> TextIO:
    return io.TextIOWrapper(io.BufferedReader(raw, 1 << 20), encoding="utf-8-sig")


def unsnap(path: Path) -> bytes:
    """Return the content of a file in raw snappy, as CellViT compresses (its length in front, seven bits a byte)."""
    raw = path.read_bytes()
    size = 0
    for k, byte in enumerate(raw[:10]):
        size |= (byte & 127) << 7 * k
        if byte < 128:
            break
    try:
        return bytes(pa.Codec("snappy").decompress(raw, size))
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"{path}: not compressed by snappy ({error})") from error
