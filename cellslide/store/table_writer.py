"""Writing the cell table `cells.zarr`, block by block in bounded memory; `cell_table` describes and reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from cellslide.geometry.columns import slice_across
from cellslide.geometry.outlines import SHAPE_FEATURES, ring_features
from cellslide.store import run_record as record
from cellslide.store.anndata_columns import (
    CHUNK_ROWS,
    Categorical,
    Column,
    Columns,
    ColumnWriter,
    OpenNodes,
    TableError,
    read_obs,
    write_skeleton,
    write_word,
)
from cellslide.store.atomic import Staging
from cellslide.store.shapes import ShapeWriter, cell_rings, link_shapes, mark_store
from cellslide.store.table_schema import NOT_NUCLEUS, decision_words, write_schema
from cellslide.store.uuids import SeenPlaces, make_uuids, pack_places
from cellslide.types import Bool, Cells, ClassSpec, Float32, Float64, Int64, ModelKind, ModelSpec, RunRecord, SlideInfo

BLOCK_ROWS = CHUNK_ROWS
POINT_RADIUS_UM = 3.0
NUCLEUS = ClassSpec("Nucleus", (46, 204, 113))


def output_classes(spec: ModelSpec) -> tuple[ClassSpec, ...]:
    """Return the classes that files name: the model's, or the one class "Nucleus" for a model that does not type."""
    return spec.classes or (NUCLEUS,)


class CellTableWriter:
    """Writes cells, in their final order, to `path` through a temporary folder beside it.

    in_artefact  says which places (N, 2), level-0 pixels, are no clean tissue; without it none is.
    further  gives more columns of rows [start, stop), over those of the same name; `classes` are what they name.
    """

    def __init__(
        self,
        path: Path,
        slide: SlideInfo,
        spec: ModelSpec,
        further: Callable[[int, int], Columns] | None = None,
        classes: Sequence[ClassSpec] | None = None,
        in_artefact: Callable[[Float64], Bool] | None = None,
    ) -> None:
        self.slide, self.spec, self.further, self.in_artefact = slide, spec, further, in_artefact
        self.classes = output_classes(spec) if classes is None else tuple(classes)
        self.own_classes = output_classes(spec)
        self.mpp = (slide.mpp_x + slide.mpp_y) / 2
        self.staging = Staging(path)
        self.root = zarr.open_group(self.staging.folder, mode="w", zarr_format=3)
        self.group = self.root.require_group("tables/cells")
        write_skeleton(self.group, () if spec.kind == "point" else SHAPE_FEATURES)
        self.columns = ColumnWriter(self.group)
        self.shapes = ShapeWriter(self.staging.folder / "shapes" / "nuclei", POINT_RADIUS_UM / self.mpp)
        self.pending: list[Cells] = []
        self.n = self.n_own = self.n_rejected = 0

    def append(self, cells: Cells) -> None:
        """Add cells; raises TableError where they do not fit the model (kind, number of classes)."""
        if not len(cells):
            return
        self._check(cells)
        self.pending.append(cells)
        if sum(map(len, self.pending)) >= BLOCK_ROWS:
            self._write(keep_rest=True)

    def flush(self) -> None:
        """Write the cells that wait; nothing may be appended after it."""
        if self.pending:
            self._write(keep_rest=False)
        if self.n == 0:
            self.columns.append(self._block(_no_cells(len(self.spec.classes))))

    def _write(self, keep_rest: bool) -> None:
        # Whole blocks only: however the cells come, the files are the same.
        n = sum(map(len, self.pending))
        stop = n // BLOCK_ROWS * BLOCK_ROWS if keep_rest else n
        for first in range(0, stop, BLOCK_ROWS):
            block = slice_across(self.pending, first, min(first + BLOCK_ROWS, stop))
            self.columns.append(self._block(block))
            self.shapes.append(block, self.mpp)
            self.n += len(block)
        self.pending = [slice_across(self.pending, stop, n)] if stop < n else []

    def _check(self, cells: Cells) -> None:
        k = 0 if cells.class_prob is None else cells.class_prob.shape[1]
        if k != len(self.spec.classes):
            known = len(self.spec.classes)
            raise TableError(f"cells carry {k} class probabilities, {self.spec.name} has {known} classes")
        if (cell_rings(cells) is None) != (self.spec.kind == "point"):
            raise TableError(f"cells of {self.spec.name} ({self.spec.kind}) do not carry that kind of outline")

    def _block(self, cells: Cells) -> Columns:
        n = len(cells)
        ids = np.arange(self.n, self.n + n, dtype=np.int64)
        obsm: dict[str, NDArray[Any]] = {"spatial": np.asarray(cells.centroid_xy, np.float64)}
        if cells.class_prob is not None and self.spec.classes:
            obsm["prob"] = cells.class_prob.astype(np.float32)
        if cells.embedding is not None:
            obsm["embedding"] = cells.embedding
        more = Columns() if self.further is None else self.further(self.n, self.n + n)
        own = self._obs(cells, ids)
        self.n_own = len(own)
        obs = {"_index": ids.astype(np.str_), **own, **more.obs}
        return Columns(obs, {**obsm, **more.obsm}, self._features(cells))

    def _obs(self, cells: Cells, ids: Int64) -> dict[str, Column]:
        index, prob = _top_class(cells)
        names = tuple(c.name for c in self.own_classes)
        is_nucleus = index != (names.index(NOT_NUCLEUS) if NOT_NUCLEUS in names else len(names))
        self.n_rejected += int((~is_nucleus).sum())
        return {
            "cell_id": ids,
            "x": np.ascontiguousarray(cells.centroid_xy[:, 0], np.float64),
            "y": np.ascontiguousarray(cells.centroid_xy[:, 1], np.float64),
            "area_um2": cells.area_um2.astype(np.float32),
            "score": cells.score.astype(np.float32),
            "class": Categorical(index, decision_words(names)),
            "class_top": Categorical(index, names),
            "class_prob": prob,
            "is_nucleus": is_nucleus,
            "in_artefact": self._in_artefact(cells),
            "tile_index": cells.tile_index.astype(np.int32),
            "tile_row": cells.row.astype(np.int32),
            "region": Categorical(np.zeros(len(cells), np.int8), ("nuclei",)),
            "instance_id": ids,
        }

    def _in_artefact(self, cells: Cells) -> Bool:
        if self.in_artefact is None:
            return np.zeros(len(cells), np.bool_)
        return self.in_artefact(np.asarray(cells.centroid_xy, np.float64))

    def _features(self, cells: Cells) -> Float32:
        rings = cell_rings(cells)
        if rings is None or self.spec.kind == "point":
            return np.empty((len(cells), 0), np.float32)
        return ring_features(*rings, self.slide.mpp_x, self.slide.mpp_y)

    def close(self, run: RunRecord, given: Mapping[str, Column] | None = None) -> None:
        """Finish the table and rename it into place, over an older one.

        `given` are further columns of all rows; a `uuid` among them goes before the one made here, save where "".
        """
        given = dict(given or {})
        if not self.columns.n or self.pending:
            self.flush()
        has_shapes = self.shapes.close()
        # Where it stands in a table that gains the further columns later.
        self.columns.order.insert(self.n_own, "uuid")
        self.columns.close()
        key = f"{run.slide.get('sha256_head') or self.slide.slide_id}/{self.spec.weights_sha256}"
        _write_uuids(self.group, self.n, key, given.pop("uuid", None))
        _write_columns(self.group, given)
        _write_uns(self.group, self.slide, self.spec.kind, self.classes, run)
        mark_store(self.root, has_shapes, (self.slide.mpp_x, self.slide.mpp_y))
        link_shapes(self.group, has_shapes)
        self.staging.publish()

    def abort(self) -> None:
        """Remove what was written; the table that was there before stays."""
        self.shapes.close()
        self.staging.abort()


