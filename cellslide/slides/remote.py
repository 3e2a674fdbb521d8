"""Slides at web addresses as the user names them; nothing here goes over the network, and no secret leaves an address.

What is shown and recorded is the address without user, password and query, in which signatures stand.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from cellslide.errors import UsageError, one_line
from cellslide.types.address import Address

SCHEMES = ("https", "http", "s3")
# Slides of many files, of which an address names one.
MANY_FILES = (".zarr", ".mrxs", ".vms", ".vmu", ".dcm")
# Parts of a query that are made anew for each signature; names of the three large stores, and what others call them.
_SIGNED = re.compile(
    r"x-(amz|goog|ms)-|awsaccesskeyid|googleaccessid|(sig|signature|expires|policy|token|key-pair-id)$"
)


@dataclass(frozen=True, slots=True)
class Remote:
    """What is fetched: the whole address, which may hold secrets, and the SHA-256 that a list gives of the file."""

    address: str = field(repr=False)
    sha256: str | None = None

    @property
    def known_by(self) -> str:
        """What of an address stays when it is signed anew, hashed: it shows nothing of a secret."""
        parts = urlsplit(self.address)
        query = [(name, value) for name, value in parse_qsl(parts.query) if not _SIGNED.match(name.lower())]
        return hashlib.sha256(f"{_plain(self.address)}?{urlencode(query)}".encode()).hexdigest()


def to_remote(text: str, sha256: str | None = None) -> tuple[Address, Remote]:
    """Return an address for records, and all of it for fetching; raises UsageError for one that names no slide file."""
    shown = one_line(_plain(text))
    scheme = shown.partition(":")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UsageError(f"{shown}: slides are fetched from {known}; copy this one to a file first")
    path = Address(shown)
    if not urlsplit(text).netloc or len(path.parts) < 3:
        raise UsageError(f"{shown}: names no file; give the whole address of one slide")
    if path.suffix.lower() in MANY_FILES:
        raise UsageError(f"{shown}: a slide of many files is not fetched; copy it to a folder first and name that")
    return path, Remote(text, sha256)


def file_name(path: Path) -> Path:
    """Return the name of the file that an address names, without what stands for other characters."""
    return Path(Path(unquote(path.name)).name)


def _plain(address: str) -> str:
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
