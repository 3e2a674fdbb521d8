"""What the tool writes on painted slides stays what it was: each column of each file, against hashes on record.

Fake networks make the first slides exact on every processor; floats are rounded, since softmax may differ in its last
digit. The network that ships differs by more from processor to processor, so its nuclei are compared by number (2 %)
and by place (1 px). `python -m tests.test_golden` writes the record anew, where a change of the outputs is meant.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.spatial import cKDTree

from tests.painted import DISC, PINK_DISC, grid_centres, paint_slide
from tests.support.fake_classifier import fake_loaded
from tests.support.fakes import CLASSES, fake_model

RECORD = Path(__file__).with_name("golden.json")
FORMATS = "zarr,geojson,parquet,csv,labels,h5ad,tissuumaps"
QUICK = ("--device", "cpu", "--no-progress")
# Of a run's record what depends on the day, the machine or the libraries, not on the work.
PASSING = {
    "started", "finished", "seconds", "files", "peak_rss_bytes", "peak_device_bytes", "versions", "cellslide_version",
    "path",
    "sha256_head", "bytes", "crc32", "cells.found",
    # Of a verdict, its words count: measures of pixels differ in their last digit, advice names folders.
    "value", "advice",
}  # fmt: skip


def invoke(*arguments: object) -> None:
    from cellslide.cli.main import cli

    result = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def hashed(values: object) -> str:
    """Return 12 digits that stand for a column: of floats six digits count."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        # Adding zero makes -0 to 0.
        plain = np.round(values.astype(np.float64), 5) + 0 if values.dtype.kind == "f" else values
        content = f"{plain.dtype.kind}{values.shape}".encode() + np.ascontiguousarray(plain).tobytes()
    else:
        content = json.dumps(rounded(values), sort_keys=True, default=str).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def rounded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [rounded(v) for v in value.ravel()]
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items() if k not in PASSING}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, bytes):
        return value.hex()
    return round(float(value), 5) + 0 if isinstance(value, float | np.floating) else value


def zarr_columns(path: Path) -> Iterator[tuple[str, str]]:
    """Yield every array of a store; run.json stands for the record in it, which holds times and places."""
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the outlines lie between the arrays as a parquet file
        members = sorted(zarr.open_group(path, mode="r").members(max_depth=None))
    for name, member in members:
        if isinstance(member, zarr.Array) and not name.endswith(("/uns/run", "/uns/slide", "/uns/field_values")):
            yield name, hashed(np.asarray(member[...]))


def parquet_columns(path: Path) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    for name in table.column_names:
        yield name, hashed(table.column(name).to_pylist())


def h5_columns(path: Path) -> Iterator[tuple[str, str]]:
    import h5py

    found: dict[str, str] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: hashed(item[()])}) if isinstance(item, h5py.Dataset) else None
        )
    yield from (
        (name, value)
        for name, value in sorted(found.items())
        if name not in {"uns/run", "uns/slide", "uns/field_values"}
    )


def csv_columns(path: Path) -> Iterator[tuple[str, str]]:
    import pandas as pd

    table = pd.read_csv(path, keep_default_na=False)
    for name in table:
        yield str(name), hashed(table[name].tolist())


def geojson_columns(path: Path) -> Iterator[tuple[str, str]]:
    raw = path.read_bytes()
    # 12 and 12.0 are one value.
    document = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw, parse_int=float)
    features = document.pop("features")
    yield "head", hashed(document)
    for name in sorted({name for feature in features for name in feature}):
        yield name, hashed([feature.get(name) for feature in features])
    for name in sorted({name for feature in features for name in feature["properties"]}):
        yield f"properties/{name}", hashed([feature["properties"].get(name) for feature in features])


def record_columns(path: Path) -> Iterator[tuple[str, str]]:
    for name, value in json.loads(path.read_text()).items():
        if name not in PASSING:
            yield name, hashed(value)


READERS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    "cells.zarr": zarr_columns,
    "cells.zarr/shapes/nuclei/shapes.parquet": parquet_columns,
    "labels.ome.zarr": zarr_columns,
    "cells.parquet": parquet_columns,
    "cells.h5ad": h5_columns,
    "cells.csv.gz": csv_columns,
    "cells.tissuumaps.csv": csv_columns,
    "cells.geojson.gz": geojson_columns,
    "tissue.geojson": geojson_columns,
    "run.json": record_columns,
}


def digest(folder: Path) -> dict[str, dict[str, str]]:
    """Return the hash of each column of each file of a slide's folder."""
    return {name: dict(read(folder / name)) for name, read in READERS.items() if (folder / name).exists()}


