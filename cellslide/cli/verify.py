"""`cellslide verify`: whether the files of finished slides agree with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellslide.cli import grouped
from cellslide.cli.options import FOLDER, verbosity_options
from cellslide.errors import CellslideError

if TYPE_CHECKING:
    from cellslide.formats.verify import Verdict


@grouped.define()
@click.argument("folders", nargs=-1, required=True, type=FOLDER, metavar="OUTDIR_OR_SLIDEDIR...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, one per slide.")
@verbosity_options
def command(folders: tuple[Path, ...], as_json: bool) -> None:
    """Check that table, GeoJSON, parquet, CSV and run.json of every slide agree: counts, ids, classes, places, hashes.

    The slide itself is compared with the hash that the record keeps, where it is still there. Nothing is written. Exit
    code 1 where anything differs, after all slides were looked at. Of a slide that is worked on now it says so.

    \b
    Examples:
      cellslide verify out
      cellslide verify out/slide --json
    """
    from cellslide.formats.verify import find_folders, verify_folder

    verdicts = []
    for folder in find_folders(folders):
        verdicts.append(verify_folder(folder))
        _show(verdicts[-1], as_json)
    differ = sum(not verdict.agrees for verdict in verdicts)
    if differ:
        raise CellslideError(
            f"{differ} of {len(verdicts)} slides differ in themselves; run them again with --overwrite"
        )


def _show(verdict: Verdict, as_json: bool) -> None:
    from cellslide.errors import one_line

    if as_json:
        names = ("cells", "running", "agrees", "checked", "faults", "notes")
        facts = {"slide": verdict.folder.name, **{name: getattr(verdict, name) for name in names}}
        click.echo(json.dumps(facts))
        return
    cells = "" if verdict.cells is None else f"  {verdict.cells:,} nuclei"
    word = "running" if verdict.running else "agrees" if verdict.agrees else "differs"
    click.echo(f"{one_line(verdict.folder.name)}  {word}{cells}  {', '.join(verdict.checked)}")
    for line in verdict.faults:
        click.echo(f"  differs: {one_line(line)}")
    for line in verdict.notes:
        click.echo(f"  note: {one_line(line)}")
