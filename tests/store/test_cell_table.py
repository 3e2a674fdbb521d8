"""The cell table: streamed, exact, extended, and open to SpatialData, AnnData, scanpy and squidpy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from uuid import RFC_4122, UUID

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from cellslide.geometry.outlines import SHAPE_FEATURES, ring_features
from cellslide.store import anndata_columns as anndata_store
from cellslide.store import cell_table, table_writer
from cellslide.store import shapes as spatial
from cellslide.store.anndata_columns import ColumnWriter, read_obs
from cellslide.store.cell_table import Categorical, CellTable, Columns, TableError, TableExtender, open_table
from cellslide.store.table_writer import NUCLEUS, CellTableWriter
from cellslide.store.uuids import SeenPlaces, make_uuids, pack_places, times_seen
from cellslide.types import Cells, ClassSpec
from tests.support.random_cells import CLASSES, as_kind, ellipses, model_spec, run_record, slide_info, write_table

CONTRACT_OBS = {
    "cell_id", "x", "y", "area_um2", "uuid", "score", "class", "class_top", "class_prob", "is_nucleus", "in_artefact",
    "region", "instance_id",
}  # fmt: skip


def _write_in_parts(folder: Path, cells: Cells, cuts: list[int]) -> CellTable:
    writer = CellTableWriter(folder / "cells.zarr", slide_info(), model_spec())
    edges = [0, *cuts, len(cells)]
    for first, stop in zip(edges[:-1], edges[1:], strict=True):
        writer.append(cells.take(np.arange(first, stop)))
    writer.close(run_record())
    return open_table(folder / "cells.zarr")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, chunks and row groups so small that a few hundred cells cross all of them."""
    for module in (cell_table, table_writer):
        monkeypatch.setattr(module, "BLOCK_ROWS", 70)
    monkeypatch.setattr(anndata_store, "CHUNK_ROWS", 64)
    monkeypatch.setattr(spatial, "ROW_GROUP", 50)


def _joined(cells_table: CellTable, rows: int) -> list[Cells]:
    return [chunk.cells for chunk in cells_table.iter_chunks(rows)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rows", [33, 1000])
def test_what_is_read_is_what_was_written(tmp_path: Path, rows: int) -> None:
    cells = ellipses(317)
    read = _write_in_parts(tmp_path, cells, [1, 1, 130, 256])
    parts = _joined(read, rows)
    assert np.array_equal(np.concatenate([p.centroid_xy for p in parts]), cells.centroid_xy)
    assert np.array_equal(np.concatenate([p.contour_xy for p in parts]), cells.contour_xy)
    lengths = np.concatenate([np.diff(p.contour_start) for p in parts])
    assert np.array_equal(np.cumsum(lengths), cells.contour_start[1:])
    for name in ("score", "area_um2", "class_prob", "tile_index", "row"):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(cells, name)), name


@pytest.mark.usefixtures("small_blocks")
def test_blocks_do_not_show_in_the_result(tmp_path: Path) -> None:
    cells = ellipses(300)
    one, many = write_table(tmp_path / "a", cells), _write_in_parts(tmp_path / "b", cells, [7, 100, 101])
    assert one.columns == many.columns and CONTRACT_OBS <= set(one.columns)
    for part in ("a", "b"):
        groups = pq.ParquetFile(tmp_path / part / "cells.zarr" / "shapes" / "nuclei" / "shapes.parquet").metadata
        assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [50, 20] * 4 + [20]
    for name in one.columns:
        a, b = (t.column(name) for t in (one, many))
        a, b = (c.codes if isinstance(c, Categorical) else c for c in (a, b))
        assert np.array_equal(a, b), name
    assert np.array_equal(one.matrix("X"), many.matrix("X"))


