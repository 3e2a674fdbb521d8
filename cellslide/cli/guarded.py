"""One loop over folders for commands that look at results: what is wrong with one never ends the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from cellslide.errors import CellslideError, Interrupted, UsageError, in_words, one_line

log = logging.getLogger(__name__)


def each(folders: Iterable[Path], work: Callable[[Path], None]) -> list[Path]:
    """Do the work of every folder and return those that failed; each failure is one line on stderr.

    Raises UsageError where that is what went wrong with all of them.
    """
    failed: dict[Path, Exception] = {}
    done = 0
    for folder in folders:
        try:
            work(folder)
            done += 1
        except (Interrupted, BrokenPipeError):
            raise
        except Exception as error:
            log.debug("%s failed", folder, exc_info=error)
            failed[folder] = error
            words = in_words(error)
            named = words if str(folder) in words else f"{folder}: {words}"
            click.echo(f"cellslide: {one_line(named)}", err=True)
    wrong = [error for error in failed.values() if isinstance(error, UsageError)]
    if wrong and not done and len(wrong) == len(failed):
        raise wrong[0]
    return list(failed)


def refuse(failed: list[Path], what: str) -> None:
    """Raise CellslideError where some folders failed, naming them."""
    if failed:
        few = ", ".join(map(str, failed[:20])) + (", ..." if len(failed) > 20 else "")
        raise CellslideError(f"{len(failed)} {what}: {few}")
