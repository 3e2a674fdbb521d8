"""The manifest: one record per set of weights, read strictly from YAML.

An unknown key is an error, since a misspelt one would otherwise be ignored; a path may not leave its folder.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from cellslide.errors import UsageError, WeightsError, short
from cellslide.store import foreign_files
from cellslide.types import ClassSpec, DetectDecode, HoverDecode

SCHEMA_VERSION = 1
PACKAGE = Path(__file__).resolve().parent.parent
ENTRY_FILE = "model.yaml"

Task = Literal["segment", "detect", "classify", "backbone"]
Triple = tuple[float, float, float]
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights come from: a file of a hub repository, an https URL, or (neither) the user.

    revision  full commit of the hub repository; None takes the newest, and the file is then held by trust on first use.
    """

    hub: str | None = None
    revision: str | None = None
    file: str | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        if self.hub and not self.file:
            raise ValueError("source: a hub repository needs `file`")
        if self.url and not self.url.startswith("https://"):
            raise ValueError(f"source: {self.url} is not an https URL")
        _check_inside(self.file, "source.file")

    @property
    def kind(self) -> Literal["hub", "url", "user"]:
        """Who can get the file: the hub library, a plain download, or only the user."""
        return "hub" if self.hub else "url" if self.url else "user"


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """A data set that the weights have seen, and its licence."""

    dataset: str
    licence: str | None = None