def test_columns_and_values(tmp_path: Path) -> None:
    cells = ellipses(50)
    read = write_table(tmp_path, cells)
    assert np.array_equal(read.vector("cell_id"), np.arange(50))
    assert np.array_equal(read.vector("instance_id"), np.arange(50))
    assert np.array_equal(read.matrix("spatial"), cells.centroid_xy)
    assert cells.class_prob is not None and cells.contour_xy is not None and cells.contour_start is not None
    word = read.column("class")
    assert isinstance(word, Categorical) and word.names == (*(c.name for c in CLASSES), "abstained")
    top = read.column("class_top")
    assert isinstance(top, Categorical) and top.names == read.class_names == word.names[:-1]
    for column in (word, top):
        assert np.array_equal(column.codes, cells.class_prob.argmax(1))
    assert read.vector("is_nucleus").all() and not read.vector("in_artefact").any()
    assert np.array_equal(read.vector("class_prob"), cells.class_prob.max(1))
    assert read.features == SHAPE_FEATURES
    assert np.array_equal(read.matrix("X"), ring_features(cells.contour_xy, cells.contour_start, 0.25, 0.26))
    assert read.decisions == word.names and read.colors == tuple(c.color for c in CLASSES)
    assert len(read.decision_colors) == len(read.decisions)
    assert read.slide == slide_info() and read.run == run_record()


def test_a_row_range_of_a_column(tmp_path: Path) -> None:
    cells = ellipses(50)
    read = write_table(tmp_path, cells)
    assert np.array_equal(read.vector("x", 10, 20), cells.centroid_xy[10:20, 0])
    with pytest.raises(TableError, match=r"no column gate; there are cell_id, x"):
        read.column("gate")


def test_a_model_without_types(tmp_path: Path) -> None:
    read = write_table(tmp_path, ellipses(9, classes=0), model_spec(classes=()))
    assert read.class_names == (NUCLEUS.name,) and read.colors == (NUCLEUS.color,)
    assert np.isnan(read.vector("class_prob")).all() and "prob" not in read.matrices
    assert next(read.iter_chunks()).cells.class_prob is None


def test_boxes_come_back_as_boxes(tmp_path: Path) -> None:
    cells = as_kind(ellipses(20), "box")
    chunk = next(write_table(tmp_path, cells, model_spec("box")).iter_chunks())
    assert np.array_equal(chunk.cells.box_xyxy, cells.box_xyxy)


def test_points_have_no_outline(tmp_path: Path) -> None:
    read = write_table(tmp_path, as_kind(ellipses(20), "point"), model_spec("point"))
    chunk = next(read.iter_chunks(features=True))
    assert chunk.cells.contour_xy is None and chunk.columns.x is not None and chunk.columns.x.shape == (20, 0)


