"""From an id or a file to a model that is ready to run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellslide.errors import UsageError, WeightsError
from cellslide.models.registry import architecture_of
from cellslide.types import HoverDecode, ModelSpec
from cellslide.weights.cache import WeightsBytes, require_file
from cellslide.weights.manifest import ENTRY_FILE, Manifest, Source, WeightsEntry, read_entry

if TYPE_CHECKING:
    from torch import nn

    from cellslide.models.checkpoint import Checkpoint

# Published CellViT and CellVTA checkpoints are trained at 40x; those for 20x are known by name or config.
DEFAULT_MPP = 0.25
# Covers twice the radius of the largest nuclei and what the network's edge spoils: 32 µm.
OVERLAP_UM = 32.0
# Both find nuclei: as outlines, or as boxes and points.
FINDERS = ("segment", "detect")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network in eval mode on the CPU, what the pipeline must know of it, and where it came from."""

    spec: ModelSpec
    module: nn.Module
    entry: WeightsEntry


def load_model(model: str | None = None, weights: Path | None = None, task: str = "segment") -> LoadedModel:
    """Load weights by id, from a file, or the ones that ship for `task`; "detect" as an id means those of that task.

    `weights` alone is enough: what the file does not say comes from a `model.yaml` beside it, from the manifest's entry
    of that file name, or from defaults. With `model` too, the file must be the one that the manifest means. A detector
    of boxes or points may be named where outlines are asked for, and the reverse: both find nuclei.
    Raises UsageError for an unknown id or another task, WeightsError when weights are missing, changed or do not fit.
    """
    manifest = Manifest.load()
    if weights is not None and model is None:
        return load_file(weights, manifest, task)
    entry = manifest.default(task) if model is None else _named(manifest, model)
    check_task(entry, task)
    return load_entry(entry, weights)


def find_weights(model: str | None = None, weights: Path | None = None, task: str = "segment") -> WeightsEntry | None:
    """Return the entry of what `load_model` would load, None for a file that must tell itself; reads no weights.

    Raises UsageError for an unknown id or another task, WeightsError where a file is missing.
    """
    manifest = Manifest.load()
    if weights is not None and model is None:
        entry = entry_beside(resolve_path(weights))
        if entry is None:
            return None
    else:
        entry = manifest.default(task) if model is None else _named(manifest, model)
    check_task(entry, task)
    if weights is None or model is None:
        require_file(entry)
    else:
        resolve_path(weights)
    return entry


def _named(manifest: Manifest, name: str) -> WeightsEntry:
    """Return the entry called `name`, or the one that ships for the task of that name."""
    ships = name in FINDERS and name not in manifest.entries
    return manifest.default(name) if ships else manifest.entry(name)


def load_entry(entry: WeightsEntry, path: Path | None = None) -> LoadedModel:
    """Load `entry` from `path`, or from where it lies on this machine; the file's hash is checked."""
    path = require_file(entry) if path is None else resolve_path(path)
    checkpoint, sha256, _ = _read(path, entry)
    return _finish(entry, checkpoint, path, sha256)


def load_file(path: Path, manifest: Manifest, task: str = "segment") -> LoadedModel:
    """Load a weights file that stands for itself."""
    path = resolve_path(path)
    beside = entry_beside(path)
    if beside is not None:
        check_task(beside, task)
        return load_entry(beside)
    checkpoint, sha256, size = _read(path)
    entry = replace(describe(path, checkpoint, manifest, task), sha256=sha256, size_bytes=size)
    return _finish(entry, checkpoint, path, sha256)


def _read(path: Path, entry: WeightsEntry | None = None) -> tuple[Checkpoint, str, int]:
    """Return what a file holds, its SHA-256 and size; its bytes are free again before a network is made of them."""
    from cellslide.models.checkpoint import read_checkpoint

    file = WeightsBytes.read(path, entry)
    return read_checkpoint(path, entry.arch if entry else None, file.data), file.sha256, len(file.data)


def resolve_path(path: Path) -> Path:
    """Return the file that `--weights` means: itself, or the entry of a training output; raises WeightsError."""
    path = path / ENTRY_FILE if path.is_dir() else path
    if not path.is_file():
        raise WeightsError(f"--weights {path}: no such file")
    return path


def entry_beside(path: Path) -> WeightsEntry | None:
    """Return the entry of a training output, named by its folder, its `model.yaml`, or the file that it describes."""
    place = path if path.name == ENTRY_FILE else path.with_name(ENTRY_FILE)
    if not place.is_file():
        return None
    entry = read_entry(place)
    return entry if path.name in (ENTRY_FILE, entry.file) else None


