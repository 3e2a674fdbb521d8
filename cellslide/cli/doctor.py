"""`cellslide doctor`: checks that everything is here that the other commands need."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cellslide.cli import grouped
from cellslide.cli.options import verbosity_options

if TYPE_CHECKING:
    from cellslide.weights import WeightsEntry

State = Literal["ok", "note", "missing"]
MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("MISSING", "bold red")}

# Distribution, module, lowest version. Several names of one module: any of them serves.
REQUIRED: tuple[tuple[str, str, str], ...] = (
    ("click", "click", "8.2"),
    ("geopandas", "geopandas", "1.0"),
    ("h5py", "h5py", "3.10"),
    ("huggingface_hub", "huggingface_hub", "0.27"),
    ("imagecodecs", "imagecodecs", "2024.1.1"),
    ("isal", "isal", "1.6"),
    ("jinja2", "jinja2", "3.1"),
    ("numba", "numba", "0.60"),
    ("numpy", "numpy", "1.26"),
    ("onnxruntime-gpu|onnxruntime", "onnxruntime", "1.20"),
    ("opencv-python-headless|opencv-python", "cv2", "4.8"),
    ("openslide-bin", "openslide_bin", "4.0.1"),
    ("openslide-python", "openslide", "1.4"),
    ("orjson", "orjson", "3.10"),
    ("pandas", "pandas", "2.0"),
    ("pillow", "PIL", "10.3"),
    ("platformdirs", "platformdirs", "4.0"),
    ("psutil", "psutil", "5.9"),
    ("pyarrow", "pyarrow", "16"),
    ("pyyaml", "yaml", "6.0"),
    ("rich", "rich", "13.7"),
    ("safetensors", "safetensors", "0.4.5"),
    ("scikit-image", "skimage", "0.22"),
    ("scipy", "scipy", "1.11"),
    ("shapely", "shapely", "2.0.4"),
    ("simplejpeg", "simplejpeg", "1.8"),
    ("tifffile", "tifffile", "2024.1.30"),
    ("timm", "timm", "1.0.20"),
    ("torch", "torch", "2.6"),
    ("zarr", "zarr", "3.1"),
)
OPTIONAL: tuple[tuple[str, str], ...] = (
    ("lightning", "train"),
    ("tensorboard", "train"),
    ("distributed", "cluster"),
    ("spatialdata", "spatial"),
    ("scanpy", "spatial"),
    ("squidpy", "spatial"),
    ("pydicom", "dicom"),
    ("onnx", "export"),
    ("onnxscript", "export"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: `missing` is required and not there, `note` is worth knowing."""

    group: str
    name: str
    state: State
    detail: str


