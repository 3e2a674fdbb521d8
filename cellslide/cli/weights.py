"""`cellslide weights`: which model weights exist, which are here, and how to get the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellslide.cli import grouped
from cellslide.cli.options import verbosity_options

if TYPE_CHECKING:
    from cellslide.weights import Manifest, WeightsEntry

ID = click.argument("name", metavar="ID")


def _manifest() -> Manifest:
    from cellslide.weights import Manifest

    return Manifest.load()


def _status(entry: WeightsEntry) -> str:
    from cellslide.weights import find_file
    from cellslide.weights.manifest import PACKAGE

    if find_file(entry) is not None:
        return "shipped" if entry.file and entry.root == PACKAGE else "here"
    if entry.source is None:
        return "missing"
    if entry.source.kind == "user":
        return "yours to add"
    return "gated" if entry.gated else "to fetch"


@click.group("weights", cls=grouped.Group)
@verbosity_options
def command() -> None:
    """List, show, fetch, verify or add model weights.

    \b
    Example:
      cellslide weights list --task segment
      cellslide weights show cellvit-sam-h-x40
      cellslide weights add ~/CellVTA_UNI_pannuke_split1.pth --id cellvta-uni-pannuke
    """


@command.command("list")
@click.option("--task", type=click.Choice(["segment", "detect", "classify", "backbone"]), help="Only these.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def list_command(task: str | None, as_json: bool) -> None:
    """Show all weights: id, task, whether they are here, licence. A star marks what is used by default."""
    manifest = _manifest()
    defaults = set(manifest.defaults.values())
    entries = [e for e in manifest.entries.values() if task in (None, e.task)]
    if as_json:
        rows = [
            {"id": e.id, "task": e.task, "status": _status(e), "licence": e.licence, "default": e.id in defaults}
            for e in entries
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    width = max((len(e.id) for e in entries), default=0) + 2
    for e in entries:
        name = f"{e.id}*" if e.id in defaults else e.id
        click.echo(f"{name:<{width}} {e.task:<9} {_status(e):<13} {e.licence or 'no licence stated'}")


@command.command("show")
@ID
def show_command(name: str) -> None:
    """Print the manifest entry of ID as YAML, where its file is, or how to get it."""
    import yaml

    from cellslide.weights import find_file
    from cellslide.weights.cache import how_to_get

    entry = _manifest().entry(name)
    click.echo(yaml.safe_dump(entry.as_dict(), sort_keys=False, allow_unicode=True), nl=False)
    path = find_file(entry)
    click.echo(f"# here: {path}" if path else f"# not here: {how_to_get(entry)}")
    if entry.task == "classify":
        from cellslide.weights.organs import VOCABULARY

        click.echo(f"# --organ also takes, as organs that were not trained: {', '.join(VOCABULARY)}")


@command.command("fetch")
@ID
@click.option("--accept-licence", metavar="NAME", help="Accept the licence of that name without being asked.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def fetch_command(name: str, accept_licence: str | None, no_progress: bool) -> None:
    """Download ID after you accepted its licence. HF_TOKEN and HF_HUB_OFFLINE are respected."""
    from cellslide.weights import fetch

    entry = _manifest().entry(name)

    def ask(licence: str) -> bool:
        click.echo(f"{entry.id}: licence {licence}")
        if entry.page:
            click.echo(f"terms: {entry.page}")
        return sys.stdin.isatty() and click.confirm("Do you accept it?")

    def progress(done: int, total: int | None) -> None:
        share = f" of {total / 1e6:.0f}" if total else ""
        click.echo(f"\r{entry.id}: {done / 1e6:.0f}{share} MB", nl=False, err=True)

    path = fetch(entry, accept_licence, ask, progress if sys.stderr.isatty() and not no_progress else None)
    click.echo(str(path))


@command.command("verify")
@click.argument("name", metavar="[ID]", required=False)
@click.option("--trust", is_flag=True, help="Take the present file of ID as the right one (no published hash).")
def verify_command(name: str | None, trust: bool) -> None:
    """Hash the files of ID, or of all weights that are here, and compare. Exit 3 when one differs."""
    from cellslide.errors import UsageError, WeightsError
    from cellslide.weights import find_file, verify_file
    from cellslide.weights.cache import forget_trust, require_file

    manifest = _manifest()
    if trust and name is None:
        raise UsageError("--trust: name one ID")
    if name is not None:
        entry = manifest.entry(name)
        require_file(entry)
        if trust:
            forget_trust(entry)
    faults = []
    for entry in [manifest.entry(name)] if name else manifest.entries.values():
        path = find_file(entry)
        if path is None:
            continue
        try:
            digest = verify_file(entry, path, fresh=True)
        except WeightsError as error:
            faults.append(str(error))
            click.echo(f"{entry.id}: DIFFERS {path}")
        else:
            click.echo(f"{entry.id}: ok {digest}{'' if entry.sha256 else ' (trusted on first use)'}")
    if faults:
        raise WeightsError("; ".join(faults))


@command.command("add")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--id", "name", metavar="ID", help="Name for `--model`.  [default: from the file name]")
def add_command(path: Path, name: str | None) -> None:
    """Copy PATH into the cache: a .pth or .safetensors file, or a folder written by `cellslide train`."""
    from cellslide.weights import add_weights

    entry = add_weights(path, name, _manifest())
    click.echo(f"{entry.id}: added; use it with --model {entry.id}")
