"""Other formats from a finished table, and the command that writes them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from cellslide.cli.main import cli
from cellslide.errors import UsageError
from cellslide.formats import arrow_files
from cellslide.formats import ome_labels as labels
from cellslide.formats.ome_labels import level_shapes
from cellslide.formats.registry import export_table
from cellslide.geometry.outlines import rasterise
from cellslide.store import shapes as spatial
from cellslide.store.cell_table import Columns, TableExtender, open_table
from tests.support.qupath_rules import file_faults
from tests.support.random_cells import CLASSES, as_kind, ellipses, model_spec, run_record, slide_info, write_table


@pytest.mark.parametrize("n", [0, 130])
@pytest.mark.parametrize("kind", ["mask", "box", "point"])
def test_parquet_holds_shapes_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, n: int) -> None:
    import geopandas

    monkeypatch.setattr(arrow_files, "BLOCK_ROWS", 50)
    monkeypatch.setattr(spatial, "ROW_GROUP", 40)
    cells = as_kind(ellipses(n), kind)
    table = write_table(tmp_path, cells, model_spec(kind))
    frame = geopandas.read_parquet(export_table(table, tmp_path, ("parquet",))["parquet"])
    assert len(frame) == n and frame.crs is None
    assert list(frame.columns[: len(table.columns)]) == list(table.columns)
    assert np.array_equal(frame["x"], cells.centroid_xy[:, 0])
    assert list(frame["uuid"]) == list(table.vector("uuid"))
    if n:
        centre = np.stack([frame.geometry.centroid.x, frame.geometry.centroid.y], axis=1)
        assert np.allclose(centre, cells.centroid_xy, atol=2)
        assert list(frame["class"]) == [CLASSES[k].name for k in _top(cells.class_prob)]
    assert ("perimeter_um" in frame.columns) == (kind != "point")


@pytest.mark.filterwarnings("error::RuntimeWarning", "error:.*crs:UserWarning")
@pytest.mark.parametrize("n", [0, 130])
@pytest.mark.parametrize("kind", ["mask", "point"])
def test_geopackage_holds_shapes_and_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, n: int
) -> None:
    import geopandas

    monkeypatch.setattr(arrow_files, "BLOCK_ROWS", 50)
    cells = as_kind(ellipses(n), kind)
    table = write_table(tmp_path, cells, model_spec(kind))
    frame = geopandas.read_file(export_table(table, tmp_path, ("gpkg",))["gpkg"], layer="nuclei")
    assert len(frame) == n and set(table.columns) <= set(frame.columns)
    if n:
        assert np.array_equal(frame["x"], cells.centroid_xy[:, 0]) and list(frame["uuid"]) == list(table.vector("uuid"))
        assert set(frame.geometry.geom_type) == {"Point" if kind == "point" else "Polygon"}
        assert np.allclose(frame.geometry.centroid.y, cells.centroid_xy[:, 1], atol=2)


def _top(prob: Any) -> list[int]:
    return [int(k) for k in prob.argmax(1)]


def test_csv_is_one_line_a_nucleus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    monkeypatch.setattr(arrow_files, "BLOCK_ROWS", 50)
    cells = ellipses(130)
    table = write_table(tmp_path, cells)
    path = export_table(table, tmp_path, ("csv",))["csv"]
    frame = pandas.read_csv(path, float_precision="round_trip")
    assert np.array_equal(frame["x"], cells.centroid_xy[:, 0])
    assert list(frame["class"]) == [CLASSES[k].name for k in _top(cells.class_prob)]
    before = path.read_bytes()
    assert export_table(table, tmp_path, ("csv",))["csv"].read_bytes() == before
    with gzip.open(path, "rt") as stream:
        assert len(stream.readlines()) == 131


def test_a_missing_word_is_empty(tmp_path: Path) -> None:
    from cellslide.store.cell_table import Categorical

    extender = TableExtender(write_table(tmp_path, ellipses(2)))
    extender.append(Columns({"organ": Categorical(np.array([0, -1]), ("breast",))}))
    extender.close(run_record())
    path = export_table(open_table(tmp_path / "cells.zarr"), tmp_path, ("csv",))["csv"]
    with gzip.open(path, "rt") as stream:
        header, first, second = (line.rstrip("\n").split(",") for line in stream)
    place = header.index('"organ"')
    assert (first[place], second[place]) == ('"breast"', "")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards so small that nuclei lie across them."""
    monkeypatch.setattr(labels, "CHUNK_PX", 32)
    monkeypatch.setattr(labels, "SHARD_PX", 64)
    monkeypatch.setattr(labels, "SMALLEST_PX", 100)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["mask", "box"])