@grouped.define()
@click.option("--online", is_flag=True, help="Also ask the model hub whether your account may read gated weights.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@verbosity_options
def command(online: bool, as_json: bool) -> None:
    """Check packages, GPU, codecs, cache folder, weights and access to gated ones.

    Uses no network unless --online is given. Ends with 3 when something required is missing.

    \b
    Example:
      cellslide doctor
      cellslide doctor --online
      cellslide doctor --json
    """
    from cellslide.errors import MissingDependencyError

    checks = list(run_checks(online))
    missing = [check.name for check in checks if check.state == "missing"]
    if as_json:
        click.echo(json.dumps({"ok": not missing, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks)
    if missing:
        raise MissingDependencyError(f"doctor: required and not there: {', '.join(missing)}")


def run_checks(online: bool = False) -> Iterator[Check]:
    """Yield all checks, in the order they are shown."""
    yield from _machine()
    yield from _packages()
    for group, name, look in (
        ("device", "torch", _torch),
        ("device", "onnxruntime", _onnx),
        ("codecs", "jpeg", lambda: _codec("jpeg8")),
        ("codecs", "jpeg 2000", lambda: _codec("jpeg2k")),
        ("codecs", "webp", lambda: _codec("webp")),
        ("codecs", "openslide", _openslide),
    ):
        yield _look(group, name, look)
    yield _kernels()
    yield _cache()
    yield from _weights()
    yield from _gated(online)


def _look(group: str, name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(group, name, "ok", look())
    except Exception as error:  # A check reports what went wrong, whatever it is.
        return Check(group, name, "missing", f"{type(error).__name__}: {error}")


def _machine() -> Iterator[Check]:
    import psutil

    version = platform.python_version()
    yield Check("machine", "python", "ok" if sys.version_info >= (3, 11) else "missing", f"{version} at {sys.prefix}")
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_gib = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free"
    yield Check("machine", "system", "ok", f"{platform.system()} {platform.machine()}, {cores} cores, {memory_gib}")


def _packages() -> Iterator[Check]:
    for names, module, floor in REQUIRED:
        name, version = _installed(names.split("|"))
        if version is None and name == "isal" and not isal_is_made_for(sys.platform, platform.machine()):
            yield Check("packages", name, "note", "not made for this machine; zlib takes its place, more slowly")
        elif version is None:
            yield Check("packages", name, "missing", f"needs {floor} or newer: pip install cellslide")
        elif _parts(version) < _parts(floor):
            yield Check("packages", name, "missing", f"{version} is older than {floor}")
        else:
            yield _look("packages", name, partial(_imported, module, version))
    for name, extra in OPTIONAL:
        version = _installed([name])[1]
        state: State = "ok" if version else "note"
        yield Check("packages", name, state, version or f"not installed; extra cellslide[{extra}]")


def isal_is_made_for(system: str, machine: str) -> bool:
    """Tell whether the package asks for isal there, which has no wheels for other machines."""
    return machine in ("x86_64", "AMD64", "aarch64", "arm64") and (system != "win32" or machine == "AMD64")


def _installed(names: list[str]) -> tuple[str, str | None]:
    for name in names:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return names[0], None


def _parts(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: enough to compare with a floor."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _imported(module: str, version: str) -> str:
    import_module(module)
    return version


def _torch() -> str:
    import torch

    from cellslide.inference.device import device_name, resolve_device, resolve_precision
    from cellslide.weights import Manifest

    device, finds = resolve_device("auto"), Manifest.load().default("segment")
    # As their engines take it: `bf16_on_cpu` is about networks that find nuclei.
    precision = resolve_precision("auto", device, finds.bf16_on_cpu), resolve_precision("auto", device)
    detail = f"--device auto is {device_name(device)}, --precision auto is {precision[0]} to segment"
    detail += "" if precision[0] == precision[1] else f", {precision[1]} to classify"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        detail += f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        torch.ones(8, device=device).sum().item()
    return detail


def _onnx() -> str:
    import onnxruntime

    return ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())


def _codec(name: str) -> str:
    """Encode and decode a small picture; return the codec's version."""
    import imagecodecs
    import numpy as np

    picture = np.full((16, 16, 3), (200, 120, 180), np.uint8)
    decoded = getattr(imagecodecs, f"{name}_decode")(getattr(imagecodecs, f"{name}_encode")(picture))
    if decoded.shape != picture.shape or np.abs(decoded.astype(int) - picture).max() > 8:
        raise ValueError("a picture came back changed")
    return str(getattr(imagecodecs, f"{name}_version")())


def _openslide() -> str:
    """Read a small JPEG-tiled slide with OpenSlide; return the library's version."""
    import tempfile

    import numpy as np
    import openslide
    import tifffile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.tif"
        tifffile.imwrite(
            path, np.full((64, 64, 3), 128, np.uint8), tile=(64, 64), photometric="rgb", compression="jpeg"
        )
        with openslide.OpenSlide(path) as slide:
            slide.read_region((0, 0), 0, (8, 8))
    return f"library {openslide.__library_version__}"


def _kernels() -> Check:
    """Compile what decoding needs, so that no run has to; without it the same results take longer."""
    from cellslide.geometry import kernels
    from cellslide.nuclei.hover_decode import prepare

    why = kernels.why_not()
    if why is not None:
        return Check("device", "compiled code", "note", f"none, decoding takes some four times as long: {why}")
    try:
        prepare()
    except Exception as error:  # Whatever a compiler may say.
        return Check("device", "compiled code", "missing", f"{type(error).__name__}: {error}; set NUMBA_DISABLE_JIT=1")
    return Check("device", "compiled code", "ok", f"kept in {kernels.cache_folder()}")


def _cache() -> Check:
    from cellslide.weights import cache_dir

    folder = cache_dir()
    named = "CELLSLIDE_CACHE" if os.environ.get("CELLSLIDE_CACHE") else "default; CELLSLIDE_CACHE names another"
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        return Check("weights", "cache folder", "ok", f"{folder} ({named})")
    return Check(
        "weights", "cache folder", "missing", f"{folder} is not writable; set CELLSLIDE_CACHE to a folder that is"
    )


def _verified(entry: WeightsEntry, path: Path) -> str:
    from cellslide.weights import verify_file

    return f"{entry.id}, sha256 {verify_file(entry, path)[:12]}"


def _weights() -> Iterator[Check]:
    from cellslide.errors import CellslideError
    from cellslide.weights import Manifest, find_file

    try:
        manifest = Manifest.load()
    except CellslideError as error:
        yield Check("weights", "manifest", "missing", str(error))
        return
    for task, name in manifest.defaults.items():
        entry = manifest.entry(name)
        path = find_file(entry)
        if path is None:
            yield Check("weights", f"{task} (default)", "missing", f"{name}: its file is not in the package")
        else:
            yield _look("weights", f"{task} (default)", partial(_verified, entry, path))
    others = [e for e in manifest.entries.values() if e.id not in manifest.defaults.values()]
    here = [e.id for e in others if find_file(e)]
    yield Check("weights", "others", "ok", f"{len(here)} of {len(others)} here{': ' if here else ''}{', '.join(here)}")


def _gated(online: bool) -> Iterator[Check]:
    from cellslide.errors import CellslideError
    from cellslide.weights import Manifest
    from cellslide.weights.fetch import is_offline

    token = "set" if _token() else "not set"
    if not online or is_offline():
        why = "HF_HUB_OFFLINE is set" if is_offline() else "not asked; --online asks the hub"
        yield Check("weights", "gated access", "note", f"token {token}; {why}")
        return
    try:
        entries = Manifest.load().entries.values()
    except CellslideError:
        return
    hubs = sorted({e.source.hub for e in entries if e.gated and e.source and e.source.hub})
    for hub in hubs:
        yield _ask_hub(hub, token)


def _token() -> Any:
    from huggingface_hub import get_token

    return get_token()


def _ask_hub(hub: str, token: str) -> Check:
    from huggingface_hub import auth_check
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        auth_check(hub)
    except (GatedRepoError, RepositoryNotFoundError):
        return Check(
            "weights", hub, "note", f"no access (token {token}): accept its terms on the hub, then set HF_TOKEN"
        )
    except Exception as error:  # No network has many faces.
        return Check("weights", hub, "note", f"the hub cannot be reached: {type(error).__name__}")
    return Check("weights", hub, "ok", "your account may read it")


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "what", "", "found"):
        table.add_column(title, overflow="fold", no_wrap=title == "what")
    group = ""
    for check in checks:
        mark, style = MARKS[check.state]
        table.add_row("" if check.group == group else check.group, check.name, Text(mark, style), Text(check.detail))
        group = check.group
    Console(highlight=False).print(table)
