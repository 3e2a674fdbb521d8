"""Runs the `cellslide` command in a process of its own that notes what it writes, whom it calls, and its memory.

As a script: `python -m tests.support.watched REPORT KIND ARGUMENTS...`; KIND "fake" puts the fake network in the place
of the one that ships, "small" makes the painted slide of the demo a small one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import CHECKOUT

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Event -> the paths among its arguments, each with the folder (a descriptor) that it may be relative to.
CHANGES = {
    "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),),
    "os.link": ((0, 2), (1, 3)), "os.symlink": ((1, 2),), "os.truncate": ((0, 0),), "os.chmod": ((0, 2),),
}  # fmt: skip
CALLS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


@dataclass(frozen=True, slots=True)
class Watched:
    """How a command ended: exit code, its texts, paths that it changed, calls to the network, most memory (bytes)."""

    code: int
    stdout: str
    stderr: str
    changed: tuple[str, ...]
    calls: tuple[str, ...]
    peak_bytes: int

    def outside(self, *folders: Path) -> list[str]:
        """Return what was changed outside `folders`; devices and the kernel's own files count nowhere."""
        inside = tuple(f"{folder.resolve()}" for folder in folders)
        return [path for path in self.changed if not path.startswith((*inside, "/dev/", "/proc/", "/sys/"))]


def run_watched(
    folder: Path, kind: str, arguments: Sequence[object], before: Sequence[str] = (), timeout_s: float = 100
) -> Watched:
    """Run `cellslide ARGUMENTS` with `folder` as place, home, cache and folder for scratch; `before` goes before it."""
    report = folder / "report.json"
    command = [*before, sys.executable, "-m", "tests.support.watched", str(report), kind, *map(str, arguments)]
    places = {"HOME": folder, "CELLSLIDE_CACHE": folder / "cache", "TMPDIR": folder / "scratch"}
    (folder / "scratch").mkdir(exist_ok=True)
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}, "PYTHONPATH": str(CHECKOUT)}
    # Neither Python's nor numba's compiled code goes beside the source.
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(places["CELLSLIDE_CACHE"] / "kernels")}
    environment |= {"OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)  # nobody holds it back: it must not ask for the network by itself
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch sets it in a process that has compiled something
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout_s
    )
    found: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}
    return Watched(
        done.returncode,
        done.stdout,
        done.stderr,
        tuple(path for path in found.get("changed", ()) if path != str(report)),
        tuple(found.get("calls", ())),
        found.get("peak_bytes", 0),
    )


def watch(changed: set[str], calls: list[str]) -> None:
    """Note from now on each file that this process opens for writing, makes, renames or removes, and each call out."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            note(arguments[0])
        elif event in CHANGES:
            for path, folder in CHANGES[event]:
                note(arguments[path], arguments[folder])
        elif event in CALLS and not is_local(arguments):
            calls.append(f"{event} {arguments[1:]}")

    def note(path: object, folder: object = None) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            below = os.path.realpath(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
            changed.add(os.path.realpath(os.path.join(below, os.fsdecode(path))))

    sys.addaudithook(hear)


def is_local(arguments: tuple[Any, ...]) -> bool:
    """Tell whether a socket's address is a file of this machine."""
    return any(
        isinstance(argument, (str, bytes)) and os.fsdecode(argument).startswith(("/", "\0")) for argument in arguments
    )


def main() -> None:
    """Run the command and write the report."""
    report, kind, *arguments = sys.argv[1:]
    changed: set[str] = set()
    calls: list[str] = []
    code: object = 1
    watch(changed, calls)
    from cellslide.cli.main import cli

    if kind == "fake":
        import cellslide.weights
        from tests.support.fakes import fake_model

        cellslide.weights.load_model = lambda *args, **settings: fake_model()  # type: ignore[assignment]
    elif kind == "small":
        from cellslide.slides import painted as demo

        demo.WIDTH_PX, demo.HEIGHT_PX = 900, 700
    try:
        cli(arguments)
    except SystemExit as end:
        code = end.code
    from cellslide.store.run_record import peak_rss_bytes

    found = {"changed": sorted(changed), "calls": calls, "peak_bytes": peak_rss_bytes()}
    Path(report).write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code if isinstance(code, int) else 0)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
