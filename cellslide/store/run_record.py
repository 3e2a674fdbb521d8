"""The run record: `RunRecord` <-> `run.json`, and what identifies a run to be resumed."""

from __future__ import annotations

import json
import platform
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from cellslide.errors import SlideError, short
from cellslide.store import file_list
from cellslide.store.atomic import write_json
from cellslide.store.foreign_files import read_json
from cellslide.types import WORDS, BatchSize, Check, Counts, FailedTile, RunRecord, Seconds, Verdict, WeightsRef

# The two that every finished slide's folder holds.
RUN_FILE, TABLE = "run.json", "cells.zarr"
# Beside what an interrupted run keeps: the settings that it was made with.
FINGERPRINT_FILE = "fingerprint.json"
_CHECKSUM = "crc32"

# Settings that choose how or where a run is done, not what it finds.
_NOT_THE_RESULT = (
    "config.infer.",
    "config.output.",
    "config.model",
    "config.weights",
    "config.mpp",
    "config.allow_fluorescence",
    "config.spec.weights_",
    # How cells were typed, or read for their vectors, afterwards.
    "config.classify.",
    "config.embed.",
)


def now_utc() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def plain(value: Any) -> Any:
    """Turn dataclasses, paths and tuples into what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def to_dict(record: RunRecord) -> dict[str, Any]:
    """Return the record as `run.json` holds it; `error` only where there is one."""
    content: dict[str, Any] = plain(record)
    if record.error is None:
        del content["error"]
    return content


def from_dict(content: Mapping[str, Any]) -> RunRecord:
    """Return the record that `to_dict` gave; raises SlideError for anything that is none."""
    try:
        known = {f.name for f in fields(RunRecord)}
        values = {k: v for k, v in content.items() if k in known}
        values["weights"] = [WeightsRef(**w) for w in content["weights"]]
        values["counts"] = Counts(**content["counts"])
        # Records of earlier versions have none.
        values["batch_size"] = BatchSize(**content.get("batch_size") or {})
        values["verdict"] = _verdict(content.get("verdict"))
        values["failed_tiles"] = [FailedTile(**t) for t in content["failed_tiles"]]
        values["seconds"] = Seconds(**content["seconds"])
        record = RunRecord(**values)
        _check_values(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SlideError(
            f"not a run record ({type(error).__name__}: {short(error)}); --overwrite starts anew"
        ) from error
    return record


def _verdict(content: Mapping[str, Any] | None) -> Verdict | None:
    """Return the verdict of a record; None where there is none. Raises ValueError for a word that is none."""
    if content is None:
        return None
    verdict = Verdict(content["word"], tuple(Check(**check) for check in content["checks"]))
    if not {verdict.word, *(check.word for check in verdict.checks)} <= {*WORDS}:
        raise ValueError("a word of the verdict is none")
    texts = [text for check in verdict.checks for text in (check.name, check.expected, check.advice)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text of the verdict is none")
    if not all(isinstance(check.value, (str, int, float)) for check in verdict.checks):
        raise TypeError("a value of the verdict is none")
    return verdict


def _check_values(record: RunRecord) -> None:
    """Raise ValueError or TypeError where a value is not of its kind, or a number not one that a run can give."""
    for name in ("slide", "config"):
        if not isinstance(getattr(record, name), dict):
            raise TypeError(f"{name} is no mapping")
    texts = [getattr(record, name) for name in ("cellslide_version", "device", "engine", "precision", "started")]
    texts += [text for w in record.weights for text in (w.id, w.sha256, w.licence)]
    texts += [tile.error for tile in record.failed_tiles]
    texts += [text for text in (record.finished, record.error) if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text is none")
    if record.status not in ("running", "interrupted", "done", "done_with_errors", "failed"):
        raise ValueError(f"the status {short(record.status)} is none")
    counts = [getattr(record.counts, f.name) for f in fields(Counts)]
    counts += [record.peak_rss_bytes, record.peak_device_bytes]
    counts += [place for tile in record.failed_tiles for place in (abs(tile.x), abs(tile.y))]
    counts += [n for n in plain(record.batch_size).values() if n is not None]
    if not all(isinstance(n, int) and 0 <= n < 1 << 60 for n in counts):
        raise ValueError("a count is none")
    if not all(0 <= float(getattr(record.seconds, f.name)) < 1e12 for f in fields(Seconds)):
        raise ValueError("a time is none")
    if not 0 <= float(record.searched_mm2 or 0) < 1e12:
        raise ValueError("searched_mm2 is none")
    _check_slide(record.slide)
    for name in ("classify", "embed", "output", "spec", "tissue"):
        if not isinstance(record.config.get(name) or {}, dict):
            raise TypeError(f"config.{name} is no mapping")


def _check_slide(slide: dict[str, Any]) -> None:
    for name in ("path", "sha256_head", "vendor", "mpp_source"):
        if not isinstance(slide.get(name), (str, type(None))):
            raise TypeError(f"slide.{name} is no text")
    # A table that was made of an image has no slide.
    if slide and (not slide.get("path") or "\0" in slide["path"]):
        raise ValueError("slide.path is none")
    for name in ("mpp", "width", "height"):
        value = slide.get(name)
        if value is not None and (not isinstance(value, (int, float)) or not 0 < value < 1 << 31):
            raise ValueError(f"slide.{name} {short(value)} is none")


def write_record(folder: Path, record: RunRecord) -> Path:
    """Write `run.json` into the slide's folder, for a complete slide with the list of its files; return its path."""
    path, content = folder / RUN_FILE, to_dict(record)
    if record.status in ("done", "done_with_errors"):
        content[file_list.KEY] = file_list.listed(folder)
    write_json(path, content)
    return path


