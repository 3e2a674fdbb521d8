"""Choice of device and number format."""

from __future__ import annotations

import os

import torch

from cellslide.config import Precision, parse_device, parse_devices
from cellslide.errors import MissingDependencyError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device that `--device` names; auto takes CUDA, then MPS, then the CPU.

    Raises UsageError for a name that is none, MissingDependencyError for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    kind, number = parse_device(name)
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (kind == "cuda" and number >= n_cuda) or (kind == "mps" and not _has_mps()):
        raise MissingDependencyError(
            f"--device {name}: not on this machine (CUDA devices: {n_cuda}); use --device auto or cpu"
        )
    return torch.device(name)


def require_devices(names: str) -> None:
    """Raise as `resolve_device` for what `--device` names, one device or several with commas."""
    for name in parse_devices(names):
        resolve_device(name)


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def resolve_precision(asked: Precision, device: torch.device, bf16_on_cpu: bool = False) -> str:
    """Return fp32, bf16 or fp16; auto is bf16 on GPUs that compute in it, fp16 on older tensor cores, else fp32.

    bf16_on_cpu  the network's scores hold in bf16, so auto takes it on CPUs that compute in it too.
    """
    if asked != "auto":
        return asked
    if device.type == "cpu" and bf16_on_cpu and cpu_computes_bf16():
        return "bf16"
    if device.type != "cuda":
        return "fp32"
    major, _ = torch.cuda.get_device_capability(device)
    return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"


def cpu_computes_bf16() -> bool:
    """Tell whether this CPU has instructions for bf16; on others oneDNN emulates it, slower than fp32."""
    # torch has no public question for it.
    asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(question() for question in asked if question is not None)


def device_name(device: torch.device) -> str:
    """Return the device as the run record names it, e.g. "cuda:0 (NVIDIA A100)"."""
    if device.type != "cuda":
        return str(device)
    return f"cuda:{device.index or 0} ({torch.cuda.get_device_name(device)})"


def peak_device_bytes(device: torch.device) -> int:
    """Return the most device memory torch has held (bytes); 0 where that is not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def available_cpus() -> int:
    """Return the cores this process may use, which on a cluster are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether torch ran out of memory; only CUDA has a type of its own for it."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