def test_labels_are_the_outlines_filled(tmp_path: Path, kind: Any) -> None:
    cells = as_kind(ellipses(40, width=500, height=301), kind)
    table = write_table(tmp_path, cells, model_spec(kind), slide_info(width=500, height=301))
    path = export_table(table, tmp_path, ("labels",))["labels"]
    group: Any = zarr.open_group(path, mode="r")
    rings = table.rings(0, 40)
    assert rings is not None
    whole = rasterise(*rings, (301, 500))
    assert group["0"].dtype == np.uint32 and np.array_equal(group["0"][:], whole)
    assert len(np.unique(whole)) > 35
    for level, shape in enumerate(level_shapes(301, 500)):
        step = 2**level
        assert group[str(level)].shape == shape
        assert np.array_equal(group[str(level)][:], whole[::step, ::step]), level


@pytest.mark.usefixtures("small_shards")
def test_nuclei_across_the_slides_edge_are_cut_there(tmp_path: Path) -> None:
    from dataclasses import replace

    cells = ellipses(1)
    ring = np.array([[-5.0, -5], [10, -5], [10, 10], [-5, 10]])
    cells = replace(cells, contour_xy=ring, contour_start=np.array([0, 4]))
    table = write_table(tmp_path, cells, slide=slide_info(width=130, height=70))
    group: Any = zarr.open_group(export_table(table, tmp_path, ("labels",))["labels"], mode="r")
    assert group["0"][:].sum() == group["0"][:10, :10].sum() == 100


def test_labels_are_ome_ngff(tmp_path: Path) -> None:
    models = pytest.importorskip("ome_zarr_models", reason="extra `test` is not installed")
    table = write_table(tmp_path, ellipses(20, width=3000, height=1100), slide=slide_info(width=3000, height=1100))
    group = zarr.open_group(export_table(table, tmp_path, ("labels",))["labels"], mode="r")
    image = models.open_ome_zarr(group)
    assert type(image).__name__ == "ImageLabel" and image.ome_zarr_version == "0.5"
    datasets = image.ome_attributes.multiscales[0].datasets
    assert [d.coordinateTransformations[0].scale for d in datasets] == [[0.26, 0.25], [0.52, 0.5], [1.04, 1.0]]
    array: Any = group["0"]
    assert array.metadata.dimension_names == ("y", "x") and array.shards[0] > array.chunks[0]


def test_readers_of_ome_zarr_take_them_for_labels(tmp_path: Path) -> None:
    reader = pytest.importorskip("ome_zarr.reader", reason="extra `test` is not installed")
    from ome_zarr.io import parse_url

    table = write_table(tmp_path, ellipses(20, width=3000, height=1100), slide=slide_info(width=3000, height=1100))
    path = export_table(table, tmp_path, ("labels",))["labels"]
    (node,) = reader.Reader(parse_url(path))()
    assert [level.shape for level in node.data] == [(1100, 3000), (550, 1500), (275, 750)]
    assert int(node.data[0].max()) == 20 and {type(spec).__name__ for spec in node.specs} >= {"Label", "Multiscales"}


def test_no_cells_make_empty_labels(tmp_path: Path) -> None:
    table = write_table(tmp_path, ellipses(0), slide=slide_info(width=300, height=200))
    group: Any = zarr.open_group(export_table(table, tmp_path, ("labels",))["labels"], mode="r")
    assert group["0"].shape == (200, 300) and not group["0"][:].any()


def test_points_have_no_labels(tmp_path: Path) -> None:
    table = write_table(tmp_path, as_kind(ellipses(3), "point"), model_spec("point"))
    with pytest.raises(UsageError, match="leave labels out of --format"):
        export_table(table, tmp_path, ("labels",))
    assert [p.name for p in tmp_path.iterdir()] == ["cells.zarr"]


def test_command_exports_every_slide_below_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / name, ellipses(5))
    done = CliRunner().invoke(cli, ["export", str(tmp_path), "--format", "geojson,csv", "--geojson-origin", "level0"])
    assert done.exit_code == 0, done.output
    assert len(done.output.splitlines()) == 4
    for name in ("a", "b"):
        assert file_faults(tmp_path / name / "cells.geojson.gz") == []
        assert (tmp_path / name / "cells.csv.gz").is_file()


def test_command_takes_the_slides_folder_or_the_table(tmp_path: Path) -> None:
    write_table(tmp_path, ellipses(5))
    for folder in (tmp_path, tmp_path / "cells.zarr"):
        assert CliRunner().invoke(cli, ["export", str(folder)]).exit_code == 0
        (tmp_path / "cells.geojson.gz").unlink()


def test_command_says_what_is_missing(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["export", str(tmp_path)])
    assert done.exit_code == 2 and "no cells.zarr" in done.output and "segment" in done.output
    done = CliRunner().invoke(cli, ["export", str(tmp_path), "--format", "xlsx"])
    assert done.exit_code == 2 and "xlsx" in done.output and "h5ad" in done.output


def test_one_broken_table_does_not_stop_the_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / name, ellipses(5))
    (tmp_path / "a" / "cells.zarr" / "shapes" / "nuclei" / "shapes.parquet").unlink()
    done = CliRunner().invoke(cli, ["export", str(tmp_path)])
    assert done.exit_code == 1 and "another number of outlines" in done.output
    assert not (tmp_path / "a" / "cells.geojson.gz").exists() and (tmp_path / "b" / "cells.geojson.gz").is_file()
