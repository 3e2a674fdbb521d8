"""What a killed run leaves in a slide's folder, put right: old folders put back, half-written ones removed."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from cellslide.errors import BusyError
from cellslide.store.lock import hold
from cellslide.store.run_record import TABLE


def restore(folder: Path) -> None:
    """Undo what a killed run left half done in a folder that is held: put back what it had moved away, remove the rest.

    `publish` moves the old folder away before the new one takes its place; killed in between, that is all there is.
    """
    for old in folder.glob("*.old-*"):
        target = folder / old.name.rpartition(".old-")[0]
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    for left in (*folder.glob("*.tmp-*"), *folder.glob(".*.tmp")):
        # What another run puts down to ask for the folder is not ours to remove.
        if left.name.startswith(".lock-"):
            continue
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def put_back(folder: Path, name: str) -> None:
    """Where a killed run had moved `name` away in `folder` or one level below, put it back; a folder in use is left."""
    for old in (*folder.glob(f"{name}.old-*"), *folder.glob(f"*/{name}.old-*")):
        if not old.with_name(name).exists():
            with suppress(BusyError, OSError), hold(old.parent):
                restore(old.parent)


def tables_below(folder: Path) -> list[Path]:
    """Return the cell tables that a folder is, holds, or holds one level below, in a fixed order."""
    if folder.name == TABLE and folder.is_dir():
        return [folder]
    if not folder.is_dir():
        return []
    put_back(folder, TABLE)
    return sorted(p for p in (*folder.glob(TABLE), *folder.glob(f"*/{TABLE}")) if p.is_dir())
