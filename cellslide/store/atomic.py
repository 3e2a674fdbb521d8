"""Folders that appear whole or not at all: written under another name, renamed at the end; and what kills leave."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike

from cellslide.errors import BusyError
from cellslide.store.lock import hold
from cellslide.store.run_record import TABLE

ZEROS = bytes(1 << 20)


class Staging:
    """A folder beside `path` that takes its place at the end; what a killed process left behind is removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{path.name}.tmp-*"):
            owner = left.name.rpartition("-")[2]
            if left == self.folder or not (owner.isdigit() and _is_running(int(owner))):
                shutil.rmtree(left, ignore_errors=True)

    def publish(self) -> None:
        """Rename the folder into place; an older one is moved away first and removed last."""
        old = self.path.with_name(f"{self.path.name}.old-{os.getpid()}")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(old)
        self.folder.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def abort(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


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


def remove_folder(folder: Path) -> None:
    """Remove a folder in one step for whoever looks for it by name; a kill leaves what `restore` removes."""
    if folder.exists():
        gone = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def new_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
    """Make a `.npy` file of zeros that can be mapped, with all of its space taken.

    Raises OSError where the disk has no room: written to later through the map, a full disk would end the process.
    """
    mapped = open_memmap(path, "w+", np.dtype(dtype), shape)
    start = mapped.offset
    mapped.flush()
    del mapped
    size = path.stat().st_size
    with path.open("r+b") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
            return
        stream.seek(start)
        for first in range(start, size, len(ZEROS)):
            stream.write(ZEROS[: size - first])


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
