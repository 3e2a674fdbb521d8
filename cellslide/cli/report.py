"""`cellslide report`: one page per slide that tells whether to trust the run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from cellslide.cli import grouped
from cellslide.cli.guarded import each, refuse
from cellslide.cli.options import FOLDER, verbosity_options
from cellslide.errors import UsageError


@grouped.define()
@click.argument("folders", nargs=-1, required=True, type=FOLDER, metavar="OUTDIR_OR_SLIDEDIR...")
@click.option("--slide", type=click.Path(exists=True, path_type=Path), help="The slide of one folder, where it moved.")
@verbosity_options
def command(folders: tuple[Path, ...], slide: Path | None) -> None:
    """Write report.html beside each cells.zarr found in the given folders or one level below.

    One file that needs no network: the slide with its nuclei, counts and densities, sizes, confidence, what both paths
    say, pictures of nuclei, what was checked, and how it was made.

    \b
    Examples:
      cellslide report out
      cellslide report out/slide --slide /elsewhere/slide.svs
    """
    from cellslide.cli.export import find_tables

    tables = find_tables(folders)
    if slide is not None and len(tables) != 1:
        raise UsageError(f"--slide {slide}: name the one folder that it belongs to, not {len(tables)}")
    failed = each((path.parent for path in tables), partial(_report_one, slide=slide))
    refuse(failed, "reports could not be written")


def _report_one(folder: Path, slide: Path | None) -> None:
    from cellslide.report import write_report
    from cellslide.store.lock import hold
    from cellslide.store.recovery import restore

    with hold(folder):
        restore(folder)
        click.echo(str(write_report(folder, slide)))
