"""From an id or a file to a classifier that is ready to run: published layouts and our own, always strictly."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import yaml

from cellslide.errors import UsageError, WeightsError, short
from cellslide.store.atomic import write_text
from cellslide.types import Calibration, ClassifierSpec, ClassSpec, CropSpec
from cellslide.weights.cache import WeightsBytes, require_file
from cellslide.weights.load import DEFAULT_MPP, check_task, entry_beside, resolve_path, slug
from cellslide.weights.manifest import ENTRY_FILE, PACKAGE, Manifest, Source, WeightsEntry

if TYPE_CHECKING:
    from cellslide.models.nuclass import NuClass

PUBLISHED_ID = "nuclass"
PUBLISHED_ARCH = "nuclass"
# Inputs of the published context: the gate was trained at 384 px of a 1024 px field, path global alone at 512.
GLOBAL_ALONE_CONTEXT_PX = 512
# Colours for classes that nobody gave one: far apart, none of them grey.
PALETTE = (
    (228, 26, 28), (55, 126, 184), (77, 175, 74), (152, 78, 163), (255, 127, 0), (166, 86, 40), (247, 129, 191),
    (0, 190, 190),
)  # fmt: skip

_SAFE_GATE_KEYS = {"tau": "tau", "gamma": "gamma", "accepts": "safe_accepts",
                   "reliability_local": "reliability_local", "reliability_global": "reliability_global"}  # fmt: skip
_CALIBRATION_KEYS = (
    "temperature_local", "temperature_global", "temperature_mix", "thresholds", "abstain", "abstain_unseen",
    "accuracy_unseen", "class_prior", "confusion", "paths",
)  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedClassifier:
    """A classifier in eval mode on the CPU, what the pipeline must know of it, and where it came from."""

    spec: ClassifierSpec
    module: NuClass
    entry: WeightsEntry


def load_classifier(model: str | None = None, weights: Path | None = None) -> LoadedClassifier:
    """Load a classifier by id, from a file, or the one that ships.

    A file that stands for itself is a published checkpoint (path local, path global, or the gate's; Lightning's `.ckpt`
    too), described by its tensors, or has a `model.yaml` beside it. Raises UsageError for an unknown id or another
    task, WeightsError when weights are missing, changed or do not fit, with all names that are missing or unexpected.
    """
    return _finish(*_read(model, weights))


def classifier_entry(model: str | None = None, weights: Path | None = None) -> WeightsEntry:
    """Return the entry that `load_classifier` would load, without building the network."""
    return _find(model, weights)[0]


def _read(model: str | None, weights: Path | None) -> tuple[WeightsEntry, Path, str, Mapping[str, Any]]:
    """Return entry, file, SHA-256 and tensors; the file's bytes are free again before a network is made of them."""
    from cellslide.models.checkpoint import read_checkpoint

    entry, file = _find(model, weights)
    return entry, file.path, file.sha256, read_checkpoint(file.path, PUBLISHED_ARCH, file.data).state


def _find(model: str | None, weights: Path | None) -> tuple[WeightsEntry, WeightsBytes]:
    manifest = Manifest.load()
    if weights is None or model is not None:
        entry = manifest.default("classify") if model is None else manifest.entry(model)
        check_task(entry, "classify")
        path = require_file(entry) if weights is None else resolve_path(weights)
        return entry, WeightsBytes.read(path, entry)
    path = resolve_path(weights)
    beside = entry_beside(path)
    if beside is not None:
        check_task(beside, "classify")
        return beside, WeightsBytes.read(require_file(beside), beside)
    file = WeightsBytes.read(path)
    return describe(file, manifest), file


def describe(file: WeightsBytes, manifest: Manifest) -> WeightsEntry:
    """Return an entry for a published checkpoint: sizes from its tensors, names from its settings or as published."""
    from cellslide.models.checkpoint import read_checkpoint, read_tensors

    path = file.path
    _, content = read_tensors(path, file.data)
    config = _sizes(read_checkpoint(path, PUBLISHED_ARCH, file.data).state, str(path))
    published = manifest.entries.get(PUBLISHED_ID)
    if published is None:
        raise WeightsError(f"{path}: the manifest has lost its entry {PUBLISHED_ID}: reinstall cellslide")
    organs, learned = _organs(int(config["num_organs"]), published.organs)
    if learned:
        config |= {"learned_unknown": True}
    crops = dict(published.config["crops"])
    if config.get("context") is not None and not config["gate"]:
        crops["context"] = {**crops["context"], "input_px": GLOBAL_ALONE_CONTEXT_PX}
    sizes = {key: value for key, value in config.items() if key not in ("num_classes", "num_organs")}
    return replace(
        published,
        id=slug(path.stem),
        file=path.name,
        root=path.parent,
        source=Source(),
        sha256=file.sha256,
        size_bytes=len(file.data),
        config={**sizes, "crops": crops},
        classes=_classes(_class_names(content), int(config["num_classes"]), published.classes),
        organs=organs,
    )


