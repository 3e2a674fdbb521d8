"""Which slide of one output folder belongs to which of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cellslide.errors import UsageError
from cellslide.formats.verify import find_folders


@dataclass(frozen=True, slots=True)
class Pair:
    """The folders of one slide in both results."""

    slide_id: str
    first: Path
    second: Path


def pair_folders(first: Path, second: Path) -> tuple[list[Pair], list[str], list[str]]:
    """Return the slides that both hold, and the names of those that only the first or only the second holds.

    Two folders of single slides are a pair whatever their names; output folders are paired by the slides' names.
    Raises UsageError where a folder holds no slide, or both have none in common.
    """
    sides = [find_folders([folder]) for folder in (first, second)]
    if sides[0] == [first] and sides[1] == [second]:
        return [Pair(second.resolve().name, first, second)], [], []
    names: Sequence[dict[str, Path]] = [{folder.resolve().name: folder for folder in side} for side in sides]
    both = [Pair(name, names[0][name], names[1][name]) for name in names[0] if name in names[1]]
    if not both:
        raise UsageError(f"{first} and {second} have no slide in common: folders are paired by their names")
    alone = [[name for name in names[k] if name not in names[1 - k]] for k in (0, 1)]
    return both, alone[0], alone[1]