def read_record(folder: Path) -> RunRecord | None:
    """Return the record of a slide's folder, or None where there is none.

    Raises SlideError when there is a file that is no run record.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        record = from_dict(read_json(path))
        if not record.slide:
            raise SlideError("not a run record (it names no slide); --overwrite starts anew")
        return record
    except SlideError as error:
        words = str(error).removeprefix(f"{path}: ")
        hint = "" if "--overwrite" in words else "; --overwrite starts anew"
        words = words if words.startswith("not a run record") else f"not a run record ({words})"
        raise SlideError(f"{path}: {words}{hint}") from error


def fingerprint(record: RunRecord) -> dict[str, str]:
    """Return what decides the result, as flat text: version, weights, slide, tissue, tiles, decode, engine, precision.

    Two runs with equal fingerprints may share finished tiles; device, batch size, workers and formats are left out, and
    so is what typed the cells afterwards.
    """
    flat = {k: v for k, v in flatten({"config": record.config}).items() if not k.startswith(_NOT_THE_RESULT)}
    for name in ("mask", "roi"):
        flat.pop(f"config.tissue.{name}", None)  # What is in the file decides, not where it lies.
    flat["cellslide_version"] = record.cellslide_version
    flat["engine"], flat["precision"] = record.engine, record.precision
    for key in ("sha256_head", "mpp"):
        flat[f"slide.{key}"] = str(record.slide[key])
    classifier = record.config.get("classify", {}).get("spec", {}).get("weights_id")
    later = {classifier, *(read.get("weights.id") for read in record.config.get("embed", {}).values())}
    later.discard(record.config.get("spec", {}).get("weights_id"))
    for i, weights in enumerate(w for w in record.weights if w.id not in later):
        _flatten(f"weights.{i}", {"id": weights.id, "sha256": weights.sha256}, flat)
    return flat


def flatten(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return nested settings as flat text, keys joined by dots."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        _flatten(key, plain(value), flat)
    return flat


def _flatten(prefix: str, value: Any, into: dict[str, str]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        into[prefix] = str(value)
        return
    for key, item in items:
        _flatten(f"{prefix}.{key}", item, into)


def differences(old: Mapping[str, str], new: Mapping[str, str], most: int = 4) -> str:
    """Return in words where two fingerprints differ, at most `most` entries, or "" where they do not."""
    keys = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    words = [f"{k}: {old.get(k, 'absent')} then, {new.get(k, 'absent')} now" for k in keys[:most]]
    return "; ".join(words) + (f"; and {len(keys) - most} more" if len(keys) > most else "")


def write_fingerprint(folder: Path, fingerprint: Mapping[str, str]) -> None:
    """Keep a fingerprint in `folder`, with its checksum."""
    write_json(folder / FINGERPRINT_FILE, {_CHECKSUM: _checksum(fingerprint), **fingerprint})


def _checksum(fingerprint: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(fingerprint, sort_keys=True).encode()):08x}"


def changed_since(folder: Path, fingerprint: Mapping[str, str], anew: str) -> str:
    """Return in words where a fingerprint differs from the one kept in `folder`, or "".

    anew  what --overwrite does, for the SlideError that a damaged file raises.
    """
    path = folder / FINGERPRINT_FILE
    try:
        found = read_json(path)
    except SlideError as error:
        raise SlideError(f"{path}: damaged ({short(error)}); --overwrite {anew}") from error
    if not isinstance(found, dict):
        raise SlideError(f"{path}: damaged (no mapping); --overwrite {anew}")
    if found.pop(_CHECKSUM, None) != _checksum(found):
        raise SlideError(f"{path}: damaged (its checksum differs); --overwrite {anew}")
    return differences(found, fingerprint)


def peak_rss_bytes() -> int:
    """Return the most memory this process has held (bytes); worker processes are not counted."""
    if platform.system() == "Windows":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    status = Path("/proc/self/status")
    if status.is_file():
        # The high water mark of this program alone: Linux's ru_maxrss begins with that of the process it came from.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
