"""The error tree: what happened, where, and what to do about it.

Every error carries the exit code that the command line ends with; one place, `cli.main`, maps errors to codes.
"""

from __future__ import annotations

import errno
import os
import re
import reprlib
import shutil

# Control characters, line breaks, marks that turn the direction of what follows, and bytes that are no text.
MOST_LINE = 8_000
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """Return a text as one line that a terminal shows as it is: control characters of foreign names are spelled out.

    What no message needs is cut: foreign names may have any length.
    """
    line = HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), " ".join(text[:MOST_LINE].split()))
    return line + " ..." * (len(text) > MOST_LINE)


_CUT = reprlib.Repr()
_CUT.maxlevel, _CUT.maxdict, _CUT.maxlist, _CUT.maxtuple, _CUT.maxset = 2, 3, 3, 3, 3
_CUT.maxstring, _CUT.maxlong, _CUT.maxother = 60, 30, 60


def short(value: object, most: int = 200) -> str:
    """Return a foreign value for a message, cut to what a line holds; an error by its own words."""
    return one_line(str(value) if isinstance(value, BaseException) else _CUT.repr(value))[:most]


class CellslideError(Exception):
    """Any failure that cellslide explains in one line; `exit_code` is what the command ends with."""

    exit_code = 1


class UsageError(CellslideError):
    """Wrong usage or input that the user can mend: the message names the file, the value found and the flag."""

    exit_code = 2


class StaleError(UsageError):
    """A slide's folder that holds work of other settings; it is left as it is unless a flag gives that work up."""


class PixelSizeError(UsageError):
    """A slide whose pixel size is unknown or not believable; cellslide never guesses it."""


class SlideError(CellslideError):
    """A slide that cannot be opened or read; the run over many slides records it and goes on."""


class FluorescenceError(SlideError):
    """A slide of fluorescence, on which nothing that was learned on H&E holds; a flag insists."""

    exit_code = 2


class TileError(SlideError):
    """One tile that cannot be read or decoded; the run of the slide records it and goes on."""


class BusyError(CellslideError):
    """A folder in which another run works."""


class WeightsError(CellslideError):
    """Weights that are missing, gated, changed on disk, or do not fit the architecture."""

    exit_code = 3


class MissingDependencyError(CellslideError):
    """A device, engine or package that was asked for and is not there."""

    exit_code = 3


class Interrupted(CellslideError):
    """A clean stop after Ctrl-C (130), SIGTERM or SIGUSR1 (143); finished tiles are kept."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped; finished tiles are kept, the same command goes on from there")
        self.exit_code = exit_code


_TOO_MANY = {errno.EMFILE, errno.ENFILE}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_AWAY = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ENOTCONN", "ENODEV", "ENXIO", "EREMOTEIO", "EHOSTDOWN", "ETIMEDOUT", "ESHUTDOWN")
    if hasattr(errno, name)
}


def trouble(error: OSError | MemoryError) -> str | None:
    """Return in words what a full, read-only or vanished disk, or too little memory, means and what mends it.

    None for any other error.
    """
    if isinstance(error, MemoryError):
        return "not enough memory: use fewer --workers or a smaller --batch-size; the same command goes on from here"
    if isinstance(error, shutil.Error):
        error = _first_of(error)
    where, why = f"{error.filename}: " if error.filename else "", error.strerror
    if error.errno in _FULL:
        return f"{where}the disk is full ({why}): make room; what is done is kept, the same command goes on from here"
    if error.errno in _TOO_MANY:
        return f"{where}too many open files ({why}): raise the limit (ulimit -n), or use fewer --workers"
    if error.errno in _FORBIDDEN:
        return f"{where}cannot be written or read ({why}): give a folder that can be written by --output"
    if error.errno in _AWAY or error.errno == errno.ENOENT:
        return f"{where}gone, or the drive is ({why}): what is done is kept, the same command goes on from here"
    return None


def _first_of(error: shutil.Error) -> OSError:
    """Return the first of the errors that copying a folder has gathered: of each it keeps two places and words."""
    found = re.search(r"\[Errno (\d+)\]", str(error))
    if found is None:
        return error
    number = int(found[1])
    gathered = error.args[0] if error.args else None
    source = gathered[0][0] if isinstance(gathered, list) and gathered and isinstance(gathered[0], tuple) else None
    return OSError(number, os.strerror(number), source)


def in_words(error: BaseException) -> str:
    """Return an error as one line; the kind is named unless the message was written for users."""
    if isinstance(error, (OSError, MemoryError)) and (words := trouble(error)):
        return one_line(words)
    text = one_line(str(error))
    return text if isinstance(error, CellslideError) else f"{type(error).__name__}: {text}"
