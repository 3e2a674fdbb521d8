"""Bundles of every version read alike, and the micro-files of a real instrument to their known counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from cellslide.errors import UsageError
from cellslide.xenium.bundle import Bundle, id_code, id_text, is_control
from cellslide.xenium.painted import PaintSettings, paint_bundle, turned_matrix

MICRO = {"mouse_brain_1": (962, 777, 776, 7), "mouse_brain_2": (777, 592, 592, 9)}


def counts(bundle: Bundle) -> tuple[int, int, int, int]:
    blocks = list(bundle.transcripts())
    good = sum(int(b.kept(genes_only=False).sum()) for b in blocks)
    genes = sum(int(b.kept().sum()) for b in blocks)
    cells = {code for b in blocks for code in b.cell.tolist() if code >= 0}
    return sum(map(len, blocks)), good, genes, len(cells)


@pytest.mark.parametrize("name", MICRO)
def test_micro_files_are_read_to_their_counts(shared: Path, name: str) -> None:
    bundle = Bundle(shared / "data/xenium-tiny" / name)
    assert counts(bundle) == MICRO[name]
    assert bundle.version == (1, 0, 2)
    assert bundle.pixel_size == 0.2125
    nuclei = bundle.nuclei()
    assert nuclei.merged == 0
    assert set(nuclei.cell.tolist()) <= set(bundle.cells().cell.tolist())


@pytest.mark.parametrize("kind", ["text", "bytes", "dictionary", "text ids"])
def test_parquet_twins_of_the_micro_files(shared: Path, tmp_path: Path, kind: str) -> None:
    source = shared / "data/xenium-tiny/mouse_brain_1"
    for name in ("experiment.xenium", "cell_boundaries.csv", "nucleus_boundaries.csv"):
        shutil.copy(source / name, tmp_path / name)
    table = pa_csv.read_csv(source / "transcripts.csv")
    names, ids = table.column("feature_name"), table.column("cell_id")
    if kind == "text ids":
        ids = pa.chunked_array([["UNASSIGNED" if v == -1 else id_text(v << 31 | 1) for v in ids.to_pylist()]])
    elif kind == "bytes":
        names = names.cast(pa.binary())
        ids = ids.cast(pa.string()).cast(pa.binary())
    elif kind == "dictionary":
        names = names.dictionary_encode()
    for column, values in (("feature_name", names), ("cell_id", ids)):
        table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, tmp_path / "transcripts.parquet", row_group_size=100)
    twin, own = Bundle(tmp_path), Bundle(source)
    assert counts(twin) == MICRO["mouse_brain_1"]
    assert twin.genes == own.genes
    theirs = next(own.transcripts())
    expected = np.where(theirs.cell < 0, -1, theirs.cell << 31 | 1) if kind == "text ids" else theirs.cell
    for name, column in (("gene", theirs.gene), ("x_um", theirs.x_um), ("cell", expected)):
        ours = np.concatenate([getattr(block, name) for block in twin.transcripts()])
        np.testing.assert_allclose(ours, column)


def test_cells_of_a_real_table(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "data/xenium-tiny/cells_only/cells.csv.gz", tmp_path)
    (tmp_path / "experiment.xenium").write_text('{"pixel_size": 0.2125}')
    cells = Bundle(tmp_path).cells()
    assert cells.cell.tolist() == [1, 2, 3, 4, 5, 6]
    assert cells.centroid_um[0] == pytest.approx([1898.814917, 2540.963147])
    assert Bundle(tmp_path).version == ()


def paint(folder: Path, **settings: Any) -> Bundle:
    rng = np.random.default_rng(1)
    xy = rng.uniform(0, 400, (40, 2))
    rates = rng.gamma(1.0, 2.0, (40, 6))
    matrix = turned_matrix((400, 400), 0.5, 0.2125)
    painted = paint_bundle(folder, xy, rates, [f"G{k}" for k in range(6)], matrix, PaintSettings(**settings))
    return Bundle(painted.folder)


def totals(bundle: Bundle) -> list[list[float]]:
    blocks = list(bundle.transcripts())
    gene = np.concatenate([b.gene for b in blocks])
    return [np.bincount(gene + 1).tolist(), [sum(float(b.x_um.sum()) for b in blocks)], list(counts(bundle))]


@pytest.mark.parametrize("ending", [".parquet", ".csv.gz", ".csv"])
@pytest.mark.parametrize("version", ["1.0.2", "1.7.1", "2.0.0", "3.1.0", "4.0.1"])
def test_every_version_says_the_same(tmp_path: Path, version: str, ending: str) -> None:
    bundle = paint(tmp_path / "twin", version=version, ending=ending, row_group=64)
    first = paint(tmp_path / "first")
    expected = totals(first)
    found = totals(bundle)
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], rel=1e-6)
    assert found[2] == expected[2]
    assert bundle.genes == tuple(f"G{k}" for k in range(6))
    assert bundle.version[:3] == tuple(map(int, version.split(".")))
    np.testing.assert_allclose(bundle.nuclei().centroid_um, bundle.cells().centroid_um, atol=1e-2)
    cell = np.concatenate([b.cell for b in bundle.transcripts()])
    assert set(cell[cell >= 0].tolist()) == set(bundle.cells().cell.tolist())


def test_ids_are_one_number() -> None:
    assert [id_code(text) for text in ("67500", "-1", "UNASSIGNED", "")] == [67500, -1, -1, -1]
    assert id_code("aaaaficg-1") == 0x5826 << 31 | 1
    assert id_text(id_code("oilbaljg-1")) == "oilbaljg-1"
    assert id_text(67500) == "67500"
    assert id_code("pppppppp-1") < 1 << 63
    with pytest.raises(ValueError, match="xyz"):
        id_code("xyz-1")


def test_controls_by_their_names() -> None:
    controls = (
        "NegControlProbe_00062", "NegControlCodeword_0500", "antisense_ULK3", "BLANK_0069", "UnassignedCodeword_0001",
        "DeprecatedCodeword_0001", "Intergenic_Region_1195",
    )  # fmt: skip
    assert all(map(is_control, controls))
    assert not any(map(is_control, ("NEGR1", "BLK", "ACTA2")))


def test_outlines_of_several_nuclei_in_one_ring_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "experiment.xenium").write_text('{"pixel_size": 0.2125, "analysis_sw_version": "xenium-2.0.0.6"}')
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]], float)
    xy = np.concatenate([square, square + 10, square, square + 7])
    ids = ["aaaaaaab-1"] * 5 + ["aaaaaaac-1"] * 10 + ["aaaaaaad-1"] * 5
    xy[5:10], xy[10:15] = square + 10, square + 20
    pq.write_table(
        pa.table({"cell_id": ids, "vertex_x": xy[:, 0], "vertex_y": xy[:, 1]}), tmp_path / "nucleus_boundaries.parquet"
    )
    nuclei = Bundle(tmp_path).nuclei()
    assert nuclei.merged == 1
    np.testing.assert_allclose(nuclei.centroid_um, [[2, 2], [9, 9]])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pixel_size": "x"}', '{"pixel_size": 1e9}'])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "experiment.xenium").write_text(text)
    with pytest.raises(UsageError, match=r"experiment\.xenium"):
        Bundle(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="experiment"):
        Bundle(tmp_path)
    (tmp_path / "experiment.xenium").write_text('{"pixel_size": 0.2125}')
    with pytest.raises(UsageError, match=r"transcripts\.parquet"):
        list(Bundle(tmp_path).transcripts())
    (tmp_path / "transcripts.csv").write_text("feature_name,x_location\nA,1\n")
    with pytest.raises(UsageError, match="cell_id, qv, y_location"):
        list(Bundle(tmp_path).transcripts())
    (tmp_path / "transcripts.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(UsageError, match=r"transcripts\.parquet"):
        list(Bundle(tmp_path).transcripts())
