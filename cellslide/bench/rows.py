"""What a measurement is: one row of the table of `cellslide bench`, its target, and the clock around a call.

CPU time is reported because wall time on a shared machine says little.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

NOT_MEASURED = "not measured"
_NAMED = ("cellslide", "numpy", "numba", "torch", "onnxruntime", "openslide-python", "imagecodecs", "zarr", "pyarrow")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What a measurement may be told; a stage takes what concerns it.

    nuclei None is each stage's own number, slide None what a stage paints; the last five are those of `classify`.
    """

    slide: Path | None = None
    nuclei: int | None = None
    rounds: int = 3
    device: str = "auto"
    model: str | None = None
    weights: Path | None = None
    random_size: Literal["full", "small"] | None = None
    cells_of: Path | None = None
    context_size: int | None = None
    batch_size: int | None = None
    compile: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """What a form should reach: a value of at most `most` (at least, where `more` is better), `ratio` times the
    first."""

    limit: float | None = None
    ratio: float | None = None
    more: bool = False

    def text(self, unit: str) -> str:
        """Return the target as it stands in the table, empty where there is none."""
        said = [] if self.limit is None else [f"{'≥' if self.more else '≤'} {self.limit:g} {unit}"]
        return " and ".join([*said, *([] if self.ratio is None else [f"≥ {self.ratio:g} ×"])])

    def met(self, value: float | None, ratio: float | None) -> bool | None:
        """Return whether both parts are reached; None where nothing is asked or one of them was not measured."""
        checks = []
        if self.limit is not None:
            if value is None:
                return None
            checks.append(value >= self.limit if self.more else value <= self.limit)
        if self.ratio is not None:
            if ratio is None:
                return None
            checks.append(ratio >= self.ratio)
        return all(checks) if checks else None


NO_TARGET = Target()


@dataclass(frozen=True, slots=True)
class Row:
    """One measured form of a stage.

    value   median of the rounds, in `unit`; None where it was not measured.
    least   the best of the rounds.
    count   what was handled: nuclei, tiles, crops.
    ratio   how many times better than the stage's first row of that kind.
    target  what is asked for, in words; `met` None where nothing is, or nothing was measured.
    note    what else there is to say.
    """

    stage: str
    form: str
    value: float | None
    unit: str
    least: float | None
    count: int
    ratio: float | None
    target: str = ""
    met: bool | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Form:
    """One way to do a stage: `call` does it once and returns how many nuclei, tiles or crops it handled."""

    name: str
    call: Callable[[], int]
    target: Target = NO_TARGET


def row(
    stage: str,
    form: str,
    values: Sequence[float],
    unit: str,
    count: int,
    first: float | None = None,
    target: Target = NO_TARGET,
    note: str = "",
) -> Row:
    """Make a row of the values of all rounds; `first` is the value of the form that it is compared with.

    No values: not measured.
    """
    if not values:
        return Row(stage, form, None, unit, None, count, None, target.text(unit), None, note or NOT_MEASURED)
    value, best = median(values), max(values) if target.more else min(values)
    ratio = None if first is None or not value or not first else (value / first if target.more else first / value)
    return Row(stage, form, value, unit, best, count, ratio, target.text(unit), target.met(value, ratio), note)


def cpu_rows(stage: str, forms: Sequence[Form], rounds: int, per: int = 0, unit: str = "CPU ms") -> Iterator[Row]:
    """Measure forms one after another in CPU milliseconds of a call, ratios against the first.

    `per` N: the time for N nuclei, tiles or crops, whatever number a call handles; CPU seconds where `unit` begins so.
    """
    first = None
    for form in forms:
        count, times = cpu_ms(form.call, rounds)
        scale = (per / max(count, 1) if per else 1.0) * (1e-3 if unit.startswith("CPU s") else 1.0)
        values = [ms * scale for ms in times]
        first = first or median(values)
        yield row(stage, form.name, values, unit, count, first, form.target)


def cpu_ms(call: Callable[[], int], rounds: int) -> tuple[int, list[float]]:
    """Return what `call` handles and its CPU milliseconds in each round; a first call, not counted, loads what it
    needs."""
    count, times = call(), []
    for _ in range(rounds):
        begin = time.process_time()
        call()
        times.append((time.process_time() - begin) * 1e3)
    return count, times


def timed(call: Callable[[], object], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Return the seconds of each round; a first call, not counted, loads what it needs."""
    call()
    seconds = []
    for _ in range(rounds):
        begin = clock()
        call()
        seconds.append(clock() - begin)
    return seconds


@dataclass(frozen=True, slots=True)
class Machine:
    """Where rows were measured: processor, cores this process may use, GPU or an empty string, versions by name."""

    system: str
    processor: str
    cores: int
    gpu: str
    versions: dict[str, str]


def machine() -> Machine:
    """Describe this machine and the packages that the stages rest on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    versions = {"python": platform.python_version()}
    for name in _NAMED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(f"{platform.system()} {platform.machine()}", _processor(), cores, _gpu(), versions)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""


def as_record(measured: Row) -> dict[str, Any]:
    """Return a row as JSON has it, numbers to four digits."""
    from dataclasses import asdict

    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(measured).items()}
