"""Paths as workers need them, who stand in other folders than the one in which the command was given."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def absolute(record: T) -> T:
    """Return a record with all its paths absolute, those of the records in it too."""
    if isinstance(record, Path):
        return record.absolute()
    if not is_dataclass(record) or isinstance(record, type):
        return record
    settings: Any = record
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.init}
    changed = {
        name: absolute(value) for name, value in values.items() if isinstance(value, Path) or is_dataclass(value)
    }
    found: T = replace(settings, **changed)
    return found
