"""`cellslide export`: other formats from finished cell tables."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellslide.cli import grouped
from cellslide.cli.guarded import each, refuse
from cellslide.cli.options import FOLDER, config_option, format_option, geojson_options, verbosity_options
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.config import OutputConfig


@grouped.define(name="export")
@click.argument("folders", nargs=-1, required=True, type=FOLDER, metavar="OUTDIR_OR_SLIDEDIR...")
@format_option(default="geojson")
@geojson_options
@config_option
@verbosity_options
def command(folders: tuple[Path, ...], formats: tuple[str, ...], geojson_origin: str, profile: str) -> None:
    """Write other formats beside each cells.zarr found in the given folders or one level below.

    \b
    Examples:
      cellslide export out/slide --format csv
      cellslide export out --format parquet,labels,h5ad
      cellslide export out/slide --format tissuumaps
      cellslide export out/slide --format geojson --profile full --geojson-origin level0
    """
    from cellslide.config import OutputConfig

    config = OutputConfig(formats=formats, geojson_origin=geojson_origin, profile=profile)  # type: ignore[arg-type]
    failed = each(find_tables(folders), partial(_export_one, config=config))
    refuse(failed, "of the tables could not be exported")


def find_tables(folders: tuple[Path, ...]) -> list[Path]:
    """Return every `cells.zarr` that is one of `folders`, in one, or one level below, once each, in a fixed order.

    Raises UsageError naming the first folder that has none.
    """
    from cellslide.store.recovery import tables_below
    from cellslide.store.run_record import TABLE

    found: dict[Path, None] = {}
    for folder in folders:
        here = tables_below(folder)
        if not here:
            raise UsageError(f"{folder}: no {TABLE} here or one level below; run `cellslide segment -o {folder}` first")
        found.update(dict.fromkeys(here))
    return list(found)


def _export_one(path: Path, config: OutputConfig) -> None:
    from cellslide.formats.files import renew_files
    from cellslide.formats.registry import export_table
    from cellslide.store.cell_table import open_table
    from cellslide.store.lock import hold
    from cellslide.store.recovery import restore
    from cellslide.store.run_record import read_record, write_record

    with hold(path.parent):
        restore(path.parent)
        renew_files(path.parent)
        with open_table(path) as table:
            written = export_table(table, path.parent, config.formats, config.geojson_origin, config.profile)
        if (record := read_record(path.parent)) is not None:
            write_record(path.parent, record)  # it lists the files
    for target in written.values():
        click.echo(str(target))
