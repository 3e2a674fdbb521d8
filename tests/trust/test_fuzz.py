"""Any bytes, and files of ours with bytes changed: readers of foreign files give a result or an error that explains."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellslide.errors import CellslideError
from cellslide.evaluate.dataset import read_dataset, read_points
from cellslide.formats.importers import load_alignment, read_nuclei
from cellslide.models.checkpoint import read_tensors
from cellslide.slides.inputs import expand_slides
from cellslide.slides.readers import TiffReader, pillow_reader
from cellslide.slides.tissue import load_roi
from cellslide.store.run_record import read_record
from cellslide.weights.manifest import Manifest
from tests.painted import write_pyramid
from tests.support.foreign_files import cellvit_cells, qupath_export, stardist_export, write_table
from tests.support.random_cells import slide_info

PLACES = [(300.0, 300.0), (400.0, 420.0)]
# Libraries say on the way what is wrong with a file, and pyarrow more than that.
pytestmark = pytest.mark.filterwarnings("ignore")
# Bounded: the whole file takes a few seconds.
FUZZ = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def nuclei(path: Path) -> object:
    return read_nuclei(path, slide_info(None))


def roi(path: Path) -> object:
    return load_roi(path, slide_info(None))


def pixels(path: Path) -> object:
    reader = TiffReader(path)
    try:
        return reader.read_level(len(reader.header.levels) - 1, 0, 0, 64, 64)
    finally:
        reader.close()


def in_folder(name: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    def reading(path: Path) -> object:
        path.rename(path.with_name(name))
        return read(path.parent)

    return reading


@cache
def seeds() -> dict[str, bytes]:
    """Return good files, small, by name."""
    import tempfile

    folder = Path(tempfile.mkdtemp())
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_pyramid(folder / "s.tif", image, 0.5, level_downsamples=(1, 2), tile_px=32)
    write_pyramid(folder / "s.ome.tif", image, 0.5, level_downsamples=(1, 2), tile_px=32)
    columns: dict[str, list[Any]] = {"x": [300, 310], "y": [300, 320], "id": ["a", "b"], "class": ["p", "q"]}
    write_table(folder / "n.parquet", columns)
    write_table(folder / "n.csv", columns)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    collection = json.dumps(qupath_export(PLACES)).encode()
    return found | {
        "q.geojson": collection,
        "q.geojson.gz": gzip.compress(collection),
        "s.json": json.dumps(stardist_export(PLACES)).encode(),
        "c.json": json.dumps(cellvit_cells(PLACES)).encode(),
        "list.csv": b"path,mpp,organ\na.svs,0.5,breast\n",
        "matrix.csv": b"1,0,0\n0,1,0\n0,0,1\n",
        "points.csv": b"x,y,class\n1,2,a\n",
        "manifest.csv": b"file,split,width,height\nimages/a.png,train,4,4\n",
        "run.json": b'{"status":"done","weights":[],"counts":{},"failed_tiles":[],"seconds":{}}',
        "weights.yaml": b"schema_version: 1\nweights: []\ndefaults: {}\n",
    }


# Name of the file -> (the good file to spoil, its reader).
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "n.geojson": ("q.geojson", nuclei),
    "n.geojson.gz": ("q.geojson.gz", nuclei),
    "n.json": ("s.json", nuclei),
    "cells.json": ("c.json", nuclei),
    "n.csv": ("n.csv", nuclei),
    "n.parquet": ("n.parquet", nuclei),
    "roi.geojson": ("q.geojson", roi),
    "list.csv": ("list.csv", lambda path: expand_slides([path])),
    "list.txt": ("list.csv", lambda path: expand_slides([path])),
    "matrix.csv": ("matrix.csv", load_alignment),
    "points.csv": ("points.csv", read_points),
    "any.csv": ("manifest.csv", in_folder("manifest.csv", read_dataset)),
    "any.json": ("run.json", in_folder("run.json", read_record)),
    "weights.yaml": ("weights.yaml", Manifest.load),
    "s.tif": ("s.tif", pixels),
    "s.ome.tif": ("s.ome.tif", pixels),
    "s.png": ("s.tif", pillow_reader),
    "w.safetensors": ("q.geojson", read_tensors),
    "w.pth": ("q.geojson", read_tensors),
}


def survive(folder: Path, name: str, content: bytes) -> None:
    """Read a file; what is raised must be one of our errors, in words of one line or more that name a file."""
    path = folder / name
    path.write_bytes(content)
    try:
        READERS[name][1](path)
    except CellslideError as error:
        assert str(folder) in str(error), error


@pytest.mark.parametrize("name", READERS)
@FUZZ
@given(data=st.data())
def test_changed_bytes_of_good_files(tmp_path: Path, name: str, data: st.DataObject) -> None:
    raw = bytearray(seeds()[READERS[name][0]])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        cut = data.draw(st.integers(0, 8))
        raw[at : at + cut] = data.draw(st.binary(max_size=8) | st.sampled_from([b"null", b"[", b"1e999", b"\0", b'"']))
    survive(tmp_path, name, bytes(raw))


@pytest.mark.parametrize("name", READERS)
@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(tmp_path: Path, name: str, content: bytes) -> None:
    survive(tmp_path, name, content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["type", "features", "geometry", "coordinates", "geometries", "properties", "id", "cells", "contour",
                 "centroid", "nuc", "mag", "type_map", "classification", "measurements", "objectType", "1", "name"]
            ),
            inner | st.sampled_from(["Feature", "FeatureCollection", "Polygon", "MultiPolygon", "Point", "annotation"]),
            max_size=4,
        )
    ),
    max_leaves=15,
)  # fmt: skip


@pytest.mark.parametrize("name", ["n.geojson", "cells.json", "roi.geojson", "any.json"])
@settings(FUZZ, max_examples=80)
@given(value=json_values)
def test_json_of_any_shape(tmp_path: Path, name: str, value: Any) -> None:
    survive(tmp_path, name, json.dumps(value).encode())
