"""Folders that appear whole or not at all: written under another name, renamed at the end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


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


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
