"""Typed records that cross stage borders. Only numpy is imported here.

Frames
------
level-0    pixels of the full-resolution slide plane, no bounds offset subtracted.
plane      the slide resampled to the model's pixel size; `Plane` converts between the two.
tile       plane pixels relative to the top left corner of a tile's read box.

Points are (x, y), arrays [row, col], boxes xyxy and half-open. Pixel i covers [i, i + 1), so its centre is i + 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]

ModelKind = Literal["mask", "box", "point"]
MppSource = Literal["flag", "list", "vendor", "ome", "tiff"]


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the pyramid: size in its own pixels, `downsample` relative to level 0."""

    width_px: int
    height_px: int
    downsample: float


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """What a slide is: level-0 size in pixels, pixel size in µm, pyramid and vendor bounds (x, y, width, height)."""

    slide_id: str
    path: Path
    vendor: str
    width_px: int
    height_px: int
    mpp_x: float
    mpp_y: float
    mpp_source: MppSource
    levels: tuple[Level, ...]
    objective_power: float | None = None
    bounds: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Plane:
    """The slide resampled to `mpp`; `scale_x`, `scale_y` are level-0 pixels per plane pixel."""

    mpp: float
    scale_x: float
    scale_y: float
    width_px: int
    height_px: int

    @classmethod
    def of(cls, info: SlideInfo, mpp: float) -> Plane:
        """Return the plane of `info` at `mpp` µm/px; it covers the slide, so its size is rounded up."""
        scale_x, scale_y = mpp / info.mpp_x, mpp / info.mpp_y
        # A pixel size that differs from the model's by rounding in the header must not resample the slide.
        scale_x = 1.0 if abs(scale_x - 1.0) < 0.01 else scale_x
        scale_y = 1.0 if abs(scale_y - 1.0) < 0.01 else scale_y
        width, height = (int(np.ceil(n / s - 1e-6)) for n, s in ((info.width_px, scale_x), (info.height_px, scale_y)))
        return cls(mpp, scale_x, scale_y, max(width, 1), max(height, 1))

    def to_level0(self, xy: NDArray[Any]) -> Float64:
        """Convert plane points (N, 2) to level-0 pixels."""
        return np.asarray(xy, np.float64) * (self.scale_x, self.scale_y)

    def from_level0(self, xy: NDArray[Any]) -> Float64:
        """Convert level-0 points (N, 2) to plane pixels."""
        return np.asarray(xy, np.float64) / (self.scale_x, self.scale_y)


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile of the plane: it reads `read_xyxy` (may leave the plane) and owns `own_xyxy`; own boxes partition it.

    `index` counts over the whole grid, row by row, also over tiles that are skipped: it names a place.
    """

    index: int
    row: int
    col: int
    read_xyxy: tuple[int, int, int, int]
    own_xyxy: tuple[int, int, int, int]

    @property
    def size_px(self) -> int:
        """Edge of the square read box in plane pixels."""
        return self.read_xyxy[2] - self.read_xyxy[0]

    def to_plane(self, xy: NDArray[Any]) -> Float64:
        """Convert tile points (N, 2) to plane pixels."""
        return np.asarray(xy, np.float64) + (self.read_xyxy[0], self.read_xyxy[1])


FIELD_MEASURES = (
    "tissue", "blur", "blocks", "density", "contrast", "haematoxylin_r", "haematoxylin_g", "haematoxylin_b",
    "eosin_r", "eosin_g", "eosin_b", "depth", "ink", "dark", "nuclei", "dense_eosin",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fields:
    """Squares of the plane as the network saw them, N of them, and what was measured of each.

    place   int32 (N, 2), column and row in the lattice that covers the plane.
    values  float32 (N, M), a column for each of FIELD_MEASURES:
    tissue     share of the pixels that are stained.
    blur       Crete's measure, 0 is sharp, 1 is not; NaN where the field is too even to tell.
    blocks     steps at the borders of JPEG blocks over those elsewhere, NaN where the plane does not show blocks.
    density    mean optical density of stained pixels; `contrast` its standard deviation.
    haematoxylin_*, eosin_*  optical density (red, green, blue; length 1) of the pixels that stand for the stain.
    depth      log of the optical density of haematoxylin's pixels over that of eosin's; nuclei are the darker.
    ink, dark  share of pixels of a pen's colour, and of pixels too dark for any stain.
    nuclei, dense_eosin  share of pixels as nuclei absorb, and as keratin and blood do.
    """

    place: Int32
    values: Float32

    def __post_init__(self) -> None:
        _check_lengths(self, len(self.place), ("values",))

    def __len__(self) -> int:
        return len(self.place)

    @classmethod
    def of(cls, parts: Iterable[Fields]) -> Fields:
        """Return the fields of all parts, in the order of the lattice whatever the order of the parts."""
        found = list(parts)
        place = np.concatenate([np.zeros((0, 2), np.int32), *(part.place for part in found)])
        values = np.concatenate([np.zeros((0, len(FIELD_MEASURES)), np.float32), *(part.values for part in found)])
        order = np.lexsort((place[:, 0], place[:, 1]))
        return cls(place[order], values[order])

    def column(self, name: str) -> Float32:
        """Return one measure (N,)."""
        return self.values[:, FIELD_MEASURES.index(name)]

    def vectors(self, stain: str) -> Float32:
        """Return the vectors (N, 3) of "haematoxylin" or "eosin"."""
        first = FIELD_MEASURES.index(f"{stain}_r")
        return self.values[:, first : first + 3]


@dataclass(frozen=True, slots=True)
class ClassSpec:
    """A class as written to files: its name and its colour, 0..255 RGB."""

    name: str
    color: tuple[int, int, int]


def hex_color(color: tuple[int, int, int]) -> str:
    """Return a colour, 0..255 RGB, as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*color)


