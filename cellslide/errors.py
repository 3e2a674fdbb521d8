"""The error tree: what happened, where, and what to do about it.

Every error carries the exit code that the command line ends with; one place, `cli.main`, maps errors to codes.
"""

from __future__ import annotations


class CellslideError(Exception):
    """Any failure that cellslide explains in one line; `exit_code` is what the command ends with."""

    exit_code = 1


class UsageError(CellslideError):
    """Wrong usage or input that the user can mend: the message names the file, the value found and the flag."""

    exit_code = 2


class PixelSizeError(UsageError):
    """A slide whose pixel size is unknown or not believable; cellslide never guesses it."""


class SlideError(CellslideError):
    """A slide that cannot be opened or read; the run over many slides records it and goes on."""


class TileError(SlideError):
    """One tile that cannot be read or decoded; the run of the slide records it and goes on."""


class WeightsError(CellslideError):
    """Weights that are missing, gated, changed on disk, or do not fit the architecture."""

    exit_code = 3


class MissingDependencyError(CellslideError):
    """A device, engine or package that was asked for and is not there."""

    exit_code = 3


class Interrupted(CellslideError):
    """A clean stop after Ctrl-C (130) or SIGTERM (143); finished tiles are kept."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped; finished tiles are kept, the same command goes on from there")
        self.exit_code = exit_code
