"""Which fields of a slide are no clean tissue, and why: out of focus, inked, folded, or keratin, blood and debris.

A field is one of KINDS or none. Regions are unions of whole fields, so they are coarse by design: what is counted
inside them is to be looked at, and what lies outside is not affected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
import zarr

from cellslide.plausibility.fields import edge_px
from cellslide.store.anndata_columns import write_array, write_values
from cellslide.store.cell_table import CellTable
from cellslide.types import FIELD_MEASURES, Bool, Fields, Float64, Plane, UInt8

# What each code stands for; 0 is none. The first that applies names a field.
KINDS = ("", "ink", "fold", "out of focus", "dense eosin")
INK, FOLD, BLUR, EOSIN = 1, 2, 3, 4
LEAST_TISSUE = 0.3
MOST_INK = 0.25
# Sharp fields of five scanners lie below 0.4, the same blurred by 1.5 µm above 0.53.
MOST_BLUR = 0.5
# A fold is two layers: twice as dense as the slide, and denser than one layer ever was.
FOLD_TIMES, FOLD_DENSITY = 2.0, 0.7
MOST_EOSIN, LEAST_NUCLEI = 0.6, 0.04


@dataclass(frozen=True, slots=True)
class Artefacts:
    """The fields of a slide and what is wrong with each: `kind` uint8 (N,), an index into KINDS."""

    fields: Fields
    kind: UInt8
    plane: Plane

    def contains(self, xy: Float64) -> Bool:
        """Return which level-0 points (N, 2) lie in a field that is no clean tissue."""
        inside = np.zeros(len(xy), np.bool_)
        odd = self.fields.place[self.kind > 0].astype(np.int64)
        if not len(odd) or not len(xy):
            return inside
        place = np.floor(self.plane.from_level0(xy) / edge_px(self.plane)).astype(np.int64)
        width = int(max(odd[:, 0].max(), place[:, 0].max())) + 1
        return np.asarray(np.isin(place[:, 1] * width + place[:, 0], odd[:, 1] * width + odd[:, 0]), np.bool_)

    def regions(self) -> dict[str, shapely.Geometry]:
        """Return the outline of all fields of each kind in level-0 pixels, kinds without any left out."""
        edge = edge_px(self.plane)
        found = {}
        for code, name in enumerate(KINDS):
            place = self.fields.place[self.kind == code].astype(np.float64)
            if code and len(place):
                low, high = (self.plane.to_level0((place + step) * edge) for step in (0, 1))
                found[name] = shapely.union_all(shapely.box(*low.T, *high.T))
        return found


def write_fields(group: zarr.Group, fields: Fields) -> None:
    """Keep fields in the table of their slide."""
    write_array(group, "uns/field_place", fields.place)
    write_array(group, "uns/field_values", fields.values)
    write_values(group, "uns/field_measures", FIELD_MEASURES)


def read_fields(table: CellTable) -> Fields:
    """Return the fields of a slide; none where its nuclei come from elsewhere, or from an earlier version."""
    if "uns/field_values" not in table.group:
        return Fields.of([])
    if tuple(map(str, table.small("uns/field_measures"))) != FIELD_MEASURES:
        return Fields.of([])
    place, values = table.small("uns/field_place"), table.small("uns/field_values")
    return Fields(place.astype(np.int32), values.astype(np.float32))


def find_artefacts(fields: Fields, plane: Plane) -> Artefacts:
    """Return what is wrong with each field; a fold is told by the density of the slide as a whole."""
    tissue = fields.column("tissue") >= LEAST_TISSUE
    density = fields.column("density")
    usual = float(np.median(density[tissue])) if tissue.any() else 0.0
    marked = np.maximum(fields.column("ink"), fields.column("dark")) > MOST_INK
    fold = tissue & (density > max(FOLD_TIMES * usual, FOLD_DENSITY))
    # A field too even to tell its focus (NaN) is not out of focus.
    blurred = tissue & (fields.column("blur") > MOST_BLUR)
    eosin = (fields.column("dense_eosin") > MOST_EOSIN) & (fields.column("nuclei") < LEAST_NUCLEI)
    kind = np.select([marked, fold, blurred, eosin], [INK, FOLD, BLUR, EOSIN], 0).astype(np.uint8)
    return Artefacts(fields, kind, plane)
