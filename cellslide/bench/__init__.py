"""What `cellslide bench` times: a module a stage, each with `rows(options)`, on inputs that it makes itself."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from cellslide.bench.decode import PlainNucleus, RawMaps, plain_hover, synthetic_maps
from cellslide.bench.fake import FakeDetector, detect_cells, scattered, square_slide
from cellslide.bench.rows import BenchOptions, Machine, Row, as_record, machine

# In the order of the flow. The last two need a network, so they are measured when named, or all are.
CPU_STAGES = ("read", "decode", "merge", "write", "crops")
STAGES = (*CPU_STAGES, "infer", "classify")

__all__ = [
    "CPU_STAGES",
    "STAGES",
    "BenchOptions",
    "FakeDetector",
    "Machine",
    "PlainNucleus",
    "RawMaps",
    "Row",
    "as_record",
    "detect_cells",
    "machine",
    "measure",
    "plain_hover",
    "scattered",
    "square_slide",
    "synthetic_maps",
]


def measure(stage: str, options: BenchOptions) -> Iterator[Row]:
    """Yield the rows of one of STAGES as they are measured."""
    yield from import_module(f"{__name__}.{stage}").rows(options)