@dataclass(frozen=True, slots=True)
class HoverDecode:
    """How HoVer maps become instances.

    mode            "published" scales the maps by their extremes in the tile, bit for bit as HoVer-Net and CellViT do;
                    "fixed" scales by `hv_gradient_range`, so that a nucleus does not depend on the rest of its tile.
    kernel_px       Sobel aperture (21 at 0.25 µm/px, 11 at 0.5).
    min_marker_px   smallest marker (10 at 0.25 µm/px, 3 at 0.5).
    min_object_px   smallest foreground component (always 10 in the published form).
    energy_threshold  above it a pixel is a border between nuclei (0.4 published).
    """

    mode: Literal["published", "fixed"] = "published"
    kernel_px: int = 21
    min_marker_px: int = 10
    min_object_px: int = 10
    energy_threshold: float = 0.4
    foreground_threshold: float = 0.5
    hv_gradient_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class DetectDecode:
    """Which queries of a box or point model become nuclei.

    score_threshold   least score of a nucleus, 0..1.
    nms_um            of two points, or centres of boxes, no farther apart (µm) the better stays; 0 leaves all of them.
    """

    score_threshold: float = 0.4
    nms_um: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold {self.score_threshold}: must be 0 to 1")
        if not 0 <= self.nms_um <= 50:
            raise ValueError(f"nms_um {self.nms_um}: must be 0 to 50 µm")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a pipeline must know of a model: input pixels, what it finds, and how its output is decoded.

    `classes` excludes background and is empty for a model that does not type nuclei. `tile_px` and `overlap_px` are
    defaults in plane pixels; read boxes are multiples of `multiple_px`. `decode` is for masks, `detect` for boxes and
    points. `embedding_dim` is the length of the vector that the model gives with each nucleus, 0 for none.
    `bf16_on_cpu` says that the scores hold in bf16, so that a CPU which computes in it may.
    """

    name: str
    kind: ModelKind
    mpp: float
    tile_px: int
    overlap_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[ClassSpec, ...] = ()
    multiple_px: int = 16
    decode: HoverDecode = field(default_factory=HoverDecode)
    weights_id: str = ""
    weights_sha256: str = ""
    licence: str = ""
    detect: DetectDecode = field(default_factory=DetectDecode)
    embedding_dim: int = 0
    bf16_on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class HoverMaps:
    """Network output of one tile, small enough to hand to another process.

    foreground       uint8 (H, W), 1 where the nucleus logit wins (a tie is background).
    foreground_prob  float16 (H, W).
    hv               float32 (2, H, W): horizontal, vertical.
    type_prob        float16 (K + 1, H, W) with background first, or None.
    """

    foreground: UInt8
    foreground_prob: NDArray[np.float16]
    hv: Float32
    type_prob: NDArray[np.float16] | None = None


def _check_lengths(record: object, n: int, columns: tuple[str, ...]) -> None:
    for name in columns:
        column = getattr(record, name)
        if column is not None and len(column) != n:
            raise ValueError(f"{type(record).__name__}.{name} has {len(column)} rows, expected {n}")


@dataclass(frozen=True, slots=True)
class NoOutput:
    """Why the network gave nothing for a tile."""

    error: str


@dataclass(frozen=True, slots=True)
class Instances:
    """Nuclei of one tile, in tile pixels.

    centroid_xy   float64 (N, 2).
    score         float32 (N,), the detector's confidence, 0..1.
    area_px       float32 (N,), 0 for points.
    class_prob    float32 (N, K) over the model's classes, rows sum to 1, or None.
    box_xyxy      float32 (N, 4) or None.
    contour_xy, contour_start
                  float32 (P, 2) and int64 (N + 1,): outline of nucleus i is contour_xy[start[i]:start[i+1]], open ring,
                  or None for boxes and points.
    cut           bool (N,): touches the edge of the read box.
    embedding     float32 (N, D) or None.
    """

    centroid_xy: Float64
    score: Float32
    area_px: Float32
    cut: Bool
    class_prob: Float32 | None = None
    box_xyxy: Float32 | None = None
    contour_xy: Float32 | None = None
    contour_start: Int64 | None = None
    embedding: Float32 | None = None

    def __post_init__(self) -> None:
        _check_columns(self, ("score", "area_px", "cut", "class_prob", "box_xyxy", "embedding"))

    def __len__(self) -> int:
        return len(self.centroid_xy)

    def take(self, rows: NDArray[Any]) -> Instances:
        """Return the rows given by a boolean mask or by indices, in that order."""
        return _take(self, rows)


@dataclass(frozen=True, slots=True)
class Cells:
    """Nuclei in level-0 pixels; columns as in `Instances`, plus where they came from.

    tile_index   int32 (N,), the tile that found the nucleus.
    row          int32 (N,), the tile row whose own boxes hold the centroid: the first key of the final order.
    area_um2     float32 (N,).
    """

    centroid_xy: Float64
    tile_index: Int32
    row: Int32
    score: Float32
    area_um2: Float32
    class_prob: Float32 | None = None
    box_xyxy: Float64 | None = None
    contour_xy: Float64 | None = None
    contour_start: Int64 | None = None
    embedding: Float32 | None = None

    def __post_init__(self) -> None:
        _check_columns(self, ("tile_index", "row", "score", "area_um2", "class_prob", "box_xyxy", "embedding"))

    def __len__(self) -> int:
        return len(self.centroid_xy)

    def take(self, rows: NDArray[Any]) -> Cells:
        """Return the rows given by a boolean mask or by indices, in that order."""
        return _take(self, rows)


Record = TypeVar("Record", Instances, Cells)


def _check_columns(record: Record, names: tuple[str, ...]) -> None:
    n = len(record.centroid_xy)
    _check_lengths(record, n, names)
    if (record.contour_xy is None) != (record.contour_start is None):
        raise ValueError("contour_xy and contour_start go together")
    if record.contour_start is not None:
        _check_lengths(record, n + 1, ("contour_start",))


def _take(record: Record, rows: NDArray[Any]) -> Record:
    rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
    columns: dict[str, Any] = {}
    for spec in fields(record):
        column = getattr(record, spec.name)
        if column is not None and not spec.name.startswith("contour_"):
            columns[spec.name] = column[rows]
    if record.contour_start is not None and record.contour_xy is not None:
        columns["contour_xy"], columns["contour_start"] = take_rings(record.contour_xy, record.contour_start, rows)
    return type(record)(**columns)


def take_rings(xy: NDArray[Any], start: Int64, rows: NDArray[Any]) -> tuple[NDArray[Any], Int64]:
    """Return the rings `rows` of a flat (vertices, offsets) pair, in that order."""
    lengths = (start[1:] - start[:-1])[rows]
    new_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    gather = np.repeat(start[:-1][rows] - new_start[:-1], lengths) + np.arange(new_start[-1])
    return xy[gather], new_start


def concat(records: list[Record]) -> Record:
    """Join records row-wise; an optional column must be present in all or in none."""
    if not records:
        raise ValueError("nothing to join")
    columns: dict[str, Any] = {}
    for spec in fields(records[0]):
        if spec.name == "contour_start":
            continue
        parts = [getattr(r, spec.name) for r in records]
        present = [p for p in parts if p is not None]
        if present and len(present) != len(parts):
            raise ValueError(f"column {spec.name} is missing in some records")
        columns[spec.name] = np.concatenate(present) if present else None
    if records[0].contour_start is not None:
        lengths = [np.diff(r.contour_start) for r in records if r.contour_start is not None]
        columns["contour_start"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    return type(records[0])(**columns)


@dataclass(frozen=True, slots=True)
class CropSpec:
    """A square crop centred on a nucleus: `field_px` pixels of the classifier's plane, resampled to `input_px`.

    border    what stands outside the slide: "zero" is black, "reflect" mirrors the slide at its edge.
    resample  how the field becomes the input where the two differ: "bilinear" as published (no antialias), or "area".
    """

    field_px: int
    input_px: int
    border: Literal["zero", "reflect"] = "reflect"
    resample: Literal["bilinear", "area"] = "area"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was fitted on validation cells, for one set of classifier weights; K classes in the weights' order.

    temperature_*   divide the logits of a path, or of the mix (log probabilities), 1 where nothing was fitted.
    reliability_*   precision of each path for each class that it predicts, (K,), or None.
    tau, gamma      thresholds of the safe gate; `safe_accepts` is False where only its baseline chooser did well.
    thresholds      per class, the probability below which the class is not accepted, or None.
    abstain         probability below which no class is accepted, or None.
    abstain_unseen  the same for an organ that was not trained, fitted on organs left out of training; or None.
    accuracy_unseen share of the nuclei of such organs that were typed right, or None.
    class_prior     per class, how frequent the calibrated probabilities take it to be (their mean), or None.
    paths           "local" where the mix gained too little over the local path: the default leaves the global one out.
    """

    temperature_local: float = 1.0
    temperature_global: float = 1.0
    temperature_mix: float = 1.0
    reliability_local: tuple[float, ...] | None = None
    reliability_global: tuple[float, ...] | None = None
    tau: float = 0.5
    gamma: float = 0.05
    safe_accepts: bool = True
    thresholds: tuple[float, ...] | None = None
    abstain: float | None = None
    abstain_unseen: float | None = None
    accuracy_unseen: float | None = None
    class_prior: tuple[float, ...] | None = None
    paths: Literal["both", "local"] = "both"


