"""From an id or a file to a MUSE backbone that is ready to read features of nuclei."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellslide.errors import UsageError, WeightsError
from cellslide.models.registry import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD
from cellslide.weights.cache import WeightsBytes, require_file
from cellslide.weights.load import DEFAULT_MPP, entry_beside, resolve_path, slug
from cellslide.weights.manifest import Manifest, Source, Triple, WeightsEntry

if TYPE_CHECKING:
    from cellslide.models.muse import MuseBackbone

# What a backbone is read from: its own weights, or a detector that stands on one.
TASKS = ("backbone", "detect")


@dataclass(frozen=True, slots=True)
class LoadedMuse:
    """A MUSE backbone in eval mode on the CPU; `mpp` (um/px), `mean` and `std` of the pictures that it reads."""

    module: MuseBackbone
    entry: WeightsEntry
    sha256: str

    @property
    def mpp(self) -> float:
        """Pixel size of the pictures, in um."""
        return self.entry.mpp or DEFAULT_MPP

    @property
    def mean(self) -> Triple:
        """Mean of RGB / 255."""
        return self.entry.mean

    @property
    def std(self) -> Triple:
        """Standard deviation of RGB / 255."""
        return self.entry.std


def load_muse(model: str | None = None, weights: Path | None = None) -> LoadedMuse:
    """Load a MUSE backbone by id or from a file, by default that of the point detector that ships.

    A file is a published one, a backbone of `cellslide pretrain muse`, or a point detector, whose head is left out; a
    folder of training means the weights in it. Raises UsageError for an unknown id or weights of another kind,
    WeightsError when weights are missing, changed or do not fit.
    """
    entry, file = _find(model, weights)
    config, state = _read(entry, file)
    return LoadedMuse(_build(config, state, file.path), entry, file.sha256)


def _find(model: str | None, weights: Path | None) -> tuple[WeightsEntry, WeightsBytes]:
    manifest = Manifest.load()
    if weights is not None and model is None:
        path = resolve_path(weights)
        beside = entry_beside(path)
        if beside is not None:
            return beside, WeightsBytes.read(require_file(_checked(beside)), beside)
        file = WeightsBytes.read(path)
        return _described(file, manifest), file
    entry = _checked(manifest.default("detect") if model is None else manifest.entry(model))
    return entry, WeightsBytes.read(require_file(entry) if weights is None else resolve_path(weights), entry)


def _checked(entry: WeightsEntry) -> WeightsEntry:
    if entry.task not in TASKS or not _is_muse(entry.arch):
        raise UsageError(f"--model {entry.id}: {entry.arch} is no MUSE; see `cellslide weights list --task backbone`")
    return entry


def _is_muse(arch: str) -> bool:
    return arch in ARCHITECTURES and ARCHITECTURES[arch].family == "muse"


def _described(file: WeightsBytes, manifest: Manifest) -> WeightsEntry:
    """Return an entry for a file that stands for itself: the manifest's for a file of its name, else defaults."""
    path = file.path
    known = manifest.by_file_name(path.name)
    blank = WeightsEntry(
        "blank", "backbone", "muse", source=Source(), mpp=DEFAULT_MPP, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    use = known if known is not None and known.task in TASKS and _is_muse(known.arch) else blank
    return replace(use, id=slug(path.stem), file=path.name, root=path.parent, sha256=file.sha256, size_bytes=None)


def _read(entry: WeightsEntry, file: WeightsBytes) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return a backbone's sizes and tensors."""
    from cellslide.models.checkpoint import read_checkpoint
    from cellslide.models.muse_layout import backbone_state, config_of

    path = file.path
    checkpoint = read_checkpoint(path, data=file.data)
    if not _is_muse(checkpoint.arch):
        raise WeightsError(f"{path}: a {checkpoint.arch} checkpoint, not a MUSE")
    state = backbone_state(checkpoint.state, str(path))
    told = {name: value for name, value in entry.config.items() if name != "head"}
    try:
        return told or config_of(state, checkpoint.config), state
    except KeyError as error:
        raise WeightsError(f"{path}: not a MUSE backbone: {error} is missing") from error


def _build(config: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> MuseBackbone:
    from cellslide.models.checkpoint import build_empty, load_strict
    from cellslide.models.muse import MuseBackbone

    module = load_strict(build_empty("muse", config), state, str(path))
    if not isinstance(module, MuseBackbone):
        raise TypeError(f"{type(module).__name__} is no MuseBackbone")
    return module
