"""One slide that is looked at: its table, its pixels, its rule, and what the page asks of them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.classify.decision import GATE_RULES, prior_ratio
from cellslide.errors import UsageError, short
from cellslide.inference.search import TISSUE_FILE
from cellslide.report.images import color_of
from cellslide.report.regions import read_searched
from cellslide.slides.regions import origin_offset
from cellslide.slides.reopen import reopen_or_why
from cellslide.store.cell_table import Categorical, CellTable, open_table
from cellslide.store.run_record import TABLE
from cellslide.store.table_schema import NOT_NUCLEUS
from cellslide.types import Float64, hex_color
from cellslide.view.arrays import pack
from cellslide.view.cells import Box, CellIndex, density, relative
from cellslide.view.find import find, outlines, places, ranked
from cellslide.view.folders import check_links, is_inside
from cellslide.view.pixels import TILE_PX, CropField, TilePictures, as_png, read, top_level
from cellslide.view.rule import DecisionRule, Decisions, StoredRule

PLAIN_FIELD_UM, PLAIN_FIELD_PX = 64.0, 256
MOST_BINS = 160
PATH_COLUMNS = ("prob_local", "prob_global", "gate")


class ViewedSlide:
    """An open slide folder; its methods are called from several threads."""

    def __init__(self, root: Path, folder: Path, moved_to: Path | None = None) -> None:
        """Raises UsageError for a table that links lead out of, TableError for one that is not whole."""
        check_links(root, folder / TABLE)
        self.root, self.folder = root, folder
        self.table = open_table(folder / TABLE)
        self.slide, self.trouble = reopen_or_why(self.table, moved_to)
        self.index = CellIndex(self.table)
        self.stored = StoredRule.of(self.table)
        self.decisions = Decisions(self.table, self.stored)
        self.tiles = TilePictures(self.table.slide, self.slide)
        self.rejects = table_rejects(self.table)
        self.fields = {field.name: field for field in _fields(self.table, self.stored)}

    def close(self) -> None:
        """Close the files."""
        self.table.close()
        if self.slide is not None:
            self.slide.close()

    def facts(self) -> dict[str, Any]:
        """Return what the page must know before it draws anything."""
        info, table = self.table.slide, self.table
        pairs = zip(table.class_names, table.colors, strict=True)
        pages = (page.name for page in sorted(self.folder.glob("*.html")) if is_inside(self.root, page))
        return {
            "slide": info.slide_id,
            "folder": shlex.quote(str(self.folder)),
            "width": info.width_px,
            "height": info.height_px,
            "mpp": self.index.mpp,
            "origin": list(origin_offset(info, "bounds")),
            "tile": TILE_PX,
            "top": top_level(info),
            "trouble": self.trouble or "",
            "kind": table.kind,
            "n": int(np.asarray(table.vector("is_nucleus"), np.bool_).sum()),
            "rejects": self.rejects,
            "classes": [
                {"name": name, "color": hex_color(color), "plain": hex_color(color_of(k, len(table.class_names)))}
                for k, (name, color) in enumerate(pairs)
            ],
            "rule": self._rule(),
            "named": bool(np.isfinite(table.vector("class_prob", 0, 1000)).any()),
            "links": list(pages),
            "links_below": self.folder != self.root,
            "version": table.run.cellslide_version,
            "weights": [weights.id for weights in table.run.weights],
        }

    def _rule(self) -> dict[str, Any]:
        """Return the stored rule as the page's own rule takes it."""
        stored, calibration = self.stored, self.stored.calibration
        tau, gamma, prior = stored.decision.tau, stored.decision.gamma, stored.decision.prior
        return {
            "paths": stored.has_paths, "gates": [g for g in GATE_RULES if g != "safe" or stored.can_be_safe],
            "gate": stored.decision.gate, "tau": tau, "gamma": gamma,
            "calibrated_tau": calibration.tau, "calibrated_gamma": calibration.gamma,
            "accepts": calibration.safe_accepts, "thresholds": stored.thresholds, "abstain": stored.abstain,
            "temperatures": [
                calibration.temperature_mix, calibration.temperature_local, calibration.temperature_global,
            ],
            "reliability_local": calibration.reliability_local, "reliability_global": calibration.reliability_global,
            "prior_ratio": None if prior is None else prior_ratio(prior, calibration).tolist(),
        }  # fmt: skip

    def cells(self, box: Box, screen_scale: float, policy: DecisionRule) -> bytes:
        """Return the cells of a box, for the page to decide and draw: as outlines, points or counts on a grid."""
        rows = self.index.rows_in(box)
        form = self.index.form(len(rows), screen_scale)
        if form == "density":
            return self._density(box, screen_scale, policy)
        xy = np.stack([self.index.x[rows], self.index.y[rows]], axis=1)
        arrays: dict[str, NDArray[Any]] = {"row": rows.astype(np.int32), "xy": relative(xy, box)}
        arrays["score"] = self.index.score[rows]
        names = PATH_COLUMNS if self.stored.has_paths else ("class_top", "class_prob")
        for name in ("class", *names):
            column = self.index.gather(name, rows)
            arrays[name] = column.astype(np.int16 if name in ("class", "class_top") else np.float32)
        if form == "outlines" and (rings := self.index.rings(rows)) is not None:
            arrays["ring"], arrays["start"] = relative(rings[0], box), rings[1].astype(np.int32)
        return pack(arrays, {"form": form, "n": len(rows), "box": list(box)})

    def _density(self, box: Box, screen_scale: float, policy: DecisionRule) -> bytes:
        rows = self.index.rows_in(box, policy.score)
        bin_px = max(10 / screen_scale, max(box[2] - box[0], box[3] - box[1]) / MOST_BINS)
        marks, n_marks = self.decisions.marks(policy, rows), len(self.table.class_names) + 2
        x, y = self.index.x[rows], self.index.y[rows]
        counts, n_rows, n_cols = density(x, y, marks, n_marks, box, bin_px)
        n = int((marks != self.rejects).sum())
        facts = {"form": "density", "n": n, "box": list(box), "bin": bin_px, "rows": n_rows, "cols": n_cols}
        return pack({"counts": counts}, facts)

    def counts(self, policy: DecisionRule) -> dict[str, Any]:
        """Return how many cells of the whole slide are of each class, abstain, have no class, or score too low."""
        marks = self.decisions.marks(policy)[self.index.scored(policy.score)]
        counts = np.bincount(marks, minlength=len(self.table.class_names) + 2).tolist()
        return {"classes": counts[:-2], "abstained": counts[-2], "untyped": counts[-1]}

    def ranked(self, by: str) -> dict[str, Any]:
        """Return the nuclei of the whole slide that are oddest in one way, with their places."""
        return {"cells": places(self.table, ranked(self.table, by))}

    def find(self, word: str) -> dict[str, Any]:
        """Return the nucleus of an id, with its place; raises UsageError where there is none."""
        row = find(self.table, word)
        if row is None:
            raise UsageError(f"no nucleus has the id {short(word)}")
        return {"cells": places(self.table, np.array([row], np.int64))}

    def regions(self) -> dict[str, Any]:
        """Return the outlines of what was searched and of what is no clean tissue."""
        if not is_inside(self.root, self.folder / TISSUE_FILE):
            return {"tissue": [], "artefacts": []}
        return outlines(read_searched(self.folder, self.table.slide, self.table.run))

    def cell(self, row: int) -> dict[str, Any] | None:
        """Return what is known of one cell, or None where there is no such row."""
        if not 0 <= row < len(self.table):
            return None
        table = self.table
        named = {name: _value(table.column(name, row, row + 1)) for name in table.columns if name != "region"}
        matrices = ("prob", "prob_local", "prob_global")
        probs = {name: _finite(table.matrix(name, row, row + 1)[0]) for name in matrices if name in table.matrices}
        shape = _finite(table.matrix("X", row, row + 1)[0]) if table.features else []
        xy = self._place(row)
        rings = self.index.rings(np.array([row], np.int64))
        outline = np.empty((0, 2)) if rings is None else rings[0]
        crops = [self._crop(field, xy, outline) for field in self.fields.values()] if self.slide else []
        features = dict(zip(table.features, shape, strict=True))
        return {"row": row, "obs": named, "probs": probs, "features": features, "crops": crops}

    def _place(self, row: int) -> Float64:
        return np.array([self.table.vector(name, row, row + 1)[0] for name in ("x", "y")], np.float64)

    def _crop(self, field: CropField, xy: Float64, outline: Float64) -> dict[str, Any]:
        shares = field.place(self.table.slide, xy, outline).round(4).tolist()
        return {"name": field.name, "um": field.field_px * field.mpp, "outline": shares}

    def crop(self, row: int, name: str) -> bytes | None:
        """Return a field around a cell as PNG, or None where there is no such cell, field or slide."""
        field = self.fields.get(name)
        if field is None or self.slide is None or not 0 <= row < len(self.table):
            return None
        return as_png(read(self.slide, *field.box(self.table.slide, self._place(row))))