@dataclass(frozen=True, slots=True)
class ClassifierSpec:
    """What a pipeline must know of a classifier: its crops, classes, organs and calibration.

    `mpp` is the pixel size of the plane that both crops are cut from. `learned_unknown`: the weights hold an embedding
    for an unknown organ (the row after the named ones); otherwise an unknown organ modulates nothing.
    """

    name: str
    mpp: float
    local: CropSpec
    context: CropSpec
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[ClassSpec, ...]
    organs: tuple[str, ...]
    learned_unknown: bool = False
    calibration: Calibration = field(default_factory=Calibration)
    weights_id: str = ""
    weights_sha256: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class PathProbs:
    """What a classifier says of N cells before any decision: the network's own probabilities, not calibrated.

    local, global_  float32 (N, K), rows sum to 1; a row of `global_` is NaN where the global path was skipped.
    gate            float32 (N,), weight of the global path; NaN where it was skipped.
    """

    local: Float32
    global_: Float32
    gate: Float32

    def __post_init__(self) -> None:
        _check_lengths(self, len(self.local), ("global_", "gate"))

    def __len__(self) -> int:
        return len(self.local)


@dataclass(slots=True)
class Counts:
    """What a run met: tiles searched, empty ones, failed ones, nuclei before and after the merge.

    rejected counts what a classifier takes for no nucleus, which `nuclei` leaves out; abstained, nuclei of no class.
    tiles_missing counts tiles of the file, not of the search: those inside the tissue that the file leaves out.
    """

    tiles: int = 0
    tiles_empty: int = 0
    tiles_failed: int = 0
    tiles_missing: int = 0
    nuclei_raw: int = 0
    nuclei: int = 0
    rejected: int = 0
    abstained: int = 0


