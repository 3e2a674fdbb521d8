"""A table as schema version 1 had it: `class` is the most probable class, `abstained` says what was decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cellslide.store.anndata_columns import Categorical, Columns, ColumnWriter, mark_frame, write_values, write_word
from cellslide.store.cell_table import open_table

ADDED = ("class_top", "in_artefact")


def make_version_1(path: Path) -> None:
    """Turn a table on disk into what version 1 would have written; objects were rejected by a classifier alone."""
    with open_table(path) as table:
        names, order = table.class_names, list(table.columns)
        top, colors = table.codes("class_top"), np.asarray(table.group["uns/class_top_colors"][:]).tolist()
    gone = ADDED if "abstained" in order else (*ADDED, "is_nucleus")
    group: Any = zarr.open_group(path, mode="r+", use_consolidated=False)["tables/cells"]
    writer = ColumnWriter(group)
    writer.append(Columns({"class": Categorical(top, names)}))
    writer.close()
    for name in gone:
        del group[f"obs/{name}"]
    mark_frame(group["obs"], [name for name in order if name not in gone])
    write_word(group, "uns/schema_version", "1")
    write_values(group, "uns/class_colors", colors)
    del group["uns/class_top_colors"]