def painted_run(root: Path, patch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """Run both fake networks over a slide with tissue, into every format."""
    places = [(60 + 31 * (k % 22), 50 + 29 * (k // 22)) for k in range(22 * 15)]
    colors = [(DISC, PINK_DISC)[k % 3 == 0] for k in range(len(places))]
    radii = [5.0 + k % 4 for k in range(len(places))]
    patch.setattr("cellslide.weights.load_model", lambda *_: fake_model())
    patch.setattr("cellslide.weights.classifier.load_classifier", lambda *_: fake_loaded())
    paint_slide(
        root / "typed.tif", 803, 541, 0.5, places, radii, background="tissue", tissue_xyxy=(20, 20, 760, 500),
        disc_color=colors,
    )  # fmt: skip
    invoke(
        "run", root / "typed.tif", "-o", root / "out", "--organ", "breast", "--format", FORMATS, "--workers", 0,
        "--abstain", 0.6, *QUICK,
    )  # fmt: skip
    return digest(root / "out" / "typed")


def painted_kind(root: Path, patch: pytest.MonkeyPatch, kind: Any) -> dict[str, dict[str, str]]:
    """Segment a slide with a fake network of boxes or points that also types."""
    patch.setattr("cellslide.weights.load_model", lambda *_: fake_model(kind, classes=CLASSES))
    places = grid_centres(700, 450, 40.0)
    colors = [(DISC, PINK_DISC)[k % 2] for k in range(len(places))]
    paint_slide(root / f"{kind}.tif", 700, 450, 0.4, places, 7.0, disc_color=colors)
    formats = "zarr,geojson,parquet,csv,h5ad" if kind == "point" else FORMATS.replace("labels,", "")
    invoke(
        "segment", root / f"{kind}.tif", "-o", root / "out", "--no-tissue", "--workers", 0, "--format", formats,
        "--profile", "full", *QUICK,
    )  # fmt: skip
    return digest(root / "out" / kind)


def exact(root: Path) -> dict[str, dict[str, dict[str, str]]]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        found["typed"] = painted_run(root, patch)
        for kind in ("box", "point"):
            found[kind] = painted_kind(root, patch, kind)
    return found


def shipped(root: Path) -> dict[str, Any]:
    """Return the nuclei that the networks which ship find and type on a corner of the demo's slide."""
    import zarr

    from cellslide.slides import painted as demo

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "WIDTH_PX", 700)
        patch.setattr(demo, "HEIGHT_PX", 560)
        demo.write_pyramid(root / "demo.tif", demo.paint().image, demo.MPP)
    invoke("run", root / "demo.tif", "-o", root / "out", "--format", "zarr", "--workers", 0, *QUICK)
    obs = zarr.open_group(root / "out" / "demo" / "cells.zarr" / "tables" / "cells" / "obs", mode="r")
    x, y = (np.asarray(obs[name][...]) for name in "xy")
    names, codes = obs["class/categories"][...], np.asarray(obs["class/codes"][...])
    return {
        "nuclei": len(x),
        "xy": [[round(float(a), 1), round(float(b), 1)] for a, b in zip(x, y, strict=True)],
        "class": [str(names[code]) for code in codes],
    }


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def test_every_column_of_painted_slides(record: dict[str, Any], tmp_path: Path) -> None:
    found = exact(tmp_path)
    changed = [
        f"{slide}/{file}: {name}"
        for slide in found.keys() | record["exact"].keys()
        for file in found[slide].keys() | record["exact"][slide].keys()
        for name in found[slide].get(file, {}).keys() | record["exact"][slide].get(file, {}).keys()
        if found[slide].get(file, {}).get(name) != record["exact"][slide].get(file, {}).get(name)
    ]
    assert not changed, "these differ from the record:\n" + "\n".join(sorted(changed))


@pytest.mark.timeout(600)
def test_nuclei_of_the_shipped_networks(record: dict[str, Any], tmp_path: Path) -> None:
    found, before = shipped(tmp_path), record["shipped"]
    assert abs(found["nuclei"] - before["nuclei"]) <= 0.02 * before["nuclei"]
    gap, nearest = cKDTree(found["xy"]).query(before["xy"])
    near = gap <= 1.0
    assert near.mean() >= 0.98, f"{(~near).sum()} nuclei have moved by more than 1 px"
    same = [found["class"][k] == name for k, name in zip(nearest, before["class"], strict=True)]
    assert np.mean(same) >= 0.95, "the classes differ"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "exact"), Path(folder, "shipped")
        first.mkdir(), second.mkdir()
        content = {"exact": exact(first), "shipped": shipped(second)}
    RECORD.write_text(json.dumps(content, indent=0) + "\n")


if __name__ == "__main__":
    main()