def table_rejects(table: CellTable) -> int:
    """Return the place of the class of objects that are no nucleus, -1 where the classifier knows none."""
    return table.class_names.index(NOT_NUCLEUS) if NOT_NUCLEUS in table.class_names else -1


def _fields(table: CellTable, stored: StoredRule) -> Iterator[CropField]:
    if not stored.has_paths:
        yield CropField("nucleus", PLAIN_FIELD_UM / PLAIN_FIELD_PX, PLAIN_FIELD_PX)
        return
    spec = table.run.config["classify"]["spec"]
    for name in ("local", "context"):
        yield CropField(name, float(spec["mpp"]), int(spec[name]["field_px"]))


def _value(column: Any) -> Any:
    """Return the one value of a column of one row, as JSON knows it; None where it is missing."""
    if isinstance(column, Categorical):
        code = int(column.codes[0])
        return column.names[code] if code >= 0 else None
    value = column[0].item() if isinstance(column[0], np.generic) else column[0]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(values: NDArray[Any]) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


@dataclass(slots=True)
class _Open:
    scene: ViewedSlide
    stamp: tuple[int, int]
    users: int = 0


class ViewedSlides:
    """The slides' scenes, opened when they are asked for; those least used are closed, never while in use."""

    def __init__(self, root: Path, folders: Mapping[str, Path], moved_to: Path | None = None, most: int = 4) -> None:
        self.root, self.folders, self.moved_to, self.most = root, folders, moved_to, most
        self._open: dict[str, _Open] = {}
        self._lock = Lock()
        # Opening a scene may take seconds, for which only those wait who want the same one.
        self._turns = {name: Lock() for name in folders}

    @contextmanager
    def use(self, name: str) -> Iterator[ViewedSlide]:
        """Give the scene of a slide of `folders`; one whose table was written anew is opened again."""
        with self._turns[name]:
            stamp = _stamp(self.folders[name])
            entry = self._taken(name, stamp) or self._opened(name, stamp)
        try:
            yield entry.scene
        finally:
            with self._lock:
                entry.users -= 1
                if not entry.users and self._open.get(name) is not entry:
                    entry.scene.close()

    def _taken(self, name: str, stamp: tuple[int, int]) -> _Open | None:
        """Return a scene that is open, with one user more; None, and close it, where its table is another by now."""
        with self._lock:
            entry = self._open.pop(name, None)
            if entry is None:
                return None
            if entry.stamp != stamp:
                _close_idle(entry)
                return None
            self._open[name] = entry
            entry.users += 1
            return entry

    def _opened(self, name: str, stamp: tuple[int, int]) -> _Open:
        entry = _Open(ViewedSlide(self.root, self.folders[name], self.moved_to), stamp, users=1)
        with self._lock:
            self._open[name] = entry
            while len(self._open) > self.most:
                _close_idle(self._open.pop(next(iter(self._open))))
        return entry

    def close(self) -> None:
        """Close what nobody uses; the rest closes when it is given back."""
        with self._lock:
            for entry in self._open.values():
                _close_idle(entry)
            self._open.clear()


def _close_idle(entry: _Open) -> None:
    if not entry.users:
        entry.scene.close()


def _stamp(folder: Path) -> tuple[int, int]:
    try:
        state = (folder / TABLE / "zarr.json").stat()
    except FileNotFoundError as error:
        raise UsageError(f"{folder}: its {TABLE} is gone") from error
    return state.st_ino, state.st_mtime_ns
