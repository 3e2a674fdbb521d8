"""A project for TissUUmaps: valid by its own schema, points where it shows the slide, in the colours of the classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from cellslide.formats import arrow_files
from cellslide.formats.csv_text import as_written
from cellslide.formats.registry import export_table
from cellslide.store.cell_table import Categorical, Columns, TableExtender, open_table
from cellslide.store.table_writer import CellTableWriter
from cellslide.types import ClassSpec
from tests.support.random_cells import (
    BOUNDS,
    CLASSES,
    as_kind,
    ellipses,
    model_spec,
    run_record,
    slide_info,
    write_table,
)


def project_of(path: Path) -> dict[str, Any]:
    """Return the project, after TissUUmaps' own schema has read it."""
    schema = pytest.importorskip("tissuumaps_schema.v01", reason="extra `test` is not installed")
    project: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    schema.Project.model_validate(project)
    return project


@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("n", [0, 130])
def test_points_lie_where_the_slide_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, bounds: Any
) -> None:
    monkeypatch.setattr(arrow_files, "BLOCK_ROWS", 50)
    cells = ellipses(n)
    table = write_table(tmp_path, cells, slide=slide_info(bounds))
    path = export_table(table, tmp_path, ("tissuumaps",))["tissuumaps"]
    points = project_of(path)["markerFiles"][0]
    frame = pandas.read_csv(tmp_path / points["path"], float_precision="round_trip")
    columns = points["expectedHeader"]
    dx, dy = bounds[:2] if bounds else (0, 0)
    assert np.array_equal(frame[columns["X"]], cells.centroid_xy[:, 0] - dx)
    assert np.array_equal(frame[columns["Y"]], cells.centroid_xy[:, 1] - dy)
    assert columns["gb_col"] in frame and "tile_row" not in frame and "uuid" in frame


def test_each_class_has_its_colour(tmp_path: Path) -> None:
    classes = (*CLASSES, ClassSpec("=1+1", (1, 2, 3)))
    table = write_table(tmp_path, ellipses(60, classes=4), model_spec(classes=classes))
    points = project_of(export_table(table, tmp_path, ("tissuumaps",))["tissuumaps"])["markerFiles"][0]
    colors = json.loads(points["expectedHeader"]["cb_gr_dict"])
    seen = set(pandas.read_csv(tmp_path / points["path"])["class"])
    assert seen == set(colors) - {"abstained"}
    assert {as_written(name) for name in colors} == {*(c.name for c in classes), "abstained"}
    assert colors["Tumor"] == "#c80000" and points["expectedRadios"]["cb_gr_dict"]


def test_cells_that_are_too_unsure_are_grey(tmp_path: Path) -> None:
    table = write_table(tmp_path, ellipses(4))
    extender = TableExtender(table)
    abstained = np.array([True, False, False, True])
    codes = np.where(abstained, len(table.class_names), table.codes("class"))
    extender.append(Columns({"abstained": abstained, "class": Categorical(codes, table.decisions)}))
    extender.close(run_record())
    path = export_table(open_table(tmp_path / "cells.zarr"), tmp_path, ("tissuumaps",))["tissuumaps"]
    points = project_of(path)["markerFiles"][0]
    frame = pandas.read_csv(tmp_path / points["path"])
    shown = frame[points["expectedHeader"]["gb_col"]]
    assert (shown == "abstained").tolist() == abstained.tolist() and (shown == frame["class"]).all()
    assert json.loads(points["expectedHeader"]["cb_gr_dict"])["abstained"] == "#808080"


def test_paths_are_relative_to_the_project(tmp_path: Path) -> None:
    slide = replace(slide_info(), path=tmp_path / "slides" / "s1.svs")
    table = write_table(tmp_path / "out" / "s1", ellipses(3), slide=slide)
    project = project_of(export_table(table, tmp_path / "out" / "s1", ("tissuumaps",))["tissuumaps"])
    assert project["layers"] == [{"name": "s1", "tileSource": "../../slides/s1.svs.dzi"}]
    assert project["mpp"] == 0.25 and project["regionFiles"] == []
    # The bounds are 3000 px, 750 µm wide: a disc of 6 µm is 1.8 markers of a 225th of that.
    assert project["markerFiles"][0]["expectedHeader"]["scale_factor"] == 1.8


@pytest.mark.parametrize(("origin", "bounds", "fits"), [("bounds", BOUNDS, 1), ("level0", BOUNDS, 0), ("level0", 0, 1)])
def test_tissue_is_shown_where_it_has_the_same_corner(tmp_path: Path, origin: str, bounds: Any, fits: int) -> None:
    (tmp_path / "tissue.geojson").write_text("{}")
    writer = CellTableWriter(tmp_path / "cells.zarr", slide_info(bounds or None), model_spec())
    writer.append(ellipses(3))
    writer.close(replace(run_record(), config={"output": {"geojson_origin": origin}}))
    with open_table(tmp_path / "cells.zarr") as table:
        project = project_of(export_table(table, tmp_path, ("tissuumaps",))["tissuumaps"])
    assert [region["path"] for region in project["regionFiles"]] == ["tissue.geojson"] * fits


def test_all_probabilities_and_points_without_outline(tmp_path: Path) -> None:
    table = write_table(tmp_path, as_kind(ellipses(5), "point"), model_spec("point"))
    export_table(table, tmp_path, ("tissuumaps",))
    assert "p: Tumor" not in pandas.read_csv(tmp_path / "cells.tissuumaps.csv")
    export_table(table, tmp_path, ("tissuumaps",), profile="full")
    wide = [c for c in pandas.read_csv(tmp_path / "cells.tissuumaps.csv") if c.endswith(": Tumor")]
    assert len(wide) == 1
