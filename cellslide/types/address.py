"""A web address in the place of a path: where a slide lies that is on no disk here."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):[\\/]+")


class Address(type(Path())):  # type: ignore[misc]
    """A web address that is passed on as a path and written as an address, with both slashes; no file is there."""

    def __str__(self) -> str:
        return _SCHEME.sub(r"\1://", super().__str__(), count=1).replace("\\", "/")

    def exists(self, **_: bool) -> bool:
        """Return that no file is there; the disk is not asked."""
        return False

    is_dir = is_file = exists


def is_address(text: str) -> bool:
    """Tell whether a text begins as an address does: https://, s3:// and so on."""
    found = _SCHEME.match(text)
    return found is not None and found[0].endswith("//")


def to_path(text: str) -> Path:
    """Return the path, or the address, that a record holds as text."""
    return Address(text) if is_address(text) else Path(text)


def full_name(path: Path) -> str:
    """Return a path from the root, an address as it is: what records hold, as another folder would change the rest."""
    return str(path) if isinstance(path, Address) else os.path.abspath(path)
