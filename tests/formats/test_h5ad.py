"""The table as one HDF5 file: what AnnData reads from it is what AnnData reads from the zarr table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cellslide.formats import h5ad
from cellslide.formats.registry import export_table
from cellslide.store.cell_table import Categorical, Columns, TableExtender, open_table
from tests.support.random_cells import as_kind, ellipses, model_spec, run_record, write_table

anndata = pytest.importorskip("anndata", reason="extra `test` is not installed")


@pytest.mark.parametrize(("kind", "n"), [("mask", 2300), ("mask", 0), ("point", 1)])
def test_h5ad_is_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, n: int) -> None:
    monkeypatch.setattr(h5ad, "BLOCK_ROWS", 1000)
    monkeypatch.setattr(h5ad, "CHUNK_ROWS", 700)
    table = write_table(tmp_path, as_kind(ellipses(n), kind), model_spec(kind))
    path = export_table(table, tmp_path, ("h5ad",))["h5ad"]
    assert path.name == "cells.h5ad"
    ours, theirs = anndata.read_h5ad(path), anndata.read_zarr(tmp_path / "cells.zarr" / "tables" / "cells")
    assert ours.shape == theirs.shape and ours.n_obs == n
    assert ours.obs.equals(theirs.obs) and ours.var.equals(theirs.var)
    assert np.array_equal(ours.X, theirs.X)
    assert set(ours.obsm) == set(theirs.obsm) >= {"spatial", "prob"}
    for name in ours.obsm:
        assert np.array_equal(ours.obsm[name], theirs.obsm[name]), name
    assert set(ours.uns) == set(theirs.uns) and ours.uns["run"] == theirs.uns["run"]
    assert (
        list(ours.uns["class_colors"])
        == list(theirs.uns["class_colors"])
        == ["#c80000", "#0063ff", "#00a03c", "#808080"]
    )
    assert ours.uns["schema_version"] == theirs.uns["schema_version"] == 2


def test_missing_words_stay_missing(tmp_path: Path) -> None:
    extender = TableExtender(write_table(tmp_path, ellipses(3)))
    extender.append(Columns({"organ": Categorical(np.array([0, -1, 0]), ("breast",))}))
    extender.close(run_record())
    path = export_table(open_table(tmp_path / "cells.zarr"), tmp_path, ("h5ad",))["h5ad"]
    assert anndata.read_h5ad(path).obs["organ"].isna().tolist() == [False, True, False]


def test_rows_are_packed_and_a_broken_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path, ellipses(2000))
    with h5py.File(export_table(table, tmp_path, ("h5ad",))["h5ad"]) as file:
        assert file["obsm/prob"].compression == "gzip" and file["obs/x"].shuffle
    monkeypatch.setattr(h5ad, "_copy_array", lambda *_: 1 / 0)
    (tmp_path / "cells.h5ad").unlink()
    with pytest.raises(ZeroDivisionError):
        export_table(table, tmp_path, ("h5ad",))
    assert [path.name for path in tmp_path.iterdir()] == ["cells.zarr"]
