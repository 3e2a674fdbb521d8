"""Nuclei for TissUUmaps: points in a CSV, and a project (.tmap) that lays them over the slide in their colours.

TissUUmaps shows a slide without the empty border outside its bounds, as QuPath does, so the points are relative to the
bounds. The project follows version 1.0 of TissUUmaps' schema; paths in it are relative to its folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cellslide.formats.csv_text import harmless
from cellslide.store.cell_table import CellTable
from cellslide.types import SlideInfo, hex_color

TMAP_NAME, POINTS_NAME, TISSUE_NAME = "cells.tmap", "cells.tissuumaps.csv", "tissue.geojson"
# Columns that only tie the table to its outlines.
LEFT_OUT = ("tile_index", "tile_row", "region", "instance_id")
DISC_UM = 6.0
# A marker of scale 1 covers one 225th of the slide's width, at any zoom.
MARKERS_PER_WIDTH = 225.0


def shown_points(block: pa.Table, table: CellTable) -> pa.Table:
    """Return a block of the table as TissUUmaps shows it: `x`, `y` relative to the bounds."""
    corner = table.slide.bounds or (0, 0)
    for name, low in zip(("x", "y"), corner, strict=False):
        place = block.column_names.index(name)
        block = block.set_column(place, name, pc.subtract(block.column(name), float(low)))
    return block.drop_columns([name for name in LEFT_OUT if name in block.column_names])


def project_text(table: CellTable, folder: Path) -> str:
    """Return the project that stands in `folder`: the slide, the points by class, and the tissue where it fits."""
    slide = table.slide
    source = os.path.relpath(slide.path.absolute(), folder.absolute()).replace(os.sep, "/")
    project = {
        "schemaVersion": "1.0",
        "filename": slide.slide_id,
        "mpp": slide.mpp_x,
        "layers": [{"name": slide.slide_id, "tileSource": f"{source}.dzi"}],
        "markerFiles": [_points(table)],
        "regionFiles": [_tissue()] if _tissue_fits(table, folder) else [],
    }
    return json.dumps(project, indent=1, ensure_ascii=False)


def _points(table: CellTable) -> dict[str, Any]:
    colors = dict(zip(map(harmless, table.decisions), table.decision_colors, strict=True))
    shades = {name: hex_color(color) for name, color in colors.items()}
    return {
        "title": "Nuclei",
        "name": "Nuclei",
        "uid": "nuclei",
        "path": POINTS_NAME,
        "autoLoad": True,
        "hideSettings": False,
        "expectedHeader": {
            "X": "x",
            "Y": "y",
            "gb_col": "class",
            "cb_gr_dict": json.dumps(shades, ensure_ascii=False),
            "shape_fixed": "disc",
            "scale_factor": _marker_scale(table.slide),
        },
        "expectedRadios": {
            "cb_gr": True,
            "cb_gr_dict": True,
            "cb_gr_key": False,
            "shape_gr": False,
            "shape_gr_rand": False,
            "shape_fixed": True,
        },
    }


def _marker_scale(slide: SlideInfo) -> float:
    width_px = slide.bounds[2] if slide.bounds else slide.width_px
    return round(MARKERS_PER_WIDTH * DISC_UM / (width_px * slide.mpp_x), 5)


def _tissue() -> dict[str, Any]:
    return {"title": "Tissue", "path": TISSUE_NAME, "autoLoad": False}


def _tissue_fits(table: CellTable, folder: Path) -> bool:
    """Return whether the tissue's file is there and relative to the bounds."""
    origin = table.run.config.get("output", {}).get("geojson_origin", "bounds")
    return (folder / TISSUE_NAME).is_file() and (origin == "bounds" or not table.slide.bounds)
