"""Settings, one frozen dataclass per stage: defaults live here only, each check names the flag and the legal range."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cellslide.errors import UsageError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Engine = Literal["torch", "onnx"]


def _require(ok: bool, flag: str, value: object, legal: str) -> None:
    if not ok:
        raise UsageError(f"{flag} {value}: must be {legal}")


def parse_devices(text: str) -> tuple[str, ...]:
    """Return the devices that `--device` names: "cuda:0,1" and "cuda:0,cuda:1" are two, "auto" is one.

    Raises UsageError where a part is empty, or a number follows no device.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        kind = found[-1].partition(":")[0] if found and ":" in found[-1] else None
        if not part or (part.isdigit() and kind is None):
            raise UsageError(f"--device {text}: must be a device, or several as in cuda:0,1 or cpu,cpu")
        found.append(f"{kind}:{part}" if part.isdigit() else part)
    if len(found) > 1 and "auto" in found:
        raise UsageError(f"--device {text}: name each device, auto chooses one only")
    return tuple(found)


def parse_device(name: str) -> tuple[str, int]:
    """Return kind and number of one device; raises UsageError for a name that is none."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "mps", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise UsageError(f"--device {name}: must be auto, cpu, mps, cuda or cuda:N")
    return kind, int(number or 0)


@dataclass(frozen=True, slots=True)
class TissueConfig:
    """Where to look: the built-in mask, a mask image, or everywhere, and optionally only inside a region of interest.

    `roi_origin` is the zero point of the region's file: the slide's bounds, as QuPath writes it, or the level-0 plane.
    """

    enabled: bool = True
    mask: Path | None = None
    roi: Path | None = None
    thumbnail_mpp: float = 8.0
    min_area_um2: float = 2_000.0
    roi_origin: Literal["bounds", "level0"] = "bounds"

    def __post_init__(self) -> None:
        _require(self.enabled or self.mask is None, "--tissue-mask", self.mask, "left out where --no-tissue is given")


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tile edge and overlap in plane pixels; None takes the model's default."""

    size_px: int | None = None
    overlap_px: int | None = None

    def __post_init__(self) -> None:
        size, overlap = self.size_px, self.overlap_px
        _require(size is None or 64 <= size <= 8192, "--tile-size", size, "64 to 8192 px")
        _require(overlap is None or 0 <= overlap <= 2048, "--overlap", overlap, "0 to 2048 px")
        if size is not None and overlap is not None:
            _require(overlap <= size // 2, "--overlap", overlap, f"at most half of --tile-size ({size // 2} px)")


@dataclass(frozen=True, slots=True)
class InferConfig:
    """How the network runs; batch_size None is "auto". Nothing here may change the result beyond rounding."""

    device: str = "auto"
    batch_size: int | None = None
    precision: Precision = "auto"
    engine: Engine = "torch"
    workers: int | None = None
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            self.batch_size is None or 1 <= self.batch_size <= 1024,
            "--batch-size",
            self.batch_size,
            "auto or 1 to 1024",
        )
        _require(self.workers is None or 0 <= self.workers <= 256, "--workers", self.workers, "0 to 256")


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """What is written; the zarr table is always written, since everything else is made from it.

    `formats` are names of `formats.registry`.
    """

    formats: tuple[str, ...] = ("zarr", "geojson")
    geojson_origin: Literal["bounds", "level0"] = "bounds"
    profile: Literal["lean", "full"] = "lean"
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class SegmentConfig:
    """All settings of `cellslide segment`; it is written to `run.json` as it was resolved.

    tta  take the mean over four mirror images of each tile.
    """

    model: str | None = None
    weights: Path | None = None
    mpp: float | None = None
    allow_fluorescence: bool = False
    tta: bool = False
    tissue: TissueConfig = field(default_factory=TissueConfig)
    tiles: TileConfig = field(default_factory=TileConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _require(self.mpp is None or 0.05 <= self.mpp <= 2.0, "--mpp", self.mpp, "0.05 to 2 µm per pixel")


@dataclass(frozen=True, slots=True)
class ClassifyConfig:
    """All settings of `cellslide classify`, but for the rule that decides (`classify.decision.DecisionConfig`).

    organ         organ of the slides; None takes the list's, "unknown" where that has none either.
    paths         "both", so that any rule may be applied later, or "local" alone, without context; None takes what the
                  rule needs, and where none is given what the weights' calibration found worth its time.
    context_size  edge in pixels to which the context's field is resampled; None takes the weights'.
    context_grid  edge in plane pixels of the boxes whose cells share one context; None gives each cell its own.
    adaptive      calibrated probability of the local path from which the global path is skipped; None skips none.
    max_cells, sample, roi
                  type at most so many cells, so large a share, only those inside: the rest stays untyped.
    cells, cells_unit, cells_mpp, alignment, alignment_direction
                  nuclei that another tool found: its file, and how its coordinates become level-0 pixels.
    """

    model: str | None = None
    weights: Path | None = None
    mpp: float | None = None
    allow_fluorescence: bool = False
    organ: str | None = None
    paths: Literal["both", "local"] | None = None
    context_size: int | None = None
    context_grid: int | None = None
    adaptive: float | None = None
    max_cells: int | None = None
    sample: float | None = None
    roi: Path | None = None
    cells: Path | None = None
    cells_unit: Literal["px", "um"] = "px"
    cells_mpp: float | None = None
    alignment: Path | None = None
    alignment_direction: Literal["slide-to-cells", "cells-to-slide"] = "slide-to-cells"
    taxonomy: str | None = None
    infer: InferConfig = field(default_factory=InferConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _require(self.mpp is None or 0.05 <= self.mpp <= 2.0, "--mpp", self.mpp, "0.05 to 2 µm per pixel")
        size, grid = self.context_size, self.context_grid
        _require(size is None or 32 <= size <= 4096, "--context-size", size, "32 to 4096 px")
        _require(grid is None or 1 <= grid <= 2048, "--context-grid", grid, "1 to 2048 px")
        _require(self.adaptive is None or 0 < self.adaptive <= 1, "--adaptive", self.adaptive, "above 0, at most 1")
        _require(self.max_cells is None or self.max_cells >= 1, "--max-cells", self.max_cells, "at least 1")
        _require(self.sample is None or 0 < self.sample <= 1, "--sample", self.sample, "above 0, at most 1")
        pixel_um = self.cells_mpp
        _require(pixel_um is None or 0.01 <= pixel_um <= 10, "--cells-mpp", pixel_um, "0.01 to 10 µm per pixel")
        given = self.cells is not None or self.alignment is None
        _require(given, "--alignment", self.alignment, "given together with --cells")


@dataclass(frozen=True, slots=True)
class EmbedConfig:
    """All settings of `cellslide embed`.

    mpp        pixel size of the slides (µm), where their files do not tell.
    read_mpp   pixel size at which nuclei are read; None takes the weights'.
    field_px   edge of the windows in pixels of `read_mpp`; None takes the weights'.
    to         "zarr" puts the vectors into the cell table, "parquet" and "npz" beside it.
    """

    model: str | None = None
    weights: Path | None = None
    mpp: float | None = None
    allow_fluorescence: bool = False
    read_mpp: float | None = None
    field_px: int | None = None
    to: Literal["zarr", "parquet", "npz"] = "zarr"
    overwrite: bool = False
    infer: InferConfig = field(default_factory=InferConfig)

    def __post_init__(self) -> None:
        for flag, mpp in (("--mpp", self.mpp), ("--read-mpp", self.read_mpp)):
            _require(mpp is None or 0.05 <= mpp <= 2.0, flag, mpp, "0.05 to 2 µm per pixel")
        size = self.field_px
        whole = size is None or (64 <= size <= 4096 and size % 32 == 0)
        _require(whole, "--field-px", size, "a multiple of 32 from 64 to 4096 px")
