"""Where weights lie on this machine, and whether they are the ones they claim to be.

Order: a file inside the package, then $CELLSLIDE_CACHE/<id>/, then the hub's own cache, read without network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from cellslide.errors import WeightsError
from cellslide.store.atomic import write_text
from cellslide.store.foreign_files import read_json
from cellslide.weights.manifest import ENTRY_FILE, WeightsEntry

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
HASHES = "hashes.json"
TRUST = "trust.json"

log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Return the folder for weights and other things made once: $CELLSLIDE_CACHE, else the user's cache folder.

    The folder is not created.
    """
    named = os.environ.get("CELLSLIDE_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(user_cache_dir("cellslide", appauthor=False, opinion=False))


def find_file(entry: WeightsEntry) -> Path | None:
    """Return the file of `entry` on this machine, or None; no network is used."""
    if entry.file is not None:
        path = entry.root / entry.file
        if path.is_file() and _is_inside(path, entry.root):
            return path
    return _in_cache(entry) or _in_hub_cache(entry)


def _is_inside(path: Path, root: Path) -> bool:
    """Tell whether `path` stays below `root` when links are followed."""
    return path.resolve().is_relative_to(root.resolve())


def _in_cache(entry: WeightsEntry) -> Path | None:
    folder = cache_dir() / entry.id
    if entry.file_name and (folder / entry.file_name).is_file():
        return folder / entry.file_name
    if not folder.is_dir() or (folder / ENTRY_FILE).is_file():
        return None
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(found) > 1:
        raise WeightsError(
            f"{folder} holds {len(found)} files for {entry.id}: keep one of {', '.join(p.name for p in found)}"
        )
    return found[0] if found else None


def _in_hub_cache(entry: WeightsEntry) -> Path | None:
    source = entry.source
    if source is None or source.hub is None or source.file is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.hub, source.file, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def require_file(entry: WeightsEntry) -> Path:
    """Return the file of `entry`; raises WeightsError that says how to get it."""
    path = find_file(entry)
    if path is None:
        raise WeightsError(f"{entry.id} is not on this machine: {how_to_get(entry)}")
    return path


def how_to_get(entry: WeightsEntry) -> str:
    """Return the steps from nothing to a usable file, as one line."""
    place = cache_dir() / entry.id
    source = entry.source
    if source is None:
        remedy = "reinstall cellslide, or name other weights with --model or --weights"
        return f"{entry.file} is missing from {entry.root}; {remedy}"
    terms = entry.licence or "none stated"
    if source.kind == "hub":
        page = entry.page or f"https://huggingface.co/{source.hub}"
        consent = f"(1) ask for access at {page}, (2) `hf auth login` or HF_TOKEN, (3) " if entry.gated else ""
        return (
            f"{'gated, ' if entry.gated else ''}licence {terms}; {consent}`cellslide weights fetch {entry.id}`;"
            f" without network: copy {source.file} into {place}"
        )
    if source.kind == "url":
        return f"licence {terms}; `cellslide weights fetch {entry.id}`, or copy {entry.file_name} into {place}"
    return (
        f"licence {terms}; it may not be fetched for you: (1) get {entry.file_name or 'the file'} from"
        f" {entry.page or 'its authors'}, (2) `cellslide weights add FILE --id {entry.id}`,"
        " or give it with --weights FILE"
    )


def file_sha256(path: Path, fresh: bool = False) -> str:
    """Return the sha256 of a file; unless `fresh` it is remembered in the cache folder, for lists that load nothing.

    Size and time alone would not do: copies that keep the time have them too, but neither the same inode nor its time.
    """
    stat = path.stat()
    key, mark = str(path.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    known = _read_json(cache_dir() / HASHES)
    row = known.get(key)
    if not fresh and isinstance(row, list) and row[:-1] == mark:
        return str(row[-1])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _write_json(cache_dir() / HASHES, {**_read_json(cache_dir() / HASHES), key: [*mark, digest]})
    return digest


@dataclass(frozen=True, slots=True)
class WeightsBytes:
    """A weights file read once: what is hashed is what is loaded, whatever happens to the file meanwhile."""

    path: Path
    data: bytes
    sha256: str

    @classmethod
    def read(cls, path: Path, entry: WeightsEntry | None = None) -> WeightsBytes:
        """Read a file whole, and check it against its entry as `verify_file` does; raises WeightsError."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
        digest = hashlib.sha256(data).hexdigest()
        if entry is not None:
            _check_size(entry, path, len(data))
            _check_digest(entry, path, digest)
        return cls(path, data, digest)


def verify_file(entry: WeightsEntry, path: Path, fresh: bool = False) -> str:
    """Check `path` against the manifest, or against its first use where the manifest has no hash; return the sha256.

    Raises WeightsError when they differ.
    """
    _check_size(entry, path, path.stat().st_size)
    return _check_digest(entry, path, file_sha256(path, fresh))


def _check_size(entry: WeightsEntry, path: Path, size: int) -> None:
    if entry.size_bytes is not None and size != entry.size_bytes:
        raise WeightsError(f"{path}: {size} bytes, {entry.id} has {entry.size_bytes}: get it anew")


def _check_digest(entry: WeightsEntry, path: Path, digest: str) -> str:
    if entry.sha256 is not None:
        if digest != entry.sha256:
            raise WeightsError(f"{path}: sha256 {digest}, {entry.id} has {entry.sha256}: it is another file or damaged")
        return digest
    return _verify_trust(entry, path, digest)


def _verify_trust(entry: WeightsEntry, path: Path, digest: str) -> str:
    store = cache_dir() / TRUST
    trusted = _read_json(store)
    known = trusted.get(entry.id)
    if known is None:
        log.info("%s: no hash is published, so %s is trusted from now on (%s)", entry.id, path.name, digest[:12])
        _write_json(store, {**trusted, entry.id: digest})
    elif known != digest:
        raise WeightsError(
            f"{path}: sha256 {digest}, but {entry.id} was {known} when first used: if you replaced the file on purpose,"
            f" `cellslide weights verify {entry.id} --trust`"
        )
    return digest


def forget_trust(entry: WeightsEntry) -> None:
    """Drop what was recorded at the first use of `entry`."""
    trusted = _read_json(cache_dir() / TRUST)
    if trusted.pop(entry.id, None) is not None:
        _write_json(cache_dir() / TRUST, trusted)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, WeightsError)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except WeightsError as error:
        raise WeightsError(f"{error}; remove it") from error
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps(content, indent=1, sort_keys=True))
    except OSError as error:
        # A read-only cache costs time, and trust on first use, but must not stop a run.
        log.warning("%s cannot be written (%s): hashes are not remembered; set CELLSLIDE_CACHE", path, error)