@pytest.mark.parametrize("n", [0, 6])
@pytest.mark.parametrize("kind", ["mask", "box", "point"])
def test_spatialdata_and_anndata_open_it(tmp_path: Path, kind: Any, n: int) -> None:
    spatialdata = pytest.importorskip("spatialdata", reason="extra `spatial` is not installed")
    anndata = pytest.importorskip("anndata", reason="extra `spatial` is not installed")
    write_table(tmp_path, as_kind(ellipses(n), kind), model_spec(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data = spatialdata.read_zarr(tmp_path / "cells.zarr")
        alone = anndata.read_zarr(tmp_path / "cells.zarr" / "tables" / "cells")
    assert data.tables["cells"].shape == alone.shape == (n, 0 if kind == "point" else len(SHAPE_FEATURES))
    assert alone.obs["class"].dtype == "category" and list(alone.uns["class_names"]) == [c.name for c in CLASSES]
    assert json.loads(alone.uns["run"])["status"] == "done"
    assert ("nuclei" in data.shapes) == (n > 0)
    if n:
        joined, joined_table = spatialdata.join_spatialelement_table(data, "nuclei", table_name="cells")
        assert len(joined["nuclei"]) == len(joined_table) == n
        centre = joined["nuclei"].geometry.centroid
        assert np.allclose(np.stack([centre.x, centre.y], 1), joined_table.obsm["spatial"], atol=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_scanpy_and_squidpy_run_on_it(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="extra `spatial` is not installed")
    scanpy = pytest.importorskip("scanpy", reason="extra `spatial` is not installed")
    squidpy = pytest.importorskip("squidpy", reason="extra `spatial` is not installed")
    write_table(tmp_path, ellipses(120))
    data = anndata.read_zarr(tmp_path / "cells.zarr" / "tables" / "cells")
    scanpy.pp.neighbors(data, use_rep="X", n_neighbors=5, method="gauss", transformer="sklearn")
    squidpy.gr.spatial_neighbors(data, coord_type="generic", n_neighs=5)
    squidpy.gr.nhood_enrichment(data, cluster_key="class", n_perms=10, seed=0, show_progress_bar=False)
    assert data.uns["class_nhood_enrichment"]["count"].sum() == 120 * 5
    assert data.obsp["connectivities"].shape == (120, 120)


def test_shapes_are_geoparquet_in_pixels(tmp_path: Path) -> None:
    import geopandas

    cells = ellipses(30)
    write_table(tmp_path, cells)
    path = tmp_path / "cells.zarr" / "shapes" / "nuclei" / "shapes.parquet"
    frame = geopandas.read_parquet(path)
    assert frame.crs is None and frame.geometry.is_valid.all()
    assert cells.contour_xy is not None and cells.contour_start is not None
    ring = np.array(frame.geometry.iloc[4].exterior.coords)
    wanted = cells.contour_xy[cells.contour_start[4] : cells.contour_start[5]]
    assert np.array_equal(ring, np.concatenate([wanted, wanted[:1]]))
    assert json.loads(pq.read_schema(path).metadata[b"geo"])["version"] == "1.1.0"


def test_writing_needs_no_spatial_package(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.support.random_cells import *;"
        f"write_table(Path({str(tmp_path)!r}), ellipses(3));"
        "print([m for m in ('geopandas', 'anndata', 'spatialdata', 'dask', 'torch', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_uuids_are_version_8_and_repeat(tmp_path: Path) -> None:
    cells = ellipses(40)
    read = write_table(tmp_path / "a", cells)
    key, place = f"{'f0' * 32}/{'ab' * 32}", pack_places(*cells.centroid_xy.T)
    wanted = make_uuids(key, place, np.zeros(40, np.int64)).astype(str).tolist()
    assert list(read.vector("uuid")) == wanted
    assert list(write_table(tmp_path / "b", cells).vector("uuid")) == wanted
    assert all(UUID(text).version == 8 and UUID(text).variant == RFC_4122 for text in wanted)


def test_uuids_of_places_keys_and_repeats_differ() -> None:
    """Places side by side, many repeats of one place, and keys that hardly differ."""
    near = pack_places(*np.meshgrid(np.arange(300) / 100, np.arange(-300, 300) / 100)).ravel()
    once, often = np.zeros(len(near), np.int64), np.arange(len(near))
    repeats = make_uuids("a", np.full_like(near, near[7]), often + 1)
    found = [make_uuids("a", near, once), make_uuids("b", near, once), repeats]
    assert len(np.unique(np.concatenate(found))) == 3 * len(near)


def test_a_uuid_is_what_it_was() -> None:
    """Ids join edits back to nuclei, so they may not change."""
    place = pack_places(np.array([1.0, -3.0]), np.array([2.5, 5.0]))
    assert make_uuids("k", place, np.array([0, 2])).tolist() == [
        b"4ccf1e9a-a4ee-8db9-8e62-38640d9c63e6",
        b"2d524d05-5024-8ca6-97b4-f38985d3299b",
    ]


@pytest.mark.usefixtures("small_blocks")
def test_cells_of_one_place_have_their_own_uuids(tmp_path: Path) -> None:
    cells = ellipses(200)
    cells.centroid_xy[[3, 60, 150, 151, 199]] = cells.centroid_xy[3]
    uuid = write_table(tmp_path, cells).vector("uuid")
    assert len(set(uuid)) == 200
    again = cells.take(np.arange(150))
    assert list(write_table(tmp_path, again).vector("uuid")) == list(uuid[:150])


def test_places_count_on_over_blocks() -> None:
    place = pack_places(np.array([1.004, 2, 1, -3]), np.array([5.0, 5, 5, 5]))
    assert times_seen(place, []).tolist() == [0, 0, 1, 0]
    assert times_seen(place, [np.sort(place)]).tolist() == [2, 1, 3, 1]


def test_abort_keeps_the_old_table(tmp_path: Path) -> None:
    write_table(tmp_path, ellipses(5))
    writer = CellTableWriter(tmp_path / "cells.zarr", slide_info(), model_spec())
    writer.append(ellipses(9))
    assert (tmp_path / f"cells.zarr.tmp-{os.getpid()}").is_dir()
    writer.abort()
    assert [p.name for p in tmp_path.iterdir()] == ["cells.zarr"]
    assert open_table(tmp_path / "cells.zarr").n == 5


def test_close_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    dead = tmp_path / "cells.zarr.tmp-999999999"
    dead.mkdir()
    write_table(tmp_path, ellipses(5))
    assert write_table(tmp_path, ellipses(7)).n == 7
    assert [p.name for p in tmp_path.iterdir()] == ["cells.zarr"]


def test_cells_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    writer = CellTableWriter(tmp_path / "cells.zarr", slide_info(), model_spec())
    with pytest.raises(TableError, match="2 class probabilities"):
        writer.append(ellipses(5, classes=2))
    with pytest.raises(TableError, match="outline"):
        writer.append(as_kind(ellipses(5), "point"))
    writer.abort()


def test_no_table_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no cell table here"):
        open_table(tmp_path / "cells.zarr")
    write_table(tmp_path, ellipses(5))
    (tmp_path / "cells.zarr" / "shapes" / "nuclei" / "shapes.parquet").unlink()
    with pytest.raises(TableError, match="5 rows"):
        open_table(tmp_path / "cells.zarr")


@pytest.mark.usefixtures("small_blocks")
def test_new_columns_join_an_old_table(tmp_path: Path) -> None:
    cells = ellipses(200)
    old = write_table(tmp_path, cells)
    uuid = old.vector("uuid")
    rng = np.random.default_rng(0)
    gate = rng.random(200).astype(np.float32)
    prob = rng.dirichlet([1, 1], 200).astype(np.float32)
    codes = prob.argmax(1)
    extender = TableExtender(old)
    for first in range(0, 200, 90):
        part = slice(first, min(first + 90, 200))
        obs = {
            "gate": gate[part],
            "path": Categorical(codes[part], ("mix", "safe")),
            "class": Categorical(codes[part], ("A", "B", "abstained")),
            "class_top": Categorical(codes[part], ("A", "B")),
            "organ": Categorical(np.zeros(part.stop - first, np.int8), ("breast",)),
        }
        extender.append(Columns(obs, {"prob": prob[part], "prob_local": prob[part]}))
    extender.close(run_record(), (ClassSpec("A", (1, 2, 3)), ClassSpec("B", (4, 5, 6))))
    new = open_table(tmp_path / "cells.zarr")
    assert new.class_names == ("A", "B") and new.colors == ((1, 2, 3), (4, 5, 6))
    assert new.columns == (*old.columns, "gate", "path", "organ")
    assert np.array_equal(new.vector("gate"), gate) and np.array_equal(new.matrix("prob_local"), prob)
    assert np.array_equal(np.concatenate([c.class_index for c in new.iter_chunks(64)]), codes)
    assert list(new.vector("uuid")) == list(uuid)
    assert np.array_equal(next(new.iter_chunks(200)).cells.contour_xy, cells.contour_xy)
    anndata = pytest.importorskip("anndata", reason="extra `spatial` is not installed")
    obs_frame = anndata.read_zarr(tmp_path / "cells.zarr" / "tables" / "cells").obs
    assert list(obs_frame["path"]) == [("mix", "safe")[k] for k in codes]


def files_of(store: Path) -> dict[Path, bytes]:
    return {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.mark.parametrize("links", [True, False])
def test_what_does_not_change_is_linked_to_and_the_old_files_stay_as_they_were(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def refuse(source: str | Path, target: str | Path) -> None:
        if not str(source).endswith(".partial"):  # zarr needs links for what it writes.
            raise PermissionError("no links on this disk")
        link(source, target)

    old = write_table(tmp_path, ellipses(200))
    shutil.copytree(old.path, tmp_path / "seen", copy_function=os.link)
    before, outlines = files_of(old.path), Path("shapes/nuclei/shapes.parquet")
    if not links:
        monkeypatch.setattr("os.link", refuse)
    extender = TableExtender(old)
    extender.append(Columns({"gate": np.zeros(200), "class_prob": np.ones(200, np.float32)}))
    assert files_of(old.path) == before
    extender.close(run_record())
    # Nothing was written through a name that both tables had.
    assert files_of(tmp_path / "seen") == before
    assert (tmp_path / "seen" / outlines).samefile(old.path / outlines) == links
    assert (open_table(old.path).vector("class_prob") == 1).all()


def test_columns_for_some_rows_only_are_refused(tmp_path: Path) -> None:
    old = write_table(tmp_path, ellipses(20))
    extender = TableExtender(old)
    extender.append(Columns({"gate": np.zeros(19)}))
    with pytest.raises(TableError, match="19 rows of new columns for 20 cells"):
        extender.close(run_record())
    extender.abort()
    assert "gate" not in open_table(tmp_path / "cells.zarr").columns
    assert [p.name for p in tmp_path.iterdir()] == ["cells.zarr"]


def test_blocks_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Columns({"a": np.zeros(3), "b": np.zeros(4)})
    extender = TableExtender(write_table(tmp_path, ellipses(20)))
    extender.append(Columns({"path": Categorical(np.zeros(10, int), ("mix",))}, {"p": np.zeros((10, 2))}))
    with pytest.raises(TableError, match="categories changed"):
        extender.append(Columns({"path": Categorical(np.zeros(10, int), ("local",))}))
    with pytest.raises(TableError, match="rows of shape"):
        extender.append(Columns(obsm={"p": np.zeros((10, 3))}))
    extender.abort()


def test_a_foreign_polygon_is_refused(tmp_path: Path) -> None:
    import geopandas
    from shapely.geometry import Point

    read = write_table(tmp_path, ellipses(5))
    path = tmp_path / "cells.zarr" / "shapes" / "nuclei" / "shapes.parquet"
    rings = [Point(i, 0).buffer(3).difference(Point(i, 0).buffer(1)) for i in range(5)]
    geopandas.GeoDataFrame(geometry=rings).to_parquet(path)
    read.close()
    with pytest.raises(TableError, match="polygons of one ring"):
        open_table(tmp_path / "cells.zarr").rings(0, 5)


def test_outlines_in_their_order_are_those_of_any_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatial, "ROW_GROUP", 40)
    monkeypatch.setattr(spatial, "STREAM_ROWS", 15)
    table = write_table(tmp_path, ellipses(130))
    assert table.shapes is not None
    stream, first = table.shapes.stream(), 0
    for n in (1, 38, 2, 40, 0, 49):
        for one, other in zip(stream.take(n), table.rings(first, first + n), strict=True):
            np.testing.assert_array_equal(one, other)
        first += n
    assert first == len(table)
    with pytest.raises(TableError, match="end before the nuclei"):
        stream.take(1)


def test_arrays_are_zarr_v3_in_whole_chunks(tmp_path: Path, small_blocks: None) -> None:
    write_table(tmp_path, ellipses(300))
    group: Any = zarr.open_group(tmp_path / "cells.zarr" / "tables" / "cells", mode="r", zarr_format=3)
    assert group["obs/x"].shape == (300,) and group["obs/x"].chunks[0] < 300
    assert group["obs/_index"][0] == "0" and group["obs/_index"][299] == "299"


def test_a_column_may_turn_from_ascii_to_any_text(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "t", mode="w", zarr_format=3)
    writer = ColumnWriter(group)
    writer.append(Columns({"a": np.array([b"one", b"two"])}))
    writer.append(Columns({"a": np.array(["drei", "vier µ"], object)}))
    writer.append(Columns({"a": np.array([b"five"])}))
    writer.close()
    read = read_obs(group, "a")
    assert isinstance(read, np.ndarray) and read.tolist() == ["one", "two", "drei", "vier µ", "five"]


def test_places_seen_are_forgotten_only_when_none_can_come_back() -> None:
    rng = np.random.default_rng(3)
    # Rows overlap a little, and the last block comes back to the first.
    y = [rng.integers(40 * k, 40 * k + 60, 300).astype(float) for k in range(6)] + [np.zeros(50)]
    places = [pack_places(rng.integers(0, 12, len(v)).astype(float), v) for v in y]
    for last in (6, 7):
        seen = SeenPlaces(y[:last])
        counted = [seen.repeats(place) for place in places[:last]]
        wanted = [times_seen(p, [np.sort(q) for q in places[:k]]) for k, p in enumerate(places[:last])]
        np.testing.assert_array_equal(np.concatenate(counted), np.concatenate(wanted))
        assert (len(seen._seen) < last) == (last == 6)