def _no_cells(n_classes: int) -> Cells:
    none, whole = np.empty(0, np.float32), np.empty(0, np.int32)
    prob = np.empty((0, n_classes), np.float32) if n_classes else None
    no_ring = np.zeros(1, np.int64)
    return Cells(np.empty((0, 2)), whole, whole, none, none, prob, None, np.empty((0, 2)), no_ring)


def _top_class(cells: Cells) -> tuple[NDArray[np.int16], Float32]:
    if cells.class_prob is None or cells.class_prob.shape[1] == 0:
        return np.zeros(len(cells), np.int16), np.full(len(cells), np.nan, np.float32)
    return cells.class_prob.argmax(1).astype(np.int16), cells.class_prob.max(1, initial=0).astype(np.float32)


def _write_uns(
    group: zarr.Group, slide: SlideInfo, kind: ModelKind, classes: Sequence[ClassSpec], run: RunRecord
) -> None:
    write_schema(group, classes)
    write_word(group, "uns/kind", kind)
    write_word(group, "uns/slide", json.dumps(asdict(slide), default=str))
    write_word(group, "uns/run", json.dumps(record.to_dict(run)))


def _write_columns(group: zarr.Group, given: Mapping[str, Column]) -> None:
    if given:
        writer = ColumnWriter(group)
        writer.append(Columns(given))
        writer.close()


def _write_uuids(group: zarr.Group, n: int, key: str, given: Column | None = None) -> None:
    """Add the column `uuid`: the one given, else a version 8 UUID of `key` and the centroid to 0.01 px.

    Equal places are counted on.
    """
    writer, nodes = ColumnWriter(group), OpenNodes()
    blocks = range(0, max(n, 1), BLOCK_ROWS)
    seen = SeenPlaces(np.asarray(read_obs(group, "y", first, first + BLOCK_ROWS, nodes)) for first in blocks)
    for first in blocks:
        x, y = (np.asarray(read_obs(group, name, first, first + BLOCK_ROWS, nodes)) for name in ("x", "y"))
        place = pack_places(x, y)
        uuid: NDArray[Any] = make_uuids(key, place, seen.repeats(place))
        if isinstance(given, np.ndarray):
            source = given[first : first + len(uuid)]
            uuid = np.where(source != "", source, uuid.astype(str).astype(object))
        writer.append(Columns({"uuid": uuid}))
    writer.close()
