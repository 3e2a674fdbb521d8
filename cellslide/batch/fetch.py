"""Slides fetched from web addresses: in pieces, on from where it broke, and checked before they are read.

What a library says of a failure may hold the whole address with its secrets, so errors here have words of their own.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cellslide.errors import CellslideError, MissingDependencyError, SlideError, UsageError, one_line
from cellslide.progress import IDLE, Watch
from cellslide.slides.inputs import SlideInput

PIECE_BYTES = 8 << 20
# So often in a row without one more byte; between two tries is a pause that doubles (s).
ATTEMPTS, PAUSE_S = 5, 1.0
# A server that is silent for so long (s) counts as gone.
SILENT_S = 60.0
# Answers that another try may mend; other 4xx stay.
PASSING = (408, 425, 429)
NEEDED = {"https": "aiohttp", "http": "aiohttp", "s3": "s3fs"}
FORBIDDEN = (
    "refused: give a link that is signed anew, or credentials that may read it (a public bucket: FSSPEC_S3_ANON=1)"
)

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Offer:
    """What a server says of a file: size in bytes, a mark that changes with it, its MD5 (hex); None: it does not."""

    size_bytes: int | None
    mark: str | None
    md5: str | None


class _Changed(Exception):
    """The file is another than when fetching began."""


class Fetch:
    """One slide at an address. Raises MissingDependencyError without the packages of the extra `remote`."""

    def __init__(self, source: SlideInput) -> None:
        if source.remote is None:
            raise ValueError(f"{source.path} is no address")
        self.path, self.remote, self._in_pieces = source.path, source.remote, True
        self._scheme = scheme = str(self.path).partition(":")[0]
        try:
            options = _options(importlib.import_module(NEEDED[scheme]), self.remote.address)
            self._files = importlib.import_module("fsspec").filesystem(scheme, **options)
        except ImportError as error:
            raise MissingDependencyError(
                f"{self.path}: fetching it needs {NEEDED[scheme]}: pip install 'cellslide[remote]'"
            ) from error

    def ask(self, watch: Watch = IDLE) -> Offer:
        """Return what the server says now; raises UsageError where it gives no file, SlideError where it is silent."""
        return self._patiently(self._ask, watch)

    @cached_property
    def offer(self) -> Offer:
        """What the server said first; raises as `ask`."""
        return self.ask()

    @property
    def part_name(self) -> str | None:
        """Name of what has come so far, the same for the same content; None where nothing tells of that."""
        if self.offer.mark is None:
            return None
        text = f"{self.remote.known_by} {self.offer.size_bytes} {self.offer.mark}"
        return f"cellslide-{hashlib.sha256(text.encode()).hexdigest()[:16]}.part"

    def into(self, part: Path, most_bytes: int, watch: Watch) -> None:
        """Write the file to `part`, on from what stands there, which is kept when it breaks off.

        Raises SlideError where the file cannot be had whole, is larger than `most_bytes` or has another hash,
        Interrupted when asked to stop.
        """
        part.touch()
        try:
            self._patiently(lambda: self._read_on(part, most_bytes, watch), watch, part)
            self._check(part, watch)
        except _Changed:
            part.unlink()
            raise SlideError(f"{self.path}: changed while it was fetched; the same command fetches it anew") from None

    def _ask(self) -> Offer:
        info = self._files.info(self.remote.address)
        if str(info.get("mimetype", "")).startswith("text/html"):
            raise UsageError(f"{self.path}: gives a web page, no slide; name the address of the download itself")
        mark = info.get("ETag") or info.get("Last-Modified") or info.get("LastModified")
        return Offer(info.get("size"), None if mark is None else str(mark), _md5(info.get("Content-MD5")))

    def _read_on(self, part: Path, most_bytes: int, watch: Watch) -> None:
        if self._ask() != self.offer:
            raise _Changed
        size, done = self.offer.size_bytes, part.stat().st_size
        # Without its size a file comes in one stream, and so from the beginning.
        in_pieces = self._in_pieces and size is not None
        how = {"cache_type": "none"} if in_pieces else {"block_size": 0}
        with self._files.open(self.remote.address, "rb", **how) as stream, part.open("r+b") as target:
            done = target.seek(done if in_pieces else 0)
            target.truncate()
            if done:
                stream.seek(done)
            while done != size and (data := self._piece(stream)):
                watch.check()
                done += target.write(data)
                if done > most_bytes:
                    raise SlideError(f"{self.path}: more than the {most_bytes:,} bytes that were told, or are free")
        if size is not None and done != size:
            raise EOFError(f"ended after {done:,} of {size:,} bytes")

    def _piece(self, stream: Any) -> bytes:
        try:
            return bytes(stream.read(PIECE_BYTES))
        except ValueError:  # A server that gives no part of a file.
            self._in_pieces = False
            raise

    def _patiently(self, task: Callable[[], Answer], watch: Watch, part: Path | None = None) -> Answer:
        """Return what a task gives, tried again while that may help."""
        tries, most = 0, -1
        while True:
            watch.check()
            try:
                return task()
            except (CellslideError, _Changed):
                raise
            except Exception as error:
                come = 0 if part is None else part.stat().st_size
                tries, most = 1 if come > most else tries + 1, max(come, most)
                # On the web, the library calls all that goes wrong a file that is not there; the cause tells.
                cause = error if self._scheme == "s3" else error.__cause__ or error
                if (lasting := self._lasting(cause)) is not None:
                    raise lasting from None
                if tries >= ATTEMPTS:
                    raise SlideError(
                        f"{self.path}: cannot be fetched ({_kind(cause)}), tried {tries} times; what has come is kept, "
                        "the same command goes on from there"
                    ) from None
            time.sleep(PAUSE_S * 2 ** (tries - 1))

    def _lasting(self, error: BaseException) -> CellslideError | None:
        """Return in words what no other try would mend, None for what one may."""
        status = getattr(error, "status", None)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            return UsageError(f"{self.path}: not there; check the address")
        if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
            return UsageError(f"{self.path}: {FORBIDDEN}")
        if isinstance(status, int) and 400 <= status < 500 and status not in PASSING:
            return UsageError(f"{self.path}: refused (HTTP {status}); check the address")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return SlideError(f"{self.path}: the disk of --stage-dir is full; make room, or give another folder")
        return None

    def _check(self, part: Path, watch: Watch) -> None:
        """Raise SlideError where the hash is not the one that was told, _Changed where the file is another now."""
        if self.ask(watch) != self.offer:
            raise _Changed
        for name, told, where in (("md5", self.offer.md5, "the server"), ("sha256", self.remote.sha256, "the list")):
            if told is None:
                continue
            with part.open("rb") as stream:
                found = hashlib.file_digest(stream, name).hexdigest()
            if found != told:
                part.unlink()
                raise SlideError(
                    f"{self.path}: came with {name} {found}, {where} says {told}; fetch it again, or mend the list"
                )


def _options(package: Any, address: str) -> dict[str, Any]:
    """Return how a library is to fetch: no list of files kept, the proxy of the environment, no end to a long file."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if package.__name__ != "aiohttp":
        return options
    timeout = package.ClientTimeout(total=None, sock_connect=SILENT_S, sock_read=SILENT_S)
    return options | {"client_kwargs": {"timeout": timeout, "trust_env": True}, "encoded": "%" in address}


def _md5(header: object) -> str | None:
    """Return the digest in a Content-MD5 header as hex, None where it is none."""
    try:
        digest = base64.b64decode(str(header), validate=True)
    except ValueError:
        return None
    return digest.hex() if len(digest) == 16 else None


def _kind(error: BaseException) -> str:
    """Return what kind of failure it was, in words that hold nothing of the address."""
    if isinstance(error, EOFError):
        return one_line(str(error))
    status = getattr(error, "status", None)
    return type(error).__name__ if status is None else f"HTTP {status}"
