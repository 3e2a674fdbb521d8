"""Whole slides as data sets: where their pixels and nuclei lie, and the nuclei with their labels, read in blocks.

A list (.csv) names them, a slide a row, or a folder that holds their tables. Frame: level-0 pixels, (x, y).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import MANIFEST, Sample, read_rows
from cellslide.evaluate.layouts.registry import open_dataset
from cellslide.slides.identity import is_slide
from cellslide.slides.reopen import reopen, slide_path
from cellslide.store.anndata_columns import Categorical
from cellslide.store.cell_table import BLOCK_ROWS, CellTable, open_table
from cellslide.store.foreign_files import is_plain
from cellslide.store.recovery import tables_below
from cellslide.train.recipe import LabelConfig, ValConfig
from cellslide.types import Bool, Float64, Int64, SlideInfo

Part = Literal["whole", "outside", "inside"]


@dataclass(frozen=True, slots=True)
class SlideSample:
    """A slide and the table of its nuclei, with what the list says of it.

    labels  the slide's own table `cell_id,label`, or None.
    part    which nuclei: all, or those outside of the middle that validates, or inside of it (`ValConfig.area`).
    """

    info: SlideInfo
    table: Path
    dataset: str
    patient: str
    organ: str = ""
    split: str = "train"
    labels: Path | None = None
    part: Part = "whole"

    @property
    def stem(self) -> str:
        """Id of the slide."""
        return self.info.slide_id


AnySample = Sample | SlideSample


def set_name(path: Path) -> str:
    """Return the name of a source of samples: that of its folder, or of its list without the suffix."""
    path = path.resolve()
    return path.stem if path.suffix == ".csv" else path.name


def read_samples(path: Path) -> Sequence[AnySample]:
    """Return the images of a data set, ours or as its authors distribute it, or the slides of a list or of tables.

    Raises UsageError for what is none of them, or a slide that is gone.
    """
    if path.suffix == ".csv":
        rows = list(enumerate(read_rows(path, ("cells",)), 2))
        return [_listed(path, row, f"{path} line {line}") for line, row in rows]
    if not (path / MANIFEST).is_file() and (tables := tables_below(path)):
        return [_slide_sample(table, set_name(path), {}, path, str(path)) for table in tables]
    return open_dataset(path).samples


def _listed(path: Path, row: Mapping[str, str], where: str) -> SlideSample:
    tables = tables_below(path.parent / row["cells"])
    if len(tables) != 1:
        raise UsageError(f"{where}: cells {row['cells']!r} must be the folder of one slide, with cells.zarr in it")
    return _slide_sample(tables[0], set_name(path), row, path.parent, where)


def _slide_sample(path: Path, dataset: str, row: Mapping[str, str], root: Path, where: str) -> SlideSample:
    with open_table(path) as table:
        at = root / row["slide"] if row.get("slide") else slide_path(table)
        if not is_plain(at):
            raise UsageError(f"{where}: the slide {at} is not there; name it in the column slide of a .csv list")
        known = table.run.slide.get("sha256_head")
        if known is not None and not is_slide(at, known):
            raise UsageError(
                f"{where}: {at} is not the slide of {path}; name that one in the column slide of a .csv list"
            )
        with reopen(table, at) as slide:
            info = slide.info
    return SlideSample(
        info, path, dataset, row.get("patient") or info.slide_id, row.get("organ", ""), row.get("split") or "train",
        root / row["labels"] if row.get("labels") else None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SlideNuclei:
    """Nuclei of a slide: row int64 (N,) of the table, xy float64 (N, 2), label int64 (N,), -1 where not known."""

    row: Int64
    xy: Float64
    label: Int64


def read_nuclei(
    sample: SlideSample, config: LabelConfig, classes: Sequence[str], renamed: Mapping[str, str]
) -> SlideNuclei:
    """Read the nuclei of a slide, those that were rejected left out; labels index `classes`.

    renamed  what the recipe calls the labels that it names otherwise.
    Raises UsageError where the table has no labels, or a file gives none to its nuclei.
    """
    with open_table(sample.table) as table:
        label_of = _labels_of(sample, table, config, classes, renamed)
        blocks = [_block(table, start, label_of, config) for start in range(0, max(len(table), 1), BLOCK_ROWS)]
    found = SlideNuclei(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))
    if label_of.given is not None and not (found.label >= 0).any():
        raise UsageError(f"{sample.labels or config.file}: gives no nucleus of {sample.table} a class of the recipe")
    return found


def _block(table: CellTable, start: int, label_of: _Labels, config: LabelConfig) -> tuple[Int64, Float64, Int64]:
    stop = min(start + BLOCK_ROWS, len(table))
    x, y, real = (table.vector(name, start, stop) for name in ("x", "y", "is_nucleus"))
    label = label_of.read(table, start, stop)
    if config.matched and "matched_um" in table.columns:
        label[np.isnan(table.vector("matched_um", start, stop))] = -1
    kept = np.flatnonzero(real)
    return kept + start, np.stack([x, y], axis=1).astype(np.float64)[kept], label[kept]


@dataclass(frozen=True, slots=True)
class _Labels:
    """Where labels come from: by id of a nucleus, or a column; `index` is the class of each word."""

    config: LabelConfig
    index: Mapping[str, int]
    column: str | None
    given: Mapping[str, int] | None = None

    def read(self, table: CellTable, start: int, stop: int) -> Int64:
        if self.column is None:
            return np.full(stop - start, -1, np.int64)
        if self.given is not None:
            ids = table.vector(self.column, start, stop)
            return np.array([self.given.get(str(one), -1) for one in ids], np.int64)
        column = table.column(self.column, start, stop)
        if isinstance(column, Categorical):
            words = np.array([*(self.index.get(name, -1) for name in column.names), -1], np.int64)
            label = words[column.codes]
        else:
            label = np.array([self.index.get(str(name), -1) for name in column], np.int64)
        if self.column == "label":
            label[~self._sure(table, start, stop)] = -1
        return label

    def _sure(self, table: CellTable, start: int, stop: int) -> Bool:
        sure = np.ones(stop - start, np.bool_)
        if self.config.kept and "label_kept" in table.columns:
            sure &= np.asarray(table.vector("label_kept", start, stop), np.bool_)
        if "label_confidence" in table.columns:
            sure &= np.nan_to_num(table.vector("label_confidence", start, stop)) >= self.config.min_confidence
        return sure


def _labels_of(
    sample: SlideSample, table: CellTable, config: LabelConfig, classes: Sequence[str], renamed: Mapping[str, str]
) -> _Labels:
    words = {**{name: name for name in classes}, **renamed}
    index = {word: classes.index(name) for word, name in words.items() if name in classes}
    path = sample.labels or (Path(config.file) if config.file else None)
    if not classes:
        return _Labels(config, index, None)
    if path is None:
        if config.column not in table.columns:
            mend = "run `cellslide xenium label`, give --labels, or set labels.column in --recipe"
            raise UsageError(f"{table.path}: no column {config.column}; {mend}")
        return _Labels(config, index, config.column)
    column = "xenium_cell" if "xenium_cell" in table.columns else "cell_id"
    rows = read_rows(path, ("cell_id", "label"))
    given = {r["cell_id"]: index.get(r["label"], -1) for r in rows if r.get("slide", "") in ("", sample.stem)}
    return _Labels(config, index, column, given)


def check_labels(samples: Iterable[AnySample], config: LabelConfig) -> None:
    """Raise UsageError where one file of labels, which names no slides, would be read for several."""
    tables = {s.table for s in samples if isinstance(s, SlideSample) and s.labels is None}
    if config.file is None or len(tables) < 2:
        return
    if any("slide" not in row for row in read_rows(Path(config.file), ("cell_id", "label"))[:1]):
        raise UsageError(f"{config.file}: {len(tables)} slides are to take their labels from it; add a column slide")


def rows_of_part(sample: SlideSample, xy: Float64, val: ValConfig, sight_um: float) -> Bool:
    """Return which nuclei (N,) are of the sample's part of its slide; all nuclei `xy` (N, 2) say where its middle is.

    sight_um  width of what the network sees of a nucleus, the guard band's default. Raises UsageError where half of it
              is wider than the band: both sides would see the other's nuclei.
    """
    if sample.part == "whole" or not len(xy):
        return np.ones(len(xy), np.bool_)
    guard = sight_um if val.guard_um is None else val.guard_um
    if guard < sight_um / 2:
        raise UsageError(f"recipe datasets.{sample.dataset}.val.guard_um: {guard:g} must be {sight_um / 2:g} or more")
    um = xy * (sample.info.mpp_x, sample.info.mpp_y)
    low, high = um.min(axis=0), um.max(axis=0)
    beyond = (np.abs(um - (low + high) / 2) - (high - low) / 2 * np.sqrt(val.area)).max(axis=1)
    return np.asarray(beyond <= 0 if sample.part == "inside" else beyond >= guard, np.bool_)
