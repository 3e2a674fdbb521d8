"""Files and folders that appear whole or not at all: written under another name, renamed at the end."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike

ZEROS = bytes(1 << 20)
# A disk writes many small files together almost as fast as one.
FILES_AT_ONCE = 8


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` to write to, renamed to `path` at the end: a file that is there is whole.

    Where something raises, such as a full disk, it is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process number would not do: several hosts may write at once.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield scratch
        to_disk(scratch)  # else a power cut may leave the new name on an empty file
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def to_disk(path: Path) -> None:
    """Have a file or a folder written to the disk before it is renamed; some file systems cannot, and need not."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> None:
    """Write text in one step; bytes of foreign names that are no text are spelled out."""
    with beside(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in one step."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


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
        """Bring the folder to the disk and rename it into place; an older one is moved away first and removed last."""
        found = [self.folder, *self.folder.rglob("*")]
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            deque(pool.map(to_disk, found), maxlen=0)
        old = self.path.with_name(f"{self.path.name}.old-{os.getpid()}")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.rename(old)
        self.folder.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def abort(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


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
