"""Getting weights onto this machine: download with consent, or take in a file that the user has."""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from cellslide.errors import UsageError, WeightsError
from cellslide.store.atomic import beside
from cellslide.weights.cache import WeightsBytes, cache_dir, file_sha256, find_file, how_to_get, verify_file
from cellslide.weights.classifier import LoadedClassifier, load_classifier
from cellslide.weights.load import FINDERS, LoadedModel, entry_beside, load_entry, load_file, resolve_path
from cellslide.weights.manifest import ENTRY_FILE, Manifest, Source, WeightsEntry

CHUNK_BYTES = 1 << 20
Ask = Callable[[str], bool]
Progress = Callable[[int, int | None], None]


def is_offline() -> bool:
    """Tell whether the user forbade the network with HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def fetch(entry: WeightsEntry, accept: str | None, ask: Ask, progress: Progress | None = None) -> Path:
    """Download `entry` after its licence was accepted, check it, and return the file; a present file is only checked.

    accept  licence name given on the command line; ask is called where it is None.
    Raises UsageError without consent, WeightsError when the file may not or cannot be fetched.
    """
    path = find_file(entry)
    if path is None:
        path = _download(entry, accept, ask, progress)
    verify_file(entry, path, fresh=True)
    return path


def _download(entry: WeightsEntry, accept: str | None, ask: Ask, progress: Progress | None) -> Path:
    source = entry.source
    if source is None or source.kind == "user":
        raise WeightsError(f"{entry.id} is not on this machine: {how_to_get(entry)}")
    if is_offline():
        raise WeightsError(
            f"{entry.id}: HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or {how_to_get(entry)}"
        )
    _consent(entry, accept, ask)
    return _from_hub(entry, source) if source.kind == "hub" else _from_url(entry, source, progress)


def _consent(entry: WeightsEntry, accept: str | None, ask: Ask) -> None:
    licence = entry.licence or "none-stated"
    if accept is None:
        if not ask(licence):
            raise UsageError(f"{entry.id}: the licence was not accepted; --accept-licence '{licence}' accepts it")
    elif accept.strip().lower() != licence.lower():
        raise UsageError(f"--accept-licence {accept}: {entry.id} is under '{licence}'")


def _from_hub(entry: WeightsEntry, source: Source) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(source.hub or "", source.file or "", revision=source.revision))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        # The hub answers "not found" where a private or gated repository is not shown to this account.
        raise WeightsError(f"{entry.id}: the hub refused access; {how_to_get(entry)}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(
            f"{entry.id}: the hub cannot be reached ({type(error).__name__}); {how_to_get(entry)}"
        ) from error


def _from_url(entry: WeightsEntry, source: Source, progress: Progress | None) -> Path:
    target = cache_dir() / entry.id / (entry.file_name or "weights.pth")
    try:
        with beside(target) as scratch:
            with urllib.request.urlopen(source.url or "", timeout=60) as answer, scratch.open("wb") as file:
                length = answer.headers.get("Content-Length")
                _copy(answer, file, int(length) if length else None, progress)
            _check_download(entry, scratch)
    except (urllib.error.URLError, OSError) as error:
        raise WeightsError(f"{entry.id}: {source.url} cannot be fetched ({error}); {how_to_get(entry)}") from error
    return target


def _copy(answer, file, total: int | None, progress: Progress | None) -> None:  # type: ignore[no-untyped-def]
    done = 0
    while chunk := answer.read(CHUNK_BYTES):
        file.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress(done, total)
    if total is not None and done != total:
        raise OSError(f"{done} of {total} bytes came")


def _check_download(entry: WeightsEntry, path: Path) -> None:
    """Refuse a wrong file before it is renamed into place."""
    if entry.sha256 is not None and file_sha256(path, fresh=True) != entry.sha256:
        raise WeightsError(f"{entry.id}: what came has another sha256 than {entry.sha256}; nothing was kept")


def add_weights(path: Path, name: str | None, manifest: Manifest) -> WeightsEntry:
    """Copy weights into the cache, so that `--model` finds them, and return their entry.

    `path` is a `.pth` or `.safetensors` file, or a folder of `cellslide train`. With the id of a known entry the file
    is taken as that one; else a new entry is written beside it. The file is loaded once, so what was added works.
    Raises UsageError when the id is taken, WeightsError when the file is not usable.
    """
    known = manifest.entries.get(name) if name else None
    if known is not None:
        return _add_known(known, path)
    loaded = _load_any(path, manifest)
    entry = replace(loaded.entry, id=name or loaded.entry.id)
    if entry.id in manifest.entries:
        raise UsageError(f"--id {entry.id}: taken already; give another --id")
    return _store_new(entry, loaded)


def _load_any(path: Path, manifest: Manifest) -> LoadedModel | LoadedClassifier:
    """Load a file of either kind: by its `model.yaml`, else by the names of its tensors."""
    from cellslide.models.checkpoint import read_tensors
    from cellslide.models.registry import guess_architecture

    file = resolve_path(path)
    beside = entry_beside(file)
    found = None if beside else guess_architecture(read_tensors(file)[0])
    task = beside.task if beside else found.task if found else "segment"
    return load_classifier(weights=file) if task == "classify" else load_file(path, manifest)


def _add_known(entry: WeightsEntry, path: Path) -> WeightsEntry:
    if entry.file is not None:
        raise UsageError(f"--id {entry.id}: taken already; give another --id")
    if path.is_dir():
        raise UsageError(f"{path}: {entry.id} takes one file")
    if entry.task in FINDERS:
        load_entry(entry, path)
    elif entry.task == "classify":
        load_classifier(entry.id, path)
    else:
        verify_file(entry, path, fresh=True)
    with beside(cache_dir() / entry.id / (entry.file_name or path.name)) as scratch:
        shutil.copyfile(path, scratch)
        WeightsBytes.read(scratch, entry)
    return entry


def _store_new(entry: WeightsEntry, loaded: LoadedModel | LoadedClassifier) -> WeightsEntry:
    """Write file and entry to a new folder of the cache, whole or not at all."""
    file = entry.root / (entry.file or "")
    size, root = file.stat().st_size, cache_dir()
    entry = replace(
        entry, file=file.name, source=None, sha256=loaded.spec.weights_sha256, size_bytes=size, root=root / entry.id
    )
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".add-") as scratch:
        made = Path(scratch) / "entry"
        made.mkdir()
        shutil.copyfile(file, made / file.name)
        WeightsBytes.read(made / file.name, entry)
        (made / ENTRY_FILE).write_text(yaml.safe_dump(entry.as_dict(), sort_keys=False), encoding="utf-8")
        try:
            made.rename(entry.root)
        except OSError as error:
            raise UsageError(f"--id {entry.id}: {entry.root} is in the way ({error.strerror})") from error
    return entry
