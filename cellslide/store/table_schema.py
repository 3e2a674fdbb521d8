"""What the columns of a cell table mean: schema version 2, and version 1 read as if it were that.

`class` is the decision: a class, `ABSTAINED`, `NOT_NUCLEUS` for a rejected object, or missing for a cell that was not
typed. `class_top` is the most probable class and `class_prob` its probability. In version 1 `class` was the most
probable class, and what was decided stood beside it in `abstained`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from cellslide.store.anndata_columns import Categorical, Column, TableError, read_word, write_number, write_values
from cellslide.types import Bool, ClassSpec, hex_color

SCHEMA_VERSION = 2
VERSION_PATH = "uns/schema_version"
# What `class` says of a cell of which no class was probable enough.
ABSTAINED, ABSTAINED_COLOR = "abstained", (128, 128, 128)
# The class of objects that are no nucleus; a classifier that has it rejects them.
NOT_NUCLEUS = "not_nucleus"
# Columns that version 1 lacks, or means otherwise, and after which of its columns each stands.
_PLACES = {"class_top": "class", "is_nucleus": "class_prob", "in_artefact": "is_nucleus"}
CHANGED = ("class", *_PLACES)


def decision_words(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the categories of `class`: the classes, then `ABSTAINED`; raises TableError where a class is called so."""
    if ABSTAINED in class_names:
        raise TableError(f"a class may not be called {ABSTAINED}: that is the word for cells of no class; rename it")
    return (*class_names, ABSTAINED)


def decided(top: NDArray[Any], abstained: Bool, n_classes: int) -> NDArray[np.int16]:
    """Return the codes of `class` (N,) from those of `class_top`: `n_classes` where a cell abstained."""
    return np.where(abstained & (top >= 0), n_classes, top).astype(np.int16)


def write_schema(group: zarr.Group, classes: Sequence[ClassSpec]) -> None:
    """Write the version, and the names and colours of the classes, as scanpy looks for them."""
    colors = [hex_color(c.color) for c in classes]
    write_number(group, VERSION_PATH, SCHEMA_VERSION)
    write_values(group, "uns/class_names", [c.name for c in classes])
    write_values(group, "uns/class_colors", [*colors, hex_color(ABSTAINED_COLOR)])
    write_values(group, "uns/class_top_colors", colors)


def read_version(group: zarr.Group) -> int:
    """Return the schema version of a table; raises TableError for one that is not known here."""
    found = read_word(group, VERSION_PATH)
    if found not in ("1", str(SCHEMA_VERSION)):
        raise TableError(
            f"{group.store_path}: schema version {found[:20]}, this cellslide reads 1 to {SCHEMA_VERSION}; "
            "install the version that wrote it, or write the table again with --overwrite"
        )
    return int(found)


def parse_color(text: str) -> tuple[int, int, int]:
    """Return the colour that `#rrggbb` stands for."""
    value = int(text.removeprefix("#"), 16)
    return value >> 16 & 255, value >> 8 & 255, value & 255


def order_of_version_1(names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a table of version 1 as version 2 has them, in order."""
    order = [name for name in names if name not in _PLACES]
    for name, before in _PLACES.items():
        order.insert(order.index(before) + 1, name)
    return tuple(order)


def read_version_1(
    read: Callable[[str], Column], stored: Sequence[str], name: str, class_names: Sequence[str]
) -> Column:
    """Return rows of a column of version 2 from a table of version 1.

    read    gives the same rows of a column that is `stored`.
    Raises TableError where there is no such column.
    """
    if name == "in_artefact" or (name == "is_nucleus" and name not in stored):
        return np.full(len(read("class")), name == "is_nucleus", np.bool_)
    if name not in ("class", "class_top"):
        return read(name)
    top = read("class")
    codes = top.codes if isinstance(top, Categorical) else np.zeros(len(top), np.int16)
    if name == "class_top":
        return Categorical(codes, tuple(class_names))
    abstained = np.asarray(read("abstained"), np.bool_) if "abstained" in stored else np.zeros(len(codes), np.bool_)
    return Categorical(decided(codes, abstained, len(class_names)), decision_words(class_names))