def check_task(entry: WeightsEntry, task: str) -> None:
    """Raise UsageError for weights that were made for another task; segment and detect stand for each other."""
    if entry.task != task and not {entry.task, task} <= set(FINDERS):
        raise UsageError(
            f"--model {entry.id}: made to {entry.task}, not to {task}; see `cellslide weights list --task {task}`"
        )


def describe(path: Path, checkpoint: Checkpoint, manifest: Manifest, task: str) -> WeightsEntry:
    """Return an entry for a file nobody described: from its tensors and config, then by its name in the manifest.

    Raises UsageError if it is made for another task.
    """
    from cellslide.models.checkpoint import classes_of, infer_config, mpp_of, normalisation_of

    architecture = architecture_of(checkpoint.arch)
    known = manifest.by_file_name(path.name)
    known = known if known is not None and known.arch == architecture.name else None
    blank = WeightsEntry(
        slug(path.stem),
        architecture.task,
        architecture.name,
        source=Source(),
        mean=architecture.mean,
        std=architecture.std,
    )
    check_task(known or blank, task)
    config = infer_config(checkpoint)
    mean, std = normalisation_of(checkpoint.config) or ((known or blank).mean, (known or blank).std)
    classes = classes_of(checkpoint.config, config.get("num_nuclei_classes", 0)) if architecture.kind == "mask" else ()
    return replace(
        known or blank,
        id=slug(path.stem),
        file=path.name,
        root=path.parent,
        config=config,
        mpp=mpp_of(checkpoint.config) or (known.mpp if known else None) or _mpp_by_name(path.name),
        mean=mean,
        std=std,
        classes=classes,
    )


def slug(stem: str) -> str:
    """Return an id made of a file's stem."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100] or "weights"


def _mpp_by_name(name: str) -> float:
    return 0.5 if re.search(r"(?i)(?<![a-z0-9])(x20|20x)(?![a-z0-9])", name) else DEFAULT_MPP


def _finish(entry: WeightsEntry, checkpoint: Checkpoint, path: Path, sha256: str) -> LoadedModel:
    from cellslide.models.checkpoint import build_empty, classes_of, infer_config, load_strict

    if architecture_of(entry.arch).name != checkpoint.arch:
        raise WeightsError(f"{path}: a {checkpoint.arch} checkpoint, {entry.id} is {entry.arch}")
    config = dict(entry.config) or infer_config(checkpoint)
    module = load_strict(build_empty(checkpoint.arch, config), checkpoint.state, str(path))
    n_types = _n_types(entry, module)
    if not entry.classes and n_types:
        entry = replace(entry, classes=classes_of(checkpoint.config, n_types + 1))
    if len(entry.classes) != n_types:
        raise WeightsError(f"{path}: {n_types} nucleus types, {entry.id} names {len(entry.classes)} classes")
    spec = spec_of(entry, config, sha256)
    return LoadedModel(replace(spec, embedding_dim=getattr(module, "embedding_dim", 0)), module, entry)


def _n_types(entry: WeightsEntry, module: nn.Module) -> int:
    """Return how many classes a network gives, background not among them; 0 if it does not type nuclei."""
    n_types = int(getattr(module, "n_types", 0))
    # The only class of a detector, if nobody names it, is the nucleus itself.
    return n_types if entry.task == "segment" or n_types > 1 or entry.classes else 0


def spec_of(entry: WeightsEntry, config: Mapping[str, Any], sha256: str) -> ModelSpec:
    """Return what the pipeline must know of `entry`."""
    mpp, architecture = entry.mpp or DEFAULT_MPP, architecture_of(entry.arch)
    kind = architecture.kind
    if kind == "classify" or kind == "backbone" or architecture.task != entry.task:
        raise WeightsError(f"{entry.id}: {entry.arch} gives {kind}s, so its task is not {entry.task}")
    overlap = entry.overlap_px if entry.overlap_px is not None else 2 * round(OVERLAP_UM / mpp / 2)
    return ModelSpec(
        name=entry.id,
        kind=kind,
        mpp=mpp,
        tile_px=entry.tile_px or architecture.tile_px,
        overlap_px=overlap,
        mean=entry.mean,
        std=entry.std,
        classes=entry.classes,
        multiple_px=architecture.multiple_px,
        decode=entry.decode or published_decode(mpp),
        detect=entry.detect or architecture.detect,
        weights_id=entry.id,
        weights_sha256=sha256,
        licence=entry.licence or "",
        bf16_on_cpu=entry.bf16_on_cpu,
    )


def published_decode(mpp: float) -> HoverDecode:
    """Return the published post-processing: aperture 21 and markers of 10 px at 40x, 11 and 3 px at 20x."""
    return HoverDecode() if mpp < 0.375 else HoverDecode(kernel_px=11, min_marker_px=3)