@dataclass(slots=True)
class Seconds:
    """Wall seconds by stage; stages overlap, so `total` is less than their sum."""

    read: float = 0.0
    infer: float = 0.0
    decode: float = 0.0
    merge: float = 0.0
    classify: float = 0.0
    write: float = 0.0
    total: float = 0.0


@dataclass(slots=True)
class BatchSize:
    """Items in one pass of a network, as really used: tiles, local crops, contexts; None where there were none."""

    tiles: int | None = None
    local: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """The weights a run used."""

    id: str
    sha256: str
    licence: str


@dataclass(frozen=True, slots=True)
class FailedTile:
    """A tile that could not be done: level-0 corner of its read box, and why."""

    x: int
    y: int
    error: str


Word = Literal["good", "look", "do not use"]
# From the best to the worst.
WORDS: tuple[Word, ...] = get_args(Word)


@dataclass(frozen=True, slots=True)
class Check:
    """A measure of a run beside what is expected of it: `word` grades it, `advice` says why and what to do next.

    name  what was measured, with its unit, as in `nucleus_diameter_um`.
    """

    name: str
    value: float | str
    expected: str
    word: Word
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a run can be used: the worst word of its checks."""

    word: Word
    checks: tuple[Check, ...] = ()

    @classmethod
    def of(cls, checks: Iterable[Check]) -> Verdict:
        """Return the verdict of checks, the worst first."""
        ranked = tuple(sorted(checks, key=lambda check: -WORDS.index(check.word)))
        return cls(ranked[0].word if ranked else "good", ranked)

    @property
    def reasons(self) -> tuple[Check, ...]:
        """The checks that are not good."""
        return tuple(check for check in self.checks if check.word != "good")


@dataclass(slots=True)
class RunRecord:
    """What `run.json` holds; `status` is "running" until the slide is complete, then "done" or "done_with_errors"."""

    cellslide_version: str
    status: Literal["running", "interrupted", "done", "done_with_errors", "failed"]
    slide: dict[str, Any]
    config: dict[str, Any]
    weights: list[WeightsRef]
    device: str
    engine: str
    precision: str
    seed: int
    started: str
    finished: str | None = None
    counts: Counts = field(default_factory=Counts)
    searched_mm2: float | None = None
    verdict: Verdict | None = None
    batch_size: BatchSize = field(default_factory=BatchSize)
    failed_tiles: list[FailedTile] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    error: str | None = None