@dataclass(frozen=True, slots=True)
class WeightsEntry:
    """One set of weights; field names are the keys of the YAML.

    file        path inside the package, or beside the entry for weights that a user added or trained.
    sha256      None where nobody of the project could read the file: it is trusted on first use, see `cache`.
    licence     None where the source states none.
    config      changes to the defaults of `arch`; empty means that sizes are read from the tensors.
    classes     without background, in the order of the network's channels.
    gated       the source asks for an account and for consent.
    page, published_as  where a person finds the file and its terms, and its name there.
    decode      how maps become masks; detect: which queries of a box or point model count.
    bf16_on_cpu scores hold in bf16, which CPUs that compute in it then take.
    calibration, safe_gate  for classifiers.
    root        folder that `file` is relative to; not a key.
    """

    id: str
    task: Task
    arch: str
    licence: str | None = None
    file: str | None = None
    source: Source | None = None
    page: str | None = None
    published_as: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    gated: bool = False
    summary: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    mpp: float | None = None
    tile_px: int | None = None
    overlap_px: int | None = None
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    classes: tuple[ClassSpec, ...] = ()
    organs: tuple[str, ...] = ()
    trained_on: tuple[TrainedOn, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    decode: HoverDecode | None = None
    detect: DetectDecode | None = None
    bf16_on_cpu: bool = False
    calibration: Mapping[str, Any] | None = None
    safe_gate: Mapping[str, Any] | None = None
    citation: str = ""
    root: Path = PACKAGE

    def __post_init__(self) -> None:
        if not is_id(self.id):
            raise ValueError(f"id {short(self.id)}: letters, digits, dots, hyphens and underscores only")
        if self.task not in get_args(Task):
            raise ValueError(f"task {short(self.task)}: must be one of {', '.join(get_args(Task))}")
        if self.file is None and self.source is None:
            raise ValueError("needs `file` or `source`")
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ValueError("sha256 must be 64 lower-case hex digits, or null")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        for name, low, high in _RANGES:
            _check_range(name, getattr(self, name), low, high)
        _check_numbers(self)
        _check_inside(self.file, "file")
        if self.published_as is not None and PurePosixPath(self.published_as).name != self.published_as:
            raise ValueError(f"published_as {short(self.published_as)}: must be a file name")

    @property
    def in_package(self) -> bool:
        """Whether the file comes with the package."""
        return self.file is not None and self.root == PACKAGE

    @property
    def file_name(self) -> str | None:
        """Name under which the file is published or stored, if the manifest knows one."""
        source = self.source or Source()
        named = self.file or self.published_as or source.file or (source.url or "").rsplit("/", 1)[-1]
        return PurePosixPath(named).name or None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for YAML, without empty keys."""
        raw = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "root"}
        raw["source"] = _source_as_yaml(self.source)
        raw["classes"] = [{"name": c.name, "color": list(c.color)} for c in self.classes]
        raw["trained_on"] = [asdict(t) for t in self.trained_on]
        raw["decode"] = _lean(asdict(self.decode)) if self.decode else None
        raw["detect"] = asdict(self.detect) if self.detect else None
        kept = ("licence", "sha256", "size_bytes")
        return {k: _plain(v) for k, v in raw.items() if k in kept or v not in (None, "", (), [], {})}


def _source_as_yaml(source: Source | None) -> Any:
    if source is None or source.kind == "hub":
        return _lean(asdict(source)) if source else None
    return source.url or "user"


def _lean(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _plain(v) for k, v in values.items() if v is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


# Numbers of an entry, and between what they lie.
_RANGES = (
    ("mpp", 0.05, 2.0), ("tile_px", 32, 8192), ("overlap_px", 0, 4096), ("size_bytes", 1, 1 << 42), ("mean", -10, 10),
    ("std", 1e-4, 1e3),
)  # fmt: skip
_DECODE_RANGES = (
    ("kernel_px", 1, 101), ("min_marker_px", 0, 100_000), ("min_object_px", 0, 100_000), ("energy_threshold", 0.0, 1.0),
    ("foreground_threshold", 0.0, 1.0), ("hv_gradient_range", -1e6, 1e6),
)  # fmt: skip
_DETECT_RANGES = (("score_threshold", 0.0, 1.0), ("nms_um", 0.0, 100.0))
_CALIBRATION_RANGES = (
    ("temperature_local", 1e-3, 1e3), ("temperature_global", 1e-3, 1e3), ("temperature_mix", 1e-3, 1e3),
    ("abstain", 0.0, 1.0), ("thresholds", 0.0, 1.0), ("abstain_unseen", 0.0, 1.0), ("accuracy_unseen", 0.0, 1.0),
    ("class_prior", 0.0, 1.0),
)  # fmt: skip
_SAFE_GATE_RANGES = (
    ("tau", 0.0, 1.0), ("gamma", -1.0, 1.0), ("reliability_local", 0.0, 1e3), ("reliability_global", 0.0, 1e3),
)  # fmt: skip
_LARGEST = 1e9


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError for a number, or one of several, that is none or lies outside of low..high."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else (value,)
    for number in values:
        # NaN is within no range, and True no number.
        if number is None:
            continue
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or not low <= number <= high:
            words = f"above 0, at most {high:g}" if 0 < low < 0.01 else f"{low:g} to {high:g}"
            raise ValueError(f"{name} {short(number)}: must be {words}")


def _check_numbers(entry: WeightsEntry) -> None:
    """Raise ValueError where a number in one of the parts of an entry is out of its range."""
    if entry.tile_px is not None and entry.overlap_px is not None and entry.overlap_px > entry.tile_px // 2:
        raise ValueError(f"overlap_px {entry.overlap_px}: must be at most half of tile_px {entry.tile_px}")
    if entry.decode is not None and entry.decode.mode not in ("published", "fixed"):
        raise ValueError(f"decode.mode {short(entry.decode.mode)}: must be published or fixed")
    for part, ranges in (
        (entry.decode, _DECODE_RANGES),
        (entry.detect, _DETECT_RANGES), (entry.calibration, _CALIBRATION_RANGES), (entry.safe_gate, _SAFE_GATE_RANGES),
    ):  # fmt: skip
        for name, low, high in ranges if part is not None else ():
            value = part.get(name) if isinstance(part, Mapping) else getattr(part, name)
            _check_range(name, value, low, high)
    _check_finite("config", entry.config)
    _check_finite("metrics", entry.metrics)


def _check_finite(name: str, value: Any) -> None:
    """Raise ValueError for a number below `value`, however deep, that is not finite or absurdly large."""
    waiting = [(name, value)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{name}.{short(key)}", item) for key, item in value.items()]
        elif isinstance(value, (tuple, list)):
            waiting += [(name, item) for item in value]
        elif isinstance(value, (int, float)) and not -_LARGEST <= value <= _LARGEST:
            raise ValueError(f"{name} {short(value)}: must be a number of at most {_LARGEST:g}")


def _check_inside(path: str | None, key: str) -> None:
    if path is None:
        return
    pure = PurePosixPath(path.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or ":" in path or not pure.parts:
        raise ValueError(f"{key} {short(path)}: must be a path below the manifest's folder")


def is_id(text: str) -> bool:
    """Tell whether weights may be called so: letters, digits, dots, hyphens and underscores, no sign first."""
    return _ID.fullmatch(text) is not None


def parse_entry(raw: Any, root: Path, where: str) -> WeightsEntry:
    """Return the record of one YAML entry; raises WeightsError that names the entry and what is wrong."""
    if not isinstance(raw, Mapping):
        raise WeightsError(f"{where}: an entry must be a mapping")
    name = raw.get("id", "entry without id")
    where = f"{where}: {name[:80] if isinstance(name, str) else short(name)}"
    _refuse_unknown(raw, {f.name for f in fields(WeightsEntry)} - {"root"}, where)
    values = {k: v for k, v in raw.items() if v is not None}
    try:
        for key, convert in _CONVERT.items():
            if key in values:
                values[key] = convert(values[key])
        return WeightsEntry(root=root, **values)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{where}: {str(error)[:300]}") from error


def _refuse_unknown(raw: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(short(key) if not isinstance(key, str) else key[:60] for key in raw if key not in set(known))
    if unknown:
        raise WeightsError(f"{where}: unknown keys {', '.join(unknown)[:300]}")


def _source(raw: Any) -> Source:
    if isinstance(raw, str):
        return Source() if raw == "user" else Source(url=raw)
    return Source(**raw)


def _triple(raw: Any) -> Triple:
    r, g, b = (float(v) for v in raw)
    return r, g, b


def _classes(raw: Any) -> tuple[ClassSpec, ...]:
    classes = []
    for item in raw:
        _refuse_unknown(item, ("name", "color"), "classes")
        r, g, b = (int(v) for v in item["color"])
        if not all(0 <= v <= 255 for v in (r, g, b)):
            raise ValueError(f"class {item['name']}: color must be three numbers from 0 to 255")
        classes.append(ClassSpec(str(item["name"]), (r, g, b)))
    if len({c.name for c in classes}) != len(classes):
        raise ValueError("two classes have one name")
    return tuple(classes)


def _trained_on(raw: Any) -> tuple[TrainedOn, ...]:
    return tuple(TrainedOn(**item) for item in raw)


def _decode(raw: Any) -> HoverDecode:
    values = dict(raw)
    if values.get("hv_gradient_range") is not None:
        low, high = values["hv_gradient_range"]
        values["hv_gradient_range"] = (float(low), float(high))
    return HoverDecode(**values)


def _detect(raw: Any) -> DetectDecode:
    return DetectDecode(**{name: float(value) for name, value in dict(raw).items()})


def _mapping(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{short(raw)} is not a mapping")
    return dict(raw)


def _strings(raw: Any) -> tuple[str, ...]:
    return tuple(str(v) for v in raw)


_CONVERT: dict[str, Any] = {
    "id": str, "file": str, "source": _source, "config": _mapping, "mpp": float, "mean": _triple, "std": _triple,
    "classes": _classes, "organs": _strings, "trained_on": _trained_on, "metrics": _mapping, "decode": _decode,
    "detect": _detect,
    "calibration": _mapping, "safe_gate": _mapping, "gated": bool, "size_bytes": int, "tile_px": int, "overlap_px": int,
    "bf16_on_cpu": bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Manifest:
    """All known weights by id, and which ones ship as defaults of a task."""

    entries: Mapping[str, WeightsEntry]
    defaults: Mapping[str, str]

    @classmethod
    def load(cls, path: Path | None = None, user: Path | None = None) -> Manifest:
        """Read the manifest of the package, and the entries that the user added below `user` (default: the cache).

        Raises WeightsError for a manifest that is missing, damaged, of another schema, or has unknown keys.
        """
        from cellslide.weights.cache import cache_dir

        manifest = cls.parse(*_read_packaged(path))
        added = read_added(cache_dir() if user is None else user)
        clash = sorted(set(added) & set(manifest.entries))
        if clash:
            raise WeightsError(
                f"{added[clash[0]].root}: the id {clash[0]} is taken by the package's manifest; remove it"
            )
        return replace(manifest, entries={**manifest.entries, **added})

    @classmethod
    def parse(cls, raw: Any, where: str, root: Path = PACKAGE) -> Manifest:
        """Check and convert a manifest as YAML gives it."""
        if not isinstance(raw, Mapping) or raw.get("schema_version") != SCHEMA_VERSION:
            raise WeightsError(f"{where}: not a weights manifest of schema_version {SCHEMA_VERSION}")
        _refuse_unknown(raw, ("schema_version", "defaults", "weights"), where)
        entries = [parse_entry(item, root, where) for item in raw.get("weights") or ()]
        by_id = {entry.id: entry for entry in entries}
        if len(by_id) != len(entries):
            raise WeightsError(f"{where}: an id is given twice")
        defaults = {str(task): str(name) for task, name in (raw.get("defaults") or {}).items() if name is not None}
        _refuse_unknown(defaults, get_args(Task), f"{where}: defaults")
        for task, name in defaults.items():
            if name not in by_id or by_id[name].task != task:
                raise WeightsError(f"{where}: defaults.{task} is {name}, which is no {task} entry")
        return cls(by_id, defaults)

    def entry(self, name: str) -> WeightsEntry:
        """Return the entry called `name`; raises UsageError with near matches."""
        if name in self.entries:
            return self.entries[name]
        from difflib import get_close_matches

        near = get_close_matches(name, self.entries, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise UsageError(f"no weights called {name}: {hint}`cellslide weights list` shows all")

    def default(self, task: str) -> WeightsEntry:
        """Return what is used for `task` when nothing is named; raises UsageError where nothing ships."""
        if task not in self.defaults:
            raise UsageError(f"no weights for {task} ship with cellslide: name some with --model or --weights")
        return self.entries[self.defaults[task]]

    def by_file_name(self, name: str) -> WeightsEntry | None:
        """Return the packaged entry that is published under this file name."""
        return next((e for e in self.entries.values() if e.root == PACKAGE and e.file_name == name), None)


def _read_packaged(path: Path | None) -> tuple[Any, str]:
    # In a wheel the manifest lies inside the package, in a checkout one level up.
    places = (path,) if path else (PACKAGE / "weights_manifest.yaml", PACKAGE.parent / "weights_manifest.yaml")
    for place in places:
        if place.is_file():
            return copy.deepcopy(_read_once(place, place.stat().st_mtime_ns)), str(place)
    raise WeightsError(f"{places[0]}: the weights manifest is missing: reinstall cellslide")


@functools.cache
def _read_once(path: Path, changed_ns: int) -> Any:
    """Return what `read_yaml` does; a command asks several times, and reading takes it half a second."""
    return read_yaml(path)


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; raises WeightsError when it is not valid YAML."""
    return foreign_files.read_yaml(path, WeightsError)


def read_added(folder: Path) -> dict[str, WeightsEntry]:
    """Return the entries that `cellslide weights add` put below `folder`, by id."""
    entries = (read_entry(path) for path in sorted(folder.glob(f"*/{ENTRY_FILE}")))
    return {entry.id: entry for entry in entries}


def read_entry(path: Path) -> WeightsEntry:
    """Return the single entry of a `model.yaml`; its `file` lies beside it."""
    entry = parse_entry(read_yaml(path), path.parent, str(path))
    if entry.file is None:
        raise WeightsError(f"{path}: {entry.id} names no `file`")
    return entry
