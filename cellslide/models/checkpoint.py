"""Reading checkpoints: safely and whole.

A published `.pth` is a dict with `arch` (class name), `config` (flat, dotted keys) and `model_state_dict`; everything
else in it is ignored. Only tensors and plain values are unpickled.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cellslide.errors import WeightsError, short
from cellslide.models.registry import architecture_of, build_model, guess_architecture
from cellslide.types import ClassSpec

State = Mapping[str, Tensor]

PANNUKE = (
    ClassSpec("Neoplastic", (255, 0, 0)),
    ClassSpec("Inflammatory", (34, 221, 77)),
    ClassSpec("Connective", (35, 92, 236)),
    ClassSpec("Dead", (254, 255, 0)),
    ClassSpec("Epithelial", (255, 159, 68)),
)
CONIC = tuple(
    ClassSpec(name, color)
    for name, color in zip(
        ("neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective"),
        (*(c.color for c in PANNUKE), (35, 255, 255)),
        strict=True,
    )
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a weights file holds: architecture (short name), flat config as published, tensors by name."""

    arch: str
    config: Mapping[str, Any]
    state: State


def read_checkpoint(path: Path, arch: str | None = None, data: bytes | None = None) -> Checkpoint:
    """Read a `.pth` or `.safetensors` file on the CPU.

    arch  used where the file names none.
    data  its bytes, where they were read already.
    Raises WeightsError when the file is not a checkpoint or would run code when unpickled.
    """
    state, content = read_tensors(path, data)
    config = _flatten(content.get("config") or {})
    name = content.get("arch") or arch or guess_arch(state)
    if not isinstance(name, str):
        raise WeightsError(f"{path}: the checkpoint names no architecture and its tensors fit none that is known")
    architecture = architecture_of(name, state)
    return Checkpoint(architecture.name, config, architecture.canonical_state(state, content, str(path)))


def read_tensors(path: Path, data: bytes | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a file's tensors by name on the CPU, and all that it holds; Lightning's `.ckpt` and plain files too.

    data  its bytes, where they were read already.
    Raises WeightsError when the file holds no tensors or would run code when unpickled.
    """
    try:
        data = path.read_bytes() if data is None else data
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    content = _read_safetensors(path, data) if path.suffix == ".safetensors" else _read_pickle(path, data)
    return _strip_parallel(_find_state(content, path)), content


def _read_safetensors(path: Path, data: bytes) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state = load(data)
        # The header, whose length stands first, was checked by then.
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        meta = json.loads(header).get("__metadata__") or {}
        return {"model_state_dict": state, "arch": meta.get("arch"), "config": json.loads(meta.get("config", "{}"))}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({short(error)})") from error


def _numpy_scalars() -> list[Any]:
    """Return what numpy scalars need to be unpickled, under the module names of numpy 1 and 2."""
    scalar = np.float64(1).__reduce__()[0]
    kinds = ("Float64", "Float32", "Float16", "Int64", "Int32", "Int16", "Int8", "UInt8", "Bool")
    return [
        (scalar, "numpy._core.multiarray.scalar"),
        (scalar, "numpy.core.multiarray.scalar"),
        np.dtype,
        *(getattr(np.dtypes, f"{kind}DType") for kind in kinds),
    ]


# Settings that Lightning stores with a model: they hold plain values and run nothing.
_SETTINGS = (argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)


def _read_pickle(path: Path, data: bytes) -> dict[str, Any]:
    allowed = [*_numpy_scalars(), *_SETTINGS]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(_blocked(path, data, allowed, error)) from error
    except Exception as error:
        # torch.load fails in many ways on a damaged file; all of them mean the same here.
        raise WeightsError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {_first_line(error)})"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a checkpoint dict")
    return dict(content)


def _blocked(path: Path, data: bytes, allowed: list[Any], error: Exception) -> str:
    try:
        with torch.serialization.safe_globals(allowed):
            names = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError):
        # Files of the old format cannot be listed; the message of the first refusal names the object.
        names = ""
    what = names or _first_line(error)
    return f"{path}: refused, unpickling it would run code; blocked: {what}. Ask its author for a safetensors file"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [""])[0].strip()


def _find_state(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    # CellViT and CellVTA, Lightning, MUSE, DPA-P2PNet; or the tensors alone.
    named = (key for key in ("model_state_dict", "state_dict", "teacher", "model") if key in content)
    state = content.get(next(named, ""), content)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path}: no `model_state_dict` of tensors in it")
    return {str(name): tensor for name, tensor in state.items()}


def _strip_parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def guess_arch(state: State) -> str | None:
    """Return the architecture whose tensors these look like, or None."""
    found = guess_architecture(state)
    return None if found is None else found.name


def infer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the builder's config that a checkpoint's tensors, and its own config, give.

    Raises WeightsError where tensors that give the sizes are missing, or the architecture reads none.
    """
    infer = architecture_of(checkpoint.arch).infer_config
    if infer is None:
        raise WeightsError(f"a {checkpoint.arch} file does not hold its sizes: describe it in a model.yaml beside it")
    try:
        return infer(checkpoint.state, checkpoint.config)
    except KeyError as error:
        raise WeightsError(f"not a {checkpoint.arch} checkpoint: {error} is missing") from error


class _WithoutStorage(TorchFunctionMode):
    """Gives new tensors no memory and no values; small computed ones (arange, linspace) stay real."""

    ALLOCATORS = frozenset({torch.empty, torch.zeros, torch.ones, torch.full})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.ALLOCATORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_empty(arch: str, config: Mapping[str, Any]) -> nn.Module:
    """Build an architecture without memory for its weights: they are about to be replaced, and take seconds to draw."""
    with _WithoutStorage():
        return build_model(arch, config)


def load_strict(module: nn.Module, state: State, where: str) -> nn.Module:
    """Put `state` into `module` as float32 copies and return it in eval mode.

    Raises WeightsError as `check_fit` does.
    """
    check_fit(module.state_dict(), state, f"{where} does not fit {type(module).__name__}")
    copies = {name: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True) for name, t in state.items()}
    module.load_state_dict(copies, strict=True, assign=True)
    return module.eval()