def _organs(rows: int, published: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """Return the organs of an embedding of `rows`, and whether its last row is the unknown one."""
    if rows in (len(published), len(published) + 1):
        return published, rows > len(published)
    return tuple(f"organ {i}" for i in range(1, rows + 1)), False


def _class_names(content: Mapping[str, Any]) -> list[str]:
    """Return the class names that Lightning's settings hold, in the order of their numbers, or none."""
    settings = content.get("hyper_parameters") or {}
    named = settings.get("class_names") if isinstance(settings, Mapping) else None
    if isinstance(named, Mapping):
        by_number = {v: k for k, v in named.items()} if all(isinstance(v, int) for v in named.values()) else dict(named)
        return [str(by_number[key]) for key in sorted(by_number)]
    return [str(name) for name in named] if isinstance(named, (list, tuple)) else []


def _classes(names: Sequence[str], count: int, published: tuple[ClassSpec, ...]) -> tuple[ClassSpec, ...]:
    if count == len(published) and len(names) != count:
        return published
    if len(names) != count:
        names = [f"class {i}" for i in range(1, count + 1)]
    colors = {c.name.lower(): c.color for c in published}
    return tuple(ClassSpec(name, colors.get(name.lower(), PALETTE[i % len(PALETTE)])) for i, name in enumerate(names))


def _finish(entry: WeightsEntry, path: Path, sha256: str, state: Mapping[str, Any]) -> LoadedClassifier:
    from cellslide.models.backbones import build_empty
    from cellslide.models.checkpoint import load_strict
    from cellslide.models.nuclass import NuClass
    from cellslide.models.nuclass_layout import fit_backbones

    where = str(path)
    config = _config(entry, state, where)
    try:
        module = build_empty(lambda: NuClass(config))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{entry.id}: config: {error}") from error
    _check_classes(entry, state, where)
    load_strict(module, fit_backbones(module, state), where)
    module.share_equal_backbones()
    return LoadedClassifier(spec_of(entry, sha256), module, entry)


def _config(entry: WeightsEntry, state: Mapping[str, Any], where: str) -> Any:
    """Return the sizes of a classifier: as the entry of one of ours gives them, else as the tensors tell."""
    from cellslide.models.nuclass_config import NuClassConfig

    given = {key: value for key, value in entry.config.items() if key != "crops"}
    if entry.source is not None:
        given = _sizes_of_tensors(given, state, where)
    try:
        return NuClassConfig.of(given, len(entry.classes), len(entry.organs))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{entry.id}: config: {error}") from error


def _sizes_of_tensors(given: Mapping[str, Any], state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the sizes of a published file, full, cut short or one path alone, with the pooling that is `given`."""
    found = _sizes(state, where)
    for part in ("local", "context"):
        if found.get(part) and isinstance(given.get(part), Mapping) and given[part].get("pool"):
            found[part] = {**found[part], "pool": given[part]["pool"]}
    return found | {key: value for key, value in given.items() if key not in found}


def _sizes(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    from cellslide.models.checkpoint import Checkpoint, infer_config

    try:
        return infer_config(Checkpoint(PUBLISHED_ARCH, {}, state))
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error


def _check_classes(entry: WeightsEntry, state: Mapping[str, Any], where: str) -> None:
    head = state.get("modelA.head.4.weight")
    if head is not None and len(head) != len(entry.classes):
        raise WeightsError(f"{where}: {len(head)} classes, {entry.id} names {len(entry.classes)}")


def spec_of(entry: WeightsEntry, sha256: str) -> ClassifierSpec:
    """Return what the pipeline must know of a classifier; raises WeightsError for an entry that does not say it."""
    crops = entry.config.get("crops")
    if not isinstance(crops, Mapping) or "local" not in crops:
        raise WeightsError(f"{entry.id}: config.crops is missing: it holds `local` and `context`, see docs/weights.md")
    unknown = sorted(set(crops) - {"local", "context"})
    if unknown:
        raise WeightsError(f"{entry.id}: config.crops has unknown keys {', '.join(map(str, unknown))}")
    local = _crop(entry, "local", crops["local"])
    context = crops.get("context")
    return ClassifierSpec(
        name=entry.id,
        mpp=entry.mpp or DEFAULT_MPP,
        local=local,
        # A local path alone cuts no context; its spec still has one, so that nobody must ask.
        context=local if context is None else _crop(entry, "context", context),
        mean=entry.mean,
        std=entry.std,
        classes=entry.classes,
        organs=entry.organs,
        learned_unknown=bool(entry.config.get("learned_unknown", False)),
        calibration=calibration_of(entry),
        weights_id=entry.id,
        weights_sha256=sha256,
        licence=entry.licence or "",
    )


def _crop(entry: WeightsEntry, name: str, raw: Any) -> CropSpec:
    where = f"{entry.id}: config.crops.{name}"
    try:
        crop = CropSpec(**raw)
    except TypeError as error:
        raise WeightsError(f"{where}: {error}") from error
    for key in ("field_px", "input_px"):
        value = getattr(crop, key)
        if not isinstance(value, int) or value < 1:
            raise WeightsError(f"{where}.{key} {short(value)}: must be a number of pixels")
    for key, kind in get_type_hints(CropSpec).items():
        legal = get_args(kind)
        if legal and getattr(crop, key) not in legal:
            raise WeightsError(f"{where}.{key} {short(getattr(crop, key))}: must be {' or '.join(legal)}")
    return crop


def calibration_of(entry: WeightsEntry) -> Calibration:
    """Return what was fitted for these weights, from `calibration` and `safe_gate` of their entry; defaults else.

    Raises WeightsError for unknown keys, and for lists that have not one number for each class.
    """
    calibration, safe_gate = dict(entry.calibration or {}), dict(entry.safe_gate or {})
    unknown = sorted((set(calibration) - set(_CALIBRATION_KEYS)) | (set(safe_gate) - set(_SAFE_GATE_KEYS)))
    if unknown:
        raise WeightsError(f"{entry.id}: calibration, safe_gate: unknown keys {', '.join(unknown)}")
    values = calibration | {_SAFE_GATE_KEYS[key]: value for key, value in safe_gate.items()}
    kept = {key: value for key, value in values.items() if value is not None}
    try:
        return Calibration(**{key: _number_or_row(entry, key, value) for key, value in kept.items()})
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{entry.id}: calibration: {error}") from error


def _number_or_row(entry: WeightsEntry, key: str, value: Any) -> Any:
    if key == "safe_accepts":
        return bool(value)
    if key == "paths":
        if value not in ("both", "local"):
            raise ValueError(f"paths {short(value)}: must be both or local")
        return value
    if key == "confusion":
        return _counts(entry, value)
    if key not in ("thresholds", "class_prior", "reliability_local", "reliability_global"):
        number = float(value)
        if key.startswith("temperature") and not number > 0:
            raise ValueError(f"{key} {number}: must be above 0")
        return number
    row = tuple(float(v) for v in value)
    if len(row) != len(entry.classes):
        raise ValueError(f"{key} has {len(row)} numbers for {len(entry.classes)} classes")
    return row


def _counts(entry: WeightsEntry, value: Any) -> tuple[tuple[int, ...], ...]:
    n = len(entry.classes)
    table = tuple(tuple(row) for row in value)
    if len(table) != n or any(len(row) != n for row in table):
        raise ValueError(f"confusion must have {n} rows of {n} counts, one for each class")
    if not all(type(count) is int and 0 <= count < 1 << 31 for row in table for count in row):
        raise ValueError("confusion: must hold whole numbers, none below 0")
    return table


def calibration_as_yaml(calibration: Calibration) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the mappings `calibration` and `safe_gate` of an entry; `calibration_of` reads them back."""
    plain = {f.name: getattr(calibration, f.name) for f in fields(calibration)}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items() if v is not None}
    first = {key: plain[key] for key in _CALIBRATION_KEYS if key in plain}
    return first, {key: plain[name] for key, name in _SAFE_GATE_KEYS.items() if name in plain}


def entry_to_write(entry: WeightsEntry, output: Path | None) -> Path:
    """Return where a changed entry is written; raises UsageError where the package's own manifest would be meant."""
    if output is not None:
        return output
    if entry.root == PACKAGE or entry.file is None:
        raise UsageError(f"{entry.id} stands in the package's manifest: say where its entry goes with -o ENTRY.yaml")
    return entry.root / ENTRY_FILE


def write_calibration(path: Path, entry: WeightsEntry, calibration: Calibration) -> None:
    """Write the entry with a new calibration, in one step."""
    values, safe_gate = calibration_as_yaml(calibration)
    entry = replace(entry, calibration=values, safe_gate=safe_gate)
    write_text(path, yaml.safe_dump(entry.as_dict(), sort_keys=False, allow_unicode=True))
