"""Runs of the command line in forked processes that are killed at a chosen instant, or before a chosen step on disk.

The parent imports everything once and runs nothing, so that a run costs what its work costs. The networks are the fake
ones of the tests, which find and type painted discs exactly.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

DISK_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SECONDS_A_RUN = 600.0


@dataclass(frozen=True, slots=True)
class Kill:
    """When a run is killed: after so many seconds, or before its step on disk of that number; neither lets it end."""

    after_s: float | None = None
    at_step: int | None = None


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended: exit code (negative: the signal), seconds, its steps on disk, and which of them move or remove.

    A run that was killed does not tell its steps.
    """

    code: int
    seconds: float
    steps: int = 0
    moves: tuple[int, ...] = ()


def use_fakes() -> None:
    """Put the fake networks in place of those that ship, and write a part every second tile."""
    import torch

    import cellslide.inference.search
    import cellslide.weights
    import cellslide.weights.classifier
    from tests.support.fake_classifier import fake_loaded
    from tests.support.fakes import fake_model

    torch.set_num_threads(1)
    cellslide.weights.load_model = lambda *args: fake_model()
    cellslide.weights.classifier.load_classifier = lambda *args: fake_loaded()  # type: ignore[assignment,return-value]
    cellslide.inference.search.PART_TILES = 2
    for name in ("segment", "classify", "export"):
        __import__(f"cellslide.cli.{name}")


def run(arguments: Sequence[str], folder: Path, log: Path, kill: Kill = Kill()) -> End:
    """Run `cellslide ARGUMENTS` in a forked process; its words go to `log`, steps are counted below `folder`."""
    start = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(arguments, folder, log, kill, writing)
    os.close(writing)
    status = _wait(pid, start, kill)
    with os.fdopen(reading, "rb") as stream:
        told = stream.read()
    steps, moves = json.loads(told) if told else (0, [])
    return End(os.waitstatus_to_exitcode(status), time.monotonic() - start, steps, tuple(moves))


def _wait(pid: int, start: float, kill: Kill) -> int:
    limit = SECONDS_A_RUN if kill.after_s is None else kill.after_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() - start > limit:
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        time.sleep(0.002)


def _child(arguments: Sequence[str], folder: Path, log: Path, kill: Kill, told: int) -> None:
    code = 70
    try:
        words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 1)
        os.dup2(words, 2)
        steps = count_steps(folder, kill.at_step)
        from cellslide.cli.main import cli

        try:
            cli(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        os.write(told, json.dumps([steps.done, steps.moves]).encode())
    finally:
        sys.stdout.flush()
        os._exit(code)


@dataclass(slots=True)
class Steps:
    """What a process has done to files: how many steps, and the numbers of those that move or remove."""

    done: int = 0
    moves: list[int] = field(default_factory=list)


def count_steps(folder: Path, fatal: int | None) -> Steps:
    """Count what this process does to files below `folder` from now on; before step `fatal` it kills itself."""
    steps, below = Steps(), str(folder)

    def hear(event: str, args: tuple[object, ...]) -> None:
        if not _changes(event, args, below):
            return
        if steps.done == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if event != "open" and "zarr.json" not in str(args[0]):
            steps.moves.append(steps.done)
        steps.done += 1

    sys.addaudithook(hear)
    return steps


def _changes(event: str, args: tuple[object, ...], below: str) -> bool:
    if event == "open":
        path, _, flags = args
        return isinstance(flags, int) and bool(flags & WRITING) and str(path).startswith(below)
    # Trees are removed by names relative to an open folder.
    return event in DISK_EVENTS and (str(args[0]).startswith(below) or not str(args[0]).startswith("/"))
