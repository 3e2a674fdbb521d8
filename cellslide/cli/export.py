"""`cellslide export`: other formats from finished cell tables."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellslide.cli import grouped
from cellslide.cli.guarded import each, refuse
from cellslide.cli.options import FILE, FOLDER, config_option, format_option, geojson_options, verbosity_options
from cellslide.errors import UsageError

if TYPE_CHECKING:
    from cellslide.config import OutputConfig


@grouped.define(name="export")
@click.argument("folders", nargs=-1, required=True, type=FOLDER, metavar="OUTDIR_OR_SLIDEDIR...")
@format_option(default="geojson")
@geojson_options
@click.option(
    "--with-image", is_flag=True, help="Also put the slide's picture into cells.zarr, smaller, for spatialdata."
)
@click.option(
    "--image-mb",
    type=click.IntRange(1, 1024),
    default=64,
    show_default=True,
    metavar="MB",
    help="Largest size of that picture before compression.",
)
@click.option("--slide", type=FILE, help="Where the slide is now, if it has moved since; for --with-image.")
@config_option
@verbosity_options
def command(
    folders: tuple[Path, ...],
    formats: tuple[str, ...],
    geojson_origin: str,
    profile: str,
    with_image: bool,
    image_mb: int,
    slide: Path | None,
) -> None:
    """Write other formats beside each cells.zarr found in the given folders or one level below.

    \b
    Examples:
      cellslide export out/slide --format csv
      cellslide export out --format parquet,labels,h5ad
      cellslide export out/slide --format tissuumaps
      cellslide export out/slide --format geojson --profile full --geojson-origin level0
      cellslide export out/slide --with-image --image-mb 100
    """
    from cellslide.config import OutputConfig

    config = OutputConfig(formats=formats, geojson_origin=geojson_origin, profile=profile)  # type: ignore[arg-type]
    tables = find_tables(folders)
    if slide is not None and (len(tables) != 1 or not with_image):
        raise UsageError(f"--slide {slide}: goes with --with-image and one slide's folder")
    picture = (image_mb, slide) if with_image else None
    failed = each(tables, partial(_export_one, config=config, picture=picture))
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


def _export_one(path: Path, config: OutputConfig, picture: tuple[int, Path | None] | None) -> None:
    from cellslide.formats.files import renew_files
    from cellslide.formats.registry import export_table
    from cellslide.formats.slide_image import add_image
    from cellslide.store.cell_table import open_table
    from cellslide.store.lock import hold
    from cellslide.store.recovery import restore
    from cellslide.store.run_record import read_record, write_record

    with hold(path.parent):
        restore(path.parent)
        renew_files(path.parent)
        if picture is not None:
            with open_table(path) as table:
                add_image(table, *picture)
        with open_table(path) as table:
            written = export_table(table, path.parent, config.formats, config.geojson_origin, config.profile)
        if (record := read_record(path.parent)) is not None:
            write_record(path.parent, record)  # it lists the files
    for target in written.values():
        click.echo(str(target))
