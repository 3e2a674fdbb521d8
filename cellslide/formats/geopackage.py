"""GeoPackage of a finished table, for QGIS, R and PostGIS: one layer, streamed by blocks."""

from __future__ import annotations

import warnings
from itertools import chain
from pathlib import Path

import pyarrow as pa

from cellslide.formats.arrow_files import arrow_blocks
from cellslide.formats.geojson import Profile
from cellslide.store.atomic import beside
from cellslide.store.cell_table import CellTable

FILE_NAME, LAYER = "cells.gpkg", "nuclei"


def write_geopackage(table: CellTable, out_dir: Path, profile: Profile = "lean") -> Path:
    """Write `cells.gpkg`: the outlines (or points) and every column, level-0 pixels, y downwards, no map projection."""
    import pyogrio

    blocks = arrow_blocks(table, geometry=True, text=True, profile=profile)
    first = next(blocks)
    batches = (batch for block in chain([first], blocks) for batch in block.to_batches())
    path = out_dir / FILE_NAME
    with beside(path) as scratch, warnings.catch_warnings():
        # Pixels have no map projection, and the name ends as it should once the file is complete.
        warnings.filterwarnings("ignore", "'crs' was not provided", UserWarning)
        warnings.filterwarnings("ignore", "The filename extension should be 'gpkg'", RuntimeWarning)
        pyogrio.write_arrow(
            pa.RecordBatchReader.from_batches(first.schema, batches), scratch, layer=LAYER, driver="GPKG",
            geometry_name="geometry", geometry_type="Point" if table.kind == "point" else "Polygon",
        )  # fmt: skip
    return path
