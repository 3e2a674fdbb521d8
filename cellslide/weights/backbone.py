"""Plain backbones from the manifest, a file, a folder or the hub's cache, put into a network that is to be trained.

Nothing is downloaded here: `cellslide weights fetch` and the hub's own client do that.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cellslide.errors import UsageError, WeightsError
from cellslide.weights.cache import SUFFIXES, WeightsBytes, require_file
from cellslide.weights.manifest import Manifest, WeightsEntry

if TYPE_CHECKING:
    from torch import nn

HUB = "hf-hub:"
# Names under which hub repositories and local copies of them hold one model, in the order of preference.
FILE_NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def fill_backbone(backbone: nn.Module, source: str) -> str:
    """Put published weights into `backbone` and return the id or file that they came from.

    source  id of the manifest ("uni2-h", "dinov3-vitl16"), a file, a folder that holds one, or hf-hub:OWNER/NAME.
    Tensors may be named as by timm, by transformers (DINOv3) or by Meta (DINOv3). Raises UsageError for an unknown id,
    WeightsError for weights that are not here or do not fit, naming every tensor that is missing or unexpected.
    """
    from cellslide.models.backbones import to_timm
    from cellslide.models.checkpoint import load_strict, read_tensors

    path, entry = _find(source)
    state, _ = read_tensors(path, WeightsBytes.read(path, entry).data)
    training = backbone.training
    load_strict(backbone, to_timm(state, backbone), str(path))
    backbone.train(training)
    return source if not _is_path(source) else path.name


def _find(source: str) -> tuple[Path, WeightsEntry | None]:
    """Return the file that `source` means on this machine, and its entry in the manifest where it is an id."""
    if source.startswith(HUB):
        return _in_hub_cache(source.removeprefix(HUB)), None
    if _is_path(source):
        path = Path(source).expanduser()
        return _in_folder(path) if path.is_dir() else path, None
    entry = Manifest.load().entry(source)
    if entry.task != "backbone":
        raise UsageError(f"{source}: made to {entry.task}, no backbone; see `cellslide weights list --task backbone`")
    return require_file(entry), entry


def _is_path(source: str) -> bool:
    return not source.startswith(HUB) and Path(source).expanduser().exists()


def _in_folder(folder: Path) -> Path:
    named = [folder / name for name in FILE_NAMES if (folder / name).is_file()]
    found = named or sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not named and len(found) != 1:
        raise WeightsError(f"{folder}: holds {len(found)} weights files, name the one that is meant")
    return found[0]


def _in_hub_cache(repository: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    for name in FILE_NAMES:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    raise WeightsError(f"{HUB}{repository}: not in the hub's cache; `hf download {repository}` puts it there")
