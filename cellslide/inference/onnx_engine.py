"""The network on onnxruntime: exported on first use into the cache, then run on CPU, CUDA or TensorRT.

onnxruntime falls back to the CPU in silence when its CUDA libraries do not load; only `session.get_providers()` tells
the truth, so that is compared with what was asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cellslide import __version__
from cellslide.config import InferConfig
from cellslide.errors import MissingDependencyError, UsageError
from cellslide.inference.device import available_cpus, resolve_device
from cellslide.inference.micro_batches import auto_batch_size, in_steps
from cellslide.inference.torch_engine import TileNet, TileOutput, no_room, output_names, unpack
from cellslide.slides.identity import content_sha256
from cellslide.store.atomic import write_json
from cellslide.types import ModelSpec, UInt8
from cellslide.weights import cache_dir

if TYPE_CHECKING:
    import onnxruntime

OPSET = 20
SUMS_FILE = "sha256.json"

log = logging.getLogger(__name__)


def model_key(module: nn.Module, spec: ModelSpec, tile_px: int) -> str:
    """Return the name of an exported network: a hash of its weights, normalisation, tile size and the versions used."""
    made_with = (__version__, torch.__version__, OPSET, tile_px, spec.kind, spec.mean, spec.std, output_names(spec))
    digest = hashlib.sha256(repr(made_with).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def exported(module: nn.Module, spec: ModelSpec, tile_px: int) -> Path:
    """Return the ONNX file of a network for tiles of `tile_px`, exporting it if the cache has none.

    Raises MissingDependencyError without the packages of the extra `export`.
    """
    folder = cache_dir() / "onnx" / model_key(module, spec, tile_px)
    path = folder / "model.onnx"
    if folder.is_dir() and not _is_whole(folder):
        log.warning("%s: the exported network is damaged and made again", folder)
        shutil.rmtree(folder)
    if not path.is_file():
        log.info("exporting %s to ONNX for tiles of %d px (once)", spec.name, tile_px)
        _export(TileNet(module, spec).eval().cpu(), spec, tile_px, folder)
    return path


def _export(net: TileNet, spec: ModelSpec, tile_px: int, folder: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"--engine onnx needs {' and '.join(missing)}: pip install 'cellslide[export]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder, since networks over 2 GB keep their weights in a second file that the first one names.
    scratch = Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
    try:
        with _quiet():
            torch.onnx.export(
                net,
                (torch.zeros(2, tile_px, tile_px, 3, dtype=torch.uint8),),
                scratch / "model.onnx",
                input_names=["images"],
                output_names=list(output_names(spec)),
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                # onnxruntime optimises when it loads the network; doing it here too takes as long as the export.
                optimize=False,
            )
        sums = {file.name: content_sha256(file) for file in scratch.iterdir()}
        write_json(scratch / SUMS_FILE, sums)
        if not folder.exists():
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Tell whether the files of an exported network are as they were written; others beside them do not count."""
    try:
        sums = json.loads((folder / SUMS_FILE).read_text(encoding="utf-8"))
        return all(content_sha256(folder / name) == known for name, known in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter says of packages and of its own calls; errors are raised, not said."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class OnnxEngine:
    """The network on onnxruntime, in fp32."""

    name = "onnx"
    precision = "fp32"

    def __init__(self, module: nn.Module, spec: ModelSpec, config: InferConfig, tile_px: int) -> None:
        if config.precision not in ("auto", "fp32"):
            raise UsageError(f"--precision {config.precision}: --engine onnx runs in fp32 only (auto or fp32)")
        if config.compile:
            raise UsageError("--compile: only with --engine torch")
        if spec.kind == "box":
            # Its windows and masks depend on what is found, which a graph of fixed shapes cannot say.
            raise UsageError(f"--engine onnx: {spec.name} gives boxes, and such networks run with --engine torch only")
        self.spec, self.tile_px = spec, tile_px
        device = resolve_device(config.device)
        if device.type == "mps":
            raise UsageError("--engine onnx runs on cpu or cuda, not on mps: add --device cpu")
        self.batch_size = config.batch_size or min(8, auto_batch_size("tile", tile_px, device))
        self._session = open_session(exported(module, spec, tile_px), device)
        self.device = f"{device} ({self._session.get_providers()[0]})"

    def launch(self, images: UInt8) -> Callable[[], list[TileOutput]]:
        """Run uint8 RGB tiles (B, H, W, 3), in micro-batches of at most `batch_size`; all is there on return."""
        found = in_steps(self, images, self._try, lambda: None)
        return lambda: [tile for step in found for tile in step or [no_room(self.tile_px, self.device)]]

    def _try(self, images: UInt8) -> list[TileOutput] | None:
        try:
            found = self._session.run(None, {"images": images})
        except Exception as error:  # onnxruntime has no type of its own for it.
            if "allocate memory" not in str(error) and "out of memory" not in str(error):
                raise
            return None
        arrays = dict(zip(output_names(self.spec), found, strict=True))
        return [unpack(arrays, self.spec, row, self.tile_px) for row in range(len(images))]

    def peak_device_bytes(self) -> int:
        """Return 0: onnxruntime does not tell."""
        return 0


def open_session(path: Path, device: torch.device) -> onnxruntime.InferenceSession:
    """Open a session on `device` and check that it really runs there.

    Raises MissingDependencyError when CUDA was asked for and onnxruntime came up on the CPU.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(f"--engine onnx needs onnxruntime ({error}): pip install cellslide") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    # Its own words about missing CUDA libraries would stand beside the error below, less plainly.
    options.log_severity_level = 3
    if device.type == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(str(path), options, providers=providers(device, path.parent))
    check_providers(session.get_providers(), device)
    return session


def providers(device: torch.device, cache: Path) -> list[Any]:
    """Return the providers to ask for, best first; TensorRT only where its package is installed."""
    if device.type != "cuda":
        return ["CPUExecutionProvider"]
    wanted: list[Any] = [("CUDAExecutionProvider", {"device_id": device.index or 0}), "CPUExecutionProvider"]
    if importlib.util.find_spec("tensorrt") is not None:
        settings = {
            "device_id": device.index or 0,
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(cache),
        }
        wanted.insert(0, ("TensorrtExecutionProvider", settings))
    return wanted


def check_providers(active: list[str], device: torch.device) -> None:
    """Raise MissingDependencyError when a GPU was asked for and the session does not have it."""
    if device.type == "cuda" and "CUDAExecutionProvider" not in active:
        raise MissingDependencyError(
            f"--engine onnx on {device}: onnxruntime fell back to {', '.join(active)}; install a fitting "
            "onnxruntime-gpu[cuda,cudnn], or take --engine torch or --device cpu"
        )