def check_fit(own: State, state: State, where: str) -> None:
    """Raise WeightsError, beginning with `where`, that lists every missing, unexpected and misshapen tensor."""
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    faults = [_listed("missing", missing), _listed("unexpected", unexpected), _listed("other shape", shapes)]
    if any(faults):
        raise WeightsError(f"{where}: " + "; ".join(f for f in faults if f))


def _listed(what: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} {what}: {', '.join(names)}" if names else ""


def classes_of(config: Mapping[str, Any], n_channels: int) -> tuple[ClassSpec, ...]:
    """Return the classes of a network with `n_channels` type channels, background not among them.

    Names come from `dataset_config.nuclei_types.*` where they fill the channels, else from PanNuke or CoNIC by count.
    """
    prefix = "dataset_config.nuclei_types."
    named = {int(v): k.removeprefix(prefix) for k, v in config.items() if k.startswith(prefix)}
    colors = {c.name.lower(): c.color for c in (*CONIC, *PANNUKE)}
    count = max(n_channels - 1, 0)
    if count and all(i in named for i in range(1, count + 1)) and max(named) == count:
        spare = [c.color for c in CONIC]
        return tuple(ClassSpec(named[i], colors.get(named[i].lower(), spare[(i - 1) % 6])) for i in range(1, count + 1))
    known = {0: (), len(PANNUKE): PANNUKE, len(CONIC): CONIC}
    if count in known:
        return known[count]
    return tuple(ClassSpec(f"class {i}", CONIC[(i - 1) % 6].color) for i in range(1, count + 1))


def normalisation_of(config: Mapping[str, Any]) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
    """Return mean and std from `transformations.normalize.*`, or None where the config has none."""
    mean, std = (config.get(f"transformations.normalize.{k}") for k in ("mean", "std"))
    if not isinstance(mean, (list, tuple)) or not isinstance(std, (list, tuple)) or len(mean) != 3 or len(std) != 3:
        return None
    (m0, m1, m2), (s0, s1, s2) = map(float, mean), map(float, std)
    return (m0, m1, m2), (s0, s1, s2)


def mpp_of(config: Mapping[str, Any]) -> float | None:
    """Return the pixel size that the config names, in µm, directly or as a magnification; None where it names none."""
    for key in ("data.mpp", "mpp", "data.wsi_mpp"):
        if isinstance(config.get(key), (int, float)):
            return float(config[key])
    for key in ("data.magnification", "magnification", "dataset_config.magnification"):
        if config.get(key) in (20, 40):
            return 10.0 / float(config[key])
    return None
