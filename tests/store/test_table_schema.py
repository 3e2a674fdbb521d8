"""A table of version 1 is read, handed on and extended as one of version 2; `class` is the decision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from cellslide.store.anndata_columns import write_word
from cellslide.store.cell_table import Categorical, CellTable, Columns, TableError, TableExtender, open_table
from cellslide.store.table_schema import NOT_NUCLEUS, decided
from cellslide.types import ClassSpec
from tests.support.older_table import make_version_1
from tests.support.random_cells import ellipses, model_spec, write_table

CLASSES = (ClassSpec("Tumor", (200, 0, 0)), ClassSpec("Stroma", (0, 160, 60)), ClassSpec(NOT_NUCLEUS, (9, 9, 9)))
N = 40


def typed_table(folder: Path) -> CellTable:
    """Write a table whose cells are typed, abstain, are rejected, or were not typed."""
    spec = model_spec(classes=CLASSES)
    with write_table(folder, ellipses(N), spec) as table:
        top, abstained = table.codes("class_top"), np.arange(N) % 4 == 0
        top[::10] = -1
        abstained &= top >= 0
        codes = decided(top, abstained, len(CLASSES))
        extender = TableExtender(table)
        obs = {
            "class": Categorical(codes, table.decisions),
            "class_top": Categorical(top, table.class_names),
            "is_nucleus": codes != 2,
            "abstained": abstained,
        }
        extender.append(Columns(obs))
        extender.close(table.run)
    return open_table(folder / "cells.zarr")


def contents(table: CellTable) -> dict[str, list[object]]:
    """Return every column as plain values."""
    found = {name: table.column(name) for name in table.columns}
    return {
        name: [*column.names, *column.codes.tolist()] if isinstance(column, Categorical) else column.tolist()
        for name, column in found.items()
    }


def test_version_1_is_read_as_version_2(tmp_path: Path) -> None:
    with typed_table(tmp_path) as table:
        before, counts = contents(table), table.count_classes()
        assert table.version == 2 and set(before["class"]) >= {-1, 0, 1, 2, 3}
    make_version_1(tmp_path / "cells.zarr")
    with open_table(tmp_path / "cells.zarr") as table:
        assert table.version == 1 and contents(table) == before and table.count_classes() == counts
        assert [int(k) for chunk in table.iter_chunks(7) for k in chunk.class_index] == table.codes("class").tolist()


def test_what_is_handed_on_is_of_version_2(tmp_path: Path) -> None:
    pytest.importorskip("anndata", reason="extra `spatial` is not installed")
    with typed_table(tmp_path) as table:
        expected = table.to_anndata()
    make_version_1(tmp_path / "cells.zarr")
    with open_table(tmp_path / "cells.zarr") as table:
        found = table.to_anndata()
        assert table.version == 1 and found.uns["schema_version"] == 2
        assert list(found.obs.columns) == list(expected.obs.columns) and found.obs.equals(expected.obs)
        assert list(found.uns["class_colors"]) == list(expected.uns["class_colors"])


def test_a_column_more_makes_it_version_2(tmp_path: Path) -> None:
    with typed_table(tmp_path) as table:
        before = contents(table)
    make_version_1(tmp_path / "cells.zarr")
    old = open_table(tmp_path / "cells.zarr")
    extender = TableExtender(old)
    extender.append(Columns({"extra": np.arange(N)}))
    extender.close(old.run)
    with open_table(tmp_path / "cells.zarr") as table:
        assert table.version == 2 and table.columns == (*before, "extra")
        assert {name: values for name, values in contents(table).items() if name != "extra"} == before


def test_counts_leave_out_what_is_no_nucleus(tmp_path: Path) -> None:
    with typed_table(tmp_path) as table:
        codes = table.codes("class").tolist()
        counts = table.count_classes()
    assert counts == {"Tumor": codes.count(0), "Stroma": codes.count(1), "abstained": codes.count(3)}


def test_a_version_of_the_future_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, ellipses(3)).close()
    group = zarr.open_group(tmp_path / "cells.zarr", mode="r+", use_consolidated=False)["tables/cells"]
    write_word(group, "uns/schema_version", "3")  # type: ignore[arg-type]
    with pytest.raises(TableError, match="schema version 3"):
        open_table(tmp_path / "cells.zarr")


def test_no_class_may_be_called_abstained(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="abstained"):
        write_table(tmp_path, ellipses(3, classes=1), model_spec(classes=(ClassSpec("abstained", (1, 2, 3)),)))
