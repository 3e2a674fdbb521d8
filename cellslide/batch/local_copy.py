"""Slides copied to a local disk before they are read, and removed after: for `--stage-dir`, and for web addresses.

A slide is all of its files: the companion folder of an MRXS, the files of a DICOM series, the parts that a Hamamatsu
index or an OME-TIFF names. What does not fit is read where it lies. What a killed run left is removed by the next one;
what it had fetched is kept, for a run that goes on.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from cellslide.batch.fetch import Fetch
from cellslide.classify.targets import Target
from cellslide.errors import CellslideError, SlideError
from cellslide.progress import IDLE, Watch
from cellslide.slides.inputs import SlideInput, folder_name
from cellslide.slides.remote import file_name
from cellslide.slides.slide_formats import slide_files
from cellslide.store.run_record import read_record

PREFIX = "cellslide-stage-"
# Where slides at addresses come to in the output folder, where no --stage-dir is given.
STAGE_FOLDER = ".stage"
# What was fetched in part and not gone on with for so long (s) is removed.
OLDEST_PART_S = 7 * 86_400
# Left free on the local disk, for what else needs it.
RESERVE_BYTES = 1 << 30
PIECE_BYTES = 16 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of a slide, its place in the copy (relative) and its size."""

    path: Path
    place: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LocalCopies:
    """Where slides are copied to, and how much of that disk is left free."""

    folder: Path
    reserve_bytes: int = RESERVE_BYTES

    @contextmanager
    def of(self, source: SlideInput, watch: Watch = IDLE) -> Iterator[SlideInput]:
        """Yield the slide with its copy as `local`, removed at the end; the slide as it is where it cannot be copied.

        Raises Interrupted when asked to stop, and as `Fetch` where it lies at an address.
        """
        scratch = None
        try:
            scratch, copy = self._copied(source, watch) if source.remote is None else self._fetched(source, watch)
            yield replace(source, local=copy)
        finally:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)

    def _copied(self, source: SlideInput, watch: Watch) -> tuple[Path | None, Path | None]:
        path = Path(os.path.abspath(source.path))
        try:
            pieces = pieces_of(path)
            if not self._fits(source, sum(piece.size_bytes for piece in pieces)):
                return None, None
            scratch = self._scratch()
        except OSError as error:
            return self._given_up(source, error)
        try:
            watch.progress.stage("copy")
            for piece in pieces:
                _copy(piece, scratch / piece.place, watch)
            return scratch, scratch / path.name
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            return self._given_up(source, error)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _scratch(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{socket.gethostname()}-{os.getpid()}-", dir=self.folder))

    def _fetched(self, source: SlideInput, watch: Watch) -> tuple[Path, Path]:
        """Fetch a slide; what has come of one that breaks off is left in the folder under a name of its own."""
        fetch = Fetch(source)
        name, size = fetch.part_name, fetch.offer.size_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_left(self.folder)
            scratch, free = self._scratch(), shutil.disk_usage(self.folder).free - self.reserve_bytes
        except OSError as error:
            raise SlideError(f"--stage-dir {self.folder}: cannot be written ({error.strerror})") from error
        part, kept = scratch / (name or "part"), None if name is None else self.folder / name
        try:
            if kept is not None:
                with suppress(FileNotFoundError):
                    os.replace(kept, part)
            if size is not None and size - (part.stat().st_size if part.exists() else 0) > free:
                raise SlideError(
                    f"{source.path}: its {size / (1 << 30):.1f} GiB do not fit into {self.folder} with "
                    f"{self.reserve_bytes / (1 << 30):.1f} GiB kept free; give a larger --stage-dir"
                )
            watch.progress.stage("fetch")
            fetch.into(part, free if size is None else size, watch)
            copy = scratch / folder_name(str(file_name(source.path)))
            os.replace(part, copy)
            return scratch, copy
        except BaseException:
            if kept is not None:
                with suppress(OSError):
                    os.replace(part, kept)
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _given_up(self, source: SlideInput, error: OSError) -> tuple[None, None]:
        log.warning("%s: not copied to %s (%s); it is read where it lies", source.path, self.folder, error)
        return None, None

    def _fits(self, source: SlideInput, size: int) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_left(self.folder)
        free = shutil.disk_usage(self.folder).free
        if size + self.reserve_bytes <= free:
            return True
        gib = 1 << 30
        log.warning(
            "%s: %.1f GiB do not fit into %s (%.1f GiB free, %.1f kept free); it is read where it lies",
            source.path, size / gib, self.folder, free / gib, self.reserve_bytes / gib,
        )  # fmt: skip
        return False


def pieces_of(path: Path) -> list[Piece]:
    """Return all files of a slide, a folder among them by its own name."""
    return [Piece(file, file.relative_to(path.parent), file.stat().st_size) for file in slide_files(path)]


def _copy(piece: Piece, place: Path, watch: Watch) -> None:
    """Copy a file piece by piece, so that a request to stop need not wait for gigabytes."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with piece.path.open("rb") as source, place.open("wb") as target:
        while data := source.read(PIECE_BYTES):
            watch.check()
            target.write(data)
    if place.stat().st_size != piece.size_bytes:
        raise OSError(f"{piece.path} changed while it was copied")


def remove_left(folder: Path, is_running: Callable[[int], bool] = psutil.pid_exists) -> None:
    """Remove what processes of this host left that do not run any more, save what they had fetched not long ago."""
    own = f"{PREFIX}{socket.gethostname()}-"
    for left in folder.glob(f"{PREFIX}*"):
        pid = left.name.removeprefix(own).partition("-")[0]
        if left.name.startswith(own) and pid.isdigit() and not is_running(int(pid)):
            with suppress(OSError):
                for part in left.glob("cellslide-*.part"):
                    os.replace(part, folder / part.name)
            shutil.rmtree(left, ignore_errors=True)
    for part in folder.glob("cellslide-*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > OLDEST_PART_S:
                part.unlink()


@contextmanager
def local_target(target: Target, copies: LocalCopies | None, watch: Watch) -> Iterator[Target]:
    """Yield a slide with its local copy while it is worked on; raises as `LocalCopies.of`.

    copies  None changes nothing, save that a slide at an address comes to the output folder.
    """
    if copies is None and target.source.remote is None:
        yield target
        return
    copies = copies or LocalCopies(target.folder.parent / STAGE_FOLDER)
    try:
        with copies.of(target.source, watch) as source:
            yield replace(target, source=source)
    finally:
        if copies.folder.name == STAGE_FOLDER:
            with suppress(OSError):
                copies.folder.rmdir()


def is_done(target: Target, typed: bool) -> bool:
    """Tell whether nothing is left to do on a slide, as far as its folder shows: opening it where it lies is quicker.

    Errors cost time only.
    """
    try:
        record = read_record(target.folder)
    except (CellslideError, OSError):
        return False
    if record is None or record.status not in ("done", "done_with_errors"):
        return False
    return "classify" in record.config if typed else record.status == "done"
