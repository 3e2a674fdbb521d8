"""One run at a time on a slide's folder: a small file says who works there, and its time of change that it still does.

Each run puts down a file of its own name, `.lock-<token>`, and only then looks for others: of two that come together at
least one sees the other, and since no name is used twice, a dead run's file can be removed without hitting a live one.
Times are compared as the file system gives them, so clocks of hosts need not agree.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cellslide.errors import BusyError, CellslideError

PREFIX = ".lock-"
# A run says so often that it is alive; one that has been silent for longer than the second is taken for dead.
BEAT_S, STALE_S = 10.0, 90.0
# Two that come together both step back and try again, so often before they are told that the folder is taken.
TRIES = 5
POLL_S = 1.0
# More than any run writes into its file.
MOST_BYTES = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who works in a folder: host, process, when that process began, and the space in which its number means it."""

    host: str
    pid: int
    began: float
    space: str

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}"

    def runs(self) -> bool | None:
        """Tell whether the process runs; None where it cannot be seen from here (another host, another container)."""
        if self.space != _space():
            return None
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.began) < 1.0)
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True


@dataclass(frozen=True, slots=True)
class _Claim:
    """The file of another run: who, and when it was last touched (s, by the file system's clock)."""

    path: Path
    holder: Holder
    beat: float

    def is_dead(self, now: float) -> bool:
        return self.holder.runs() is False or now - self.beat > STALE_S


class Lock:
    """A folder that is held; `check` raises CellslideError where it was lost to another run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="cellslide-lock", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                self._lost = True
                return
            except OSError as error:
                # A drive that is away stops the work by itself, in its own words.
                log.debug("%s: %s", self.path, error)

    def check(self) -> None:
        """Raise CellslideError where the folder was taken over, as happens to a run that was stopped for long."""
        if self._lost:
            raise CellslideError(f"{self.path.parent}: its lock was removed, another run may work there; stopped here")

    def release(self) -> None:
        """Give the folder free."""
        self._end.set()
        self._thread.join()
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            log.debug("%s: %s", self.path, error)


@contextmanager
def hold(folder: Path, check: Callable[[], None] = lambda: None) -> Iterator[Lock]:
    """Hold a folder, made where it is not there; what a dead run held is taken over, and said.

    check  called while waiting; may raise to stop the wait.
    Raises BusyError when another run works there. Where that runs on another host, this is known only once its file is
    touched again, or has not been for STALE_S.
    """
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock: Lock | None = None
    try:
        mine = _take(folder, check)
        try:
            lock = Lock(mine)
        except BaseException:
            mine.unlink(missing_ok=True)
            raise
        yield lock
    finally:
        if lock is not None:
            lock.release()
        if not was_there:
            with suppress(OSError):  # One that holds something stays.
                folder.rmdir()


def who_works(folder: Path) -> str | None:
    """Return in words who works in a folder, as far as can be told without a wait, or None; nothing is changed."""
    for path in folder.glob(f"{PREFIX}*"):
        try:
            if not stat.S_ISREG(path.lstat().st_mode) or path.suffix == ".tmp":
                continue
            with path.open("rb") as stream:
                holder = _holder(stream.read(MOST_BYTES).decode("utf-8", "replace"))
            runs = holder.runs()
            if runs or (runs is None and time.time() - path.stat().st_mtime <= STALE_S):
                return str(holder)
        except FileNotFoundError:
            continue
    return None


def _take(folder: Path, check: Callable[[], None]) -> Path:
    beats: dict[Path, float] = {}
    quiet: dict[Path, tuple[float, float]] = {}
    turn = 0
    while True:
        check()
        mine = _claim(folder)
        try:
            alive = _remove_dead(folder, mine, quiet)
            if not alive:
                return mine
        except BaseException:
            mine.unlink(missing_ok=True)
            raise
        mine.unlink(missing_ok=True)
        _refuse(folder, alive, beats, turn)
        near = any(claim.holder.runs() for claim in alive)
        time.sleep(random.uniform(0.02, 0.2) if near else POLL_S)
        turn += 1


def _refuse(folder: Path, alive: list[_Claim], beats: dict[Path, float], turn: int) -> None:
    """Raise BusyError once a run is known to work there; notes the beats seen so far."""
    for claim in alive:
        known = turn >= TRIES if claim.holder.runs() else claim.beat > beats.setdefault(claim.path, claim.beat)
        if known:
            raise BusyError(f"{folder}: another run works here ({claim.holder}); wait for it, or give another --output")
    if turn == 0 and any(claim.holder.runs() is None for claim in alive):
        log.warning("%s: held by %s; waiting for a sign of life", folder, alive[0].holder)


def _remove_dead(folder: Path, mine: Path, quiet: dict[Path, tuple[float, float]]) -> list[_Claim]:
    """Return the claims of others that are alive; those of dead runs are removed.

    quiet  the beat that a claim had when it was first seen, and since when by our own clock: a date that lies ahead,
           as a clock that was set back leaves it, never grows old.
    """
    now, alive = mine.stat().st_mtime, []
    for claim in _others(folder, mine):
        beat, since = quiet.get(claim.path, (claim.beat, time.monotonic()))
        if beat != claim.beat:
            beat, since = claim.beat, time.monotonic()
        quiet[claim.path] = beat, since
        if not claim.is_dead(now) and (claim.holder.runs() or time.monotonic() - since <= STALE_S):
            alive.append(claim)
            continue
        log.warning("%s: taken over from a run that ended without a word (%s)", folder, claim.holder)
        claim.path.unlink(missing_ok=True)
    return alive


def _others(folder: Path, mine: Path) -> Iterator[_Claim]:
    for path in sorted(folder.glob(f"{PREFIX}*")):
        if path == mine:
            continue
        try:
            # A folder or a pipe of such a name is no run's.
            if not stat.S_ISREG(path.lstat().st_mode):
                continue
            if path.suffix == ".tmp":
                _remove_scratch(path, mine)
                continue
            with path.open("rb") as stream:
                text = stream.read(MOST_BYTES).decode("utf-8", "replace")
            yield _Claim(path, _holder(text), path.stat().st_mtime)
        except FileNotFoundError:
            continue


def _remove_scratch(path: Path, mine: Path) -> None:
    """Remove what a run left that was killed while it put down its file; elsewhere only after a while."""
    _, pid, space = path.stem.rsplit(".", 2) if path.stem.count(".") >= 3 else ("", "", "")
    gone = space == _short_space() and pid.isdigit() and not psutil.pid_exists(int(pid))
    if gone or mine.stat().st_mtime - path.stat().st_mtime > STALE_S:
        path.unlink()


def _holder(text: str) -> Holder:
    try:
        content: dict[str, Any] = json.loads(text)
        pid, began = int(content["pid"]), float(content["began"])
        if not 0 <= pid < 1 << 31:
            raise ValueError("no process has this number")
        return Holder(str(content["host"])[:80], pid, began, str(content["space"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Holder("unknown", 0, 0.0, "unknown")


def _claim(folder: Path) -> Path:
    """Put down a file of this process's own; it appears whole."""
    path = folder / f"{PREFIX}{secrets.token_hex(8)}"
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{_short_space()}.tmp")
    me = Holder(socket.gethostname(), os.getpid(), psutil.Process().create_time(), _space())
    try:
        scratch.write_text(json.dumps(asdict(me)), encoding="utf-8")
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise
    return path


def _short_space() -> str:
    return hashlib.sha256(_space().encode()).hexdigest()[:12]


def _space() -> str:
    """Name what makes process numbers comparable: this boot of this machine, and the container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
