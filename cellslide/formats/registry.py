"""The formats that a finished table can be written in: one record each. Importing it loads no writer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cellslide.config import OutputConfig
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.store.cell_table import CellTable

Writer = Callable[["CellTable", Path, OutputConfig], Path]


@dataclass(frozen=True, slots=True)
class Format:
    """A format of the cell table.

    name       what `--format` calls it.
    files      glob of what lies in a slide's folder when it has been written.
    writer     writes a table into a folder, complete or not at all, and returns the path.
    shaped_by  fields of `OutputConfig` that change its content.
    kinds      kinds of nuclei that it can hold.
    """

    name: str
    files: str
    writer: Writer
    shaped_by: tuple[str, ...] = ()
    kinds: tuple[Literal["mask", "box", "point"], ...] = ("mask", "box", "point")

    def is_in(self, folder: Path) -> bool:
        """Return whether a slide's folder holds it."""
        return any(folder.glob(self.files))


def _zarr(table: CellTable, out_dir: Path, output: OutputConfig) -> Path:
    return table.path


def _geojson(table: CellTable, out_dir: Path, output: OutputConfig) -> Path:
    from cellslide.formats.geojson import write_geojson

    return write_geojson(table, out_dir, output.geojson_origin, output.profile)


def _parquet(table: CellTable, out_dir: Path, output: OutputConfig) -> Path:
    from cellslide.formats.arrow_files import write_parquet

    return write_parquet(table, out_dir, output.profile)


def _csv(table: CellTable, out_dir: Path, output: OutputConfig) -> Path:
    from cellslide.formats.arrow_files import write_csv

    return write_csv(table, out_dir, output.profile)


def _labels(table: CellTable, out_dir: Path, output: OutputConfig) -> Path:
    from cellslide.formats.ome_labels import write_labels

    return write_labels(table, out_dir)


def _h5ad(table: CellTable, out_dir: Path, output: OutputConfig) -> Path:
    from cellslide.formats.h5ad import FILE_NAME, write_h5ad
    from cellslide.store.atomic import beside

    with beside(out_dir / FILE_NAME) as scratch:
        write_h5ad(table, scratch)
    return out_dir / FILE_NAME


def _tissuumaps(table: CellTable, out_dir: Path, output: OutputConfig) -> Path:
    from cellslide.formats.arrow_files import write_tissuumaps

    return write_tissuumaps(table, out_dir, output.profile)


def _gpkg(table: CellTable, out_dir: Path, output: OutputConfig) -> Path:
    from cellslide.formats.geopackage import write_geopackage

    return write_geopackage(table, out_dir, output.profile)


FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Add a format; raises ValueError where the name is taken."""
    if format.name in FORMATS:
        raise ValueError(f"there is a format {format.name}")
    FORMATS[format.name] = format


# In the order in which they are written.
register(Format("zarr", "cells.zarr", _zarr))
register(Format("geojson", "cells.geojson.*", _geojson, ("geojson_origin", "profile")))
register(Format("parquet", "cells.parquet", _parquet, ("profile",)))
register(Format("csv", "cells.csv*", _csv, ("profile",)))
register(Format("labels", "labels.ome.zarr", _labels, kinds=("mask", "box")))
register(Format("h5ad", "cells.h5ad", _h5ad))
register(Format("tissuumaps", "cells.tmap", _tissuumaps, ("profile",)))
register(Format("gpkg", "cells.gpkg", _gpkg, ("profile",)))


def find_formats(names: Iterable[str]) -> list[Format]:
    """Return formats by name, each once; raises UsageError for a name that there is not."""
    wrong = [name for name in names if name not in FORMATS]
    if wrong:
        raise UsageError(f"--format {', '.join(wrong)}: must be one of {', '.join(FORMATS)}")
    return [FORMATS[name] for name in dict.fromkeys(names)]


def present_formats(folder: Path) -> list[Format]:
    """Return the formats that lie in a slide's folder."""
    return [format for format in FORMATS.values() if format.is_in(folder)]


def export_table(
    table: CellTable,
    out_dir: Path,
    formats: Sequence[str],
    origin: Literal["bounds", "level0"] = "bounds",
    profile: Literal["lean", "full"] = "lean",
) -> dict[str, Path]:
    """Write `formats` of a table into `out_dir`, each complete or not at all; returns their paths.

    `origin` is for GeoJSON; everything else is in level-0 pixels. `profile` "full" adds all probabilities, in GeoJSON
    the shape features too. "zarr" is the table itself.
    Raises UsageError for an unknown format, and for one that cannot hold the nuclei of this table.
    """
    output = OutputConfig(formats=tuple(formats), geojson_origin=origin, profile=profile)
    return {format.name: format.writer(table, out_dir, output) for format in find_formats(formats)}
