"""What stands on the page, as plain records; the template report.html only lays it out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cellslide.report.charts import HEIGHT, WIDTH, Chart, chart_of
from cellslide.report.gallery import GalleryCell, Kind
from cellslide.report.images import color_of, dots_uri, heat_uri, shape_of, smoothed, webp_uri
from cellslide.report.pixels import CROP_PX, CROP_UM, Crop
from cellslide.report.regions import SearchedRegion, outline
from cellslide.report.rendering import part, template
from cellslide.report.statistics import CellStatistics
from cellslide.report.worth import worth
from cellslide.store.cell_table import CellTable
from cellslide.store.table_schema import ABSTAINED, NOT_NUCLEUS
from cellslide.types import Check, RunRecord, UInt8, Verdict, hex_color

TITLES: dict[Kind, str] = {
    "sure": "most certain", "unsure": "least certain", "disputed": "the two paths disagree most", "small": "smallest",
    "large": "largest",
}  # fmt: skip
# What checks are called on the page.
CHECKS = {
    "pixel_size_um": "Pixel size (µm)", "tiles_lost": "Tiles lost", "nuclei_per_mm2": "Nuclei per mm²",
    "stain": "Stain (optical density of red, green, blue)", "jpeg_blocks": "JPEG blocks (steps from compression)",
    "out_of_focus": "Out of focus", "artefacts": "No clean tissue",
    "enough_to_judge": "Nuclei to judge by", "pixel_size_by_nuclei": "Pixel size by the nuclei (times the stated one)",
    "nucleus_diameter_um": "Width of nuclei (median, µm)", "specks": "Share of specks (too small for a nucleus)",
    "giants": "Share of giants (far larger than the others)", "outlines_crossing": "Outlines that cross themselves",
    "nuclei_at_seams": "Nuclei at seams of tiles", "size_drift": "Change of size along the slide",
    "not_typed": "Share not typed", "abstained": "Share of no class", "organ": "Organ",
    "class_mix_change": "Change of the mix of classes",
}  # fmt: skip
STAGES = ("read", "infer", "decode", "merge", "classify", "write")
MOST_CROSSES = 300
# How much of the slide the view shows about a nucleus of the gallery.
VIEW_UM = 150.0
# Where fewer cells than this fall on a bin, a share of them says nothing.
LEAST_CELLS = 0.02


@dataclass(frozen=True, slots=True)
class Budget:
    """How much room pictures may take: quality of the compression, and how many crops the gallery shows in all."""

    quality: int
    crops: int


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that was found out of a slide; `picture` is None where the slide is not there."""

    table: CellTable
    record: RunRecord
    tally: CellStatistics
    searched: SearchedRegion
    verdict: Verdict
    notes: tuple[str, ...]
    crops: dict[int, Crop]
    picture: UInt8 | None


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class in numbers; `share` is of the nuclei with a class, `bar` of the largest class."""

    name: str
    color: str
    shape: str
    count: int
    share: float | None
    bar: float
    density: float | None
    area: float | None
    area_low: float | None
    area_high: float | None


@dataclass(frozen=True, slots=True)
class Layer:
    """What lies over the picture and can be hidden: its dots as an image."""

    number: int
    name: str
    color: str
    shape: str
    count: int
    image: str


@dataclass(frozen=True, slots=True)
class Heat:
    """A small map: a name, what the brightest colour stands for, and the image."""

    name: str
    most: str
    image: str


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """A row of the matrix: cells by count, and the share of the row that each is."""

    name: str
    cells: tuple[tuple[int, float, bool], ...]


@dataclass(frozen=True, slots=True)
class Shot:
    """A crop of the gallery: image, outline as an SVG path, words, and its place as the view's address has it."""

    image: str
    outline: str
    caption: str
    alt: str
    place: str = ""


@dataclass(frozen=True, slots=True)
class Strip:
    """Crops of one class and kind."""

    title: str
    shots: tuple[Shot, ...]


def render(material: Material, budget: Budget) -> str:
    """Return the page as HTML."""
    tally, record = material.tally, material.record
    return template("report.html").render(
        material=material, tally=tally, record=record, info=material.table.slide,
        style=part("report.css"),
        verdict=verdict(material.verdict), titles=CHECKS, rows=class_rows(material), others=other_rows(tally),
        size=frame_size(material), heat_size=heat_size(material), overlay=overlay(material),
        picture=None if material.picture is None else webp_uri(material.picture, budget.quality),
        layers=tuple(layers(material)), densities=tuple(densities(tally)), charts=tuple(charts(tally)),
        confidence=confidence(tally), gate=chart_of(tally.gate, "weight of the global path", form=".2f", whole=True),
        matrix=tuple(matrix(tally)), agreed=agreed(tally), dispute=dispute(tally),
        gallery=tuple(gallery(material, budget)), settings=tuple(settings(record)), stages=tuple(stages(record)),
        worth=worth(record), size_check=size_check(material.verdict),
        view=f"cellslide view {shlex.quote(str(material.table.path.parent))} --open",
        chart_width=WIDTH, chart_height=HEIGHT, crop_px=CROP_PX, crop_um=CROP_UM,
    )  # fmt: skip


def verdict(found: Verdict) -> str:
    """Return the verdict as a sentence."""
    odd, n = len(found.reasons), len(found.checks)
    if found.word == "good":
        return f"Good: all {n} checks came out as expected of H&E tissue."
    if found.word == "look":
        return f"Look before you use these numbers: {odd} of {n} checks came out otherwise than expected."
    return f"Do not use these numbers as they are: {odd} of {n} checks came out otherwise than expected."


def size_check(found: Verdict) -> Check | None:
    """Return the check of the median width of nuclei, None where it was not made."""
    return next((check for check in found.checks if check.name == "nucleus_diameter_um"), None)


def class_rows(material: Material) -> tuple[ClassRow, ...]:
    """Return the classes in numbers, in the order of the weights; those without a nucleus too."""
    tally, area = material.tally, material.searched.mm2
    said, largest = int(tally.counts.sum()), max(int(tally.counts.max(initial=0)), 1)
    k_all = len(tally.classes)
    found = []
    for k, name in enumerate(tally.classes):
        if name == NOT_NUCLEUS:
            continue
        n = int(tally.counts[k])
        sizes = [tally.area.quantile(q, k) if tally.area.counts[k].any() else None for q in (0.5, 0.25, 0.75)]
        found.append(
            ClassRow(name, hex_color(color_of(k, k_all)), shape_of(k, k_all), n, n / said if said else None,
                     100 * n / largest, n / area if area else None, *sizes)
        )  # fmt: skip
    return tuple(found)


def other_rows(tally: CellStatistics) -> tuple[tuple[str, int], ...]:
    """Return how many objects have no class, and why."""
    rows = (
        (f"{ABSTAINED} (no class was probable enough)", int(tally.abstained.sum())), ("not typed", tally.untyped),
        (f"{NOT_NUCLEUS} (rejected, in no other number)", tally.rejected),
    )  # fmt: skip
    return tuple((name, n) for name, n in rows if n)


def frame_size(material: Material) -> tuple[int, int]:
    """Return width and height of the picture in pixels, also where there is none."""
    if material.picture is not None:
        return material.picture.shape[1], material.picture.shape[0]
    x0, y0, x1, y1 = material.tally.frame.box
    factor = 1100 / max(x1 - x0, y1 - y0, 1)
    return max(1, round((x1 - x0) * factor)), max(1, round((y1 - y0) * factor))


def heat_size(material: Material) -> tuple[float, float]:
    """Return width and height of the maps in pixels of the picture; their last bins may reach beyond it."""
    frame = material.tally.frame
    factor = frame_size(material)[0] / max(frame.box[2] - frame.box[0], 1e-9) * frame.bin_px
    return round(frame.shape[1] * factor, 1), round(frame.shape[0] * factor, 1)


def overlay(material: Material) -> dict[str, object]:
    """Return what is drawn over the picture as lines: tissue, artefacts and failed tiles in the picture's pixels."""
    width, _ = frame_size(material)
    x0, y0, x1, _ = material.tally.frame.box
    factor = width / max(x1 - x0, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return round((x - x0) * factor, 1), round((y - y0) * factor, 1)

    failed = [place(tile.x, tile.y) for tile in material.record.failed_tiles[:MOST_CROSSES]]
    artefacts = outline([polygon for _, polygon in material.searched.artefacts], (x1 - x0) / width, place)
    bar_um = _scale_bar((x1 - x0) * material.tally.frame.mpp)
    bar = bar_um / material.tally.frame.mpp * factor
    words = f"{bar_um / 1000:g} mm" if bar_um >= 1000 else f"{bar_um:g} µm"
    return {
        "tissue": material.searched.path(place),
        "failed": failed,
        "artefacts": artefacts,
        "bar": bar,
        "words": words,
    }


def _scale_bar(width_um: float) -> float:
    """Return the longest round length (µm) that takes at most a quarter of the picture."""
    return max((n * 10.0**e for e in range(6) for n in (1, 2, 5) if n * 10**e <= width_um / 4), default=1.0)


def layers(material: Material) -> Iterator[Layer]:
    """Yield the dots of each class that has any, and of cells without a class."""
    tally = material.tally
    if not tally.n_dots:
        return
    width, height = frame_size(material)
    x0, y0, x1, _ = tally.frame.box
    xy, named = np.concatenate(tally.dots_xy), np.concatenate(tally.dots_class)
    at = ((xy - (x0, y0)) * (width / max(x1 - x0, 1e-9))).astype(np.float32)
    k_all = len(tally.classes)
    counts = [*tally.counts.tolist(), int(tally.abstained.sum()) + tally.untyped]
    for k in np.unique(named).tolist():
        name = tally.classes[k] if k < k_all else f"{ABSTAINED} or not typed" if tally.untyped else ABSTAINED
        image = dots_uri(at[named == k], (width, height), k, k_all, tally.n_dots)
        yield Layer(k, name, hex_color(color_of(k, k_all)), shape_of(k, k_all), counts[k], image)


def densities(tally: CellStatistics) -> Iterator[Heat]:
    """Yield a map of each class that has any cell, each on its own scale."""
    for k, name in enumerate(tally.classes):
        if tally.counts[k]:
            per_mm2 = smoothed(tally.density[k], tally.frame.bin_um) / tally.frame.bin_mm2
            most = float(per_mm2.max())
            yield Heat(name, f"{most:,.0f} per mm²", heat_uri(per_mm2, most))


def charts(tally: CellStatistics) -> Iterator[Chart]:
    """Yield the histograms of sizes, shapes and the detector's confidence."""
    wanted = [
        chart_of(tally.area, "area", "µm²", ".0f"),
        *(chart_of(h, *_SHAPE_WORDS[name]) for name, h in tally.shapes.items()),
        chart_of(tally.score, "confidence of the detector", form=".2f", whole=True),
    ]
    yield from (chart for chart in wanted if chart is not None)


_SHAPE_WORDS = {
    "major_axis_um": ("length", "µm", ".1f"),
    "eccentricity": ("eccentricity (0 is round)", "", ".2f"),
    "circularity": ("circularity (1 is a circle)", "", ".2f"),
}


def confidence(tally: CellStatistics) -> Chart | None:
    """Return the histogram of the probability of the class, those without a class set off."""
    if not tally.typed:
        return None
    return chart_of(tally.confidence, "probability of the class", form=".2f", whole=True, split=True)


def matrix(tally: CellStatistics) -> Iterator[MatrixRow]:
    """Yield the rows of the matrix of the local path's class against the global path's."""
    if tally.agreement is None or not tally.agreement.any():
        return
    for k, name in enumerate(tally.classes):
        total = max(int(tally.agreement[k].sum()), 1)
        yield MatrixRow(name, tuple((n, n / total, j == k) for j, n in enumerate(tally.agreement[k].tolist())))


def agreed(tally: CellStatistics) -> float | None:
    """Return the share of cells of which both paths say the same."""
    if tally.agreement is None or not tally.agreement.any():
        return None
    return float(np.trace(tally.agreement) / tally.agreement.sum())


def dispute(tally: CellStatistics) -> Heat | None:
    """Return where the paths differ: the share of cells per bin, from 0 to 1; None where they never do."""
    if not tally.where_differ.any():
        return None
    both = smoothed(tally.where_both, tally.frame.bin_um)
    differ = smoothed(tally.where_differ, tally.frame.bin_um)
    share = np.divide(differ, both, out=np.zeros_like(both), where=both > LEAST_CELLS)
    return Heat("cells of which the paths say different classes", "all of them", heat_uri(share, 1.0))


def gallery(material: Material, budget: Budget) -> Iterator[tuple[str, str, str, tuple[Strip, ...]]]:
    """Yield name, colour, mark and strips of each class that has crops."""
    tally = material.tally
    k_all = len(tally.classes)
    each = shown_each(tally, budget)
    for k, name in enumerate(tally.classes):
        strips = tuple(
            Strip(TITLES[kind], shots)
            for kind in TITLES
            if (shots := tuple(_shots(material, k, kind, each, budget.quality)))
        )
        if strips:
            yield name, hex_color(color_of(k, k_all)), shape_of(k, k_all), strips


def shown_each(tally: CellStatistics, budget: Budget) -> int:
    """Return how many crops each class and kind may show, so that all together stay within the budget."""
    return int(np.clip(budget.crops // max(len(tally.picks.kept), 1), 2, 8))


def _shots(material: Material, k: int, kind: Kind, n: int, quality: int) -> Iterator[Shot]:
    for pick in material.tally.picks.of(k, kind, n):
        crop = material.crops.get(pick.row)
        if crop is not None:
            caption = _caption(pick, kind, material.tally)
            alt = f"nucleus {pick.row}, {material.tally.classes[k]}, {caption}; x {pick.xy[0]:.0f}, y {pick.xy[1]:.0f}"
            place = f"x={pick.xy[0]:.0f}&y={pick.xy[1]:.0f}&w={VIEW_UM / material.tally.frame.mpp:.0f}"
            yield Shot(webp_uri(crop.image, min(quality + 5, 90)), crop_path(crop), caption, alt, place)


def _caption(pick: GalleryCell, kind: Kind, tally: CellStatistics) -> str:
    if kind in ("small", "large"):
        return f"{pick.value:.0f} µm²"
    if kind == "disputed":
        return f"{tally.classes[pick.local]} or {tally.classes[pick.global_]}"
    return f"{pick.value:.2f}" + ("" if pick.said else ", no class said")


def crop_path(crop: Crop) -> str:
    """Return the outline of a crop as an SVG path, "" where there is none."""
    if crop.outline_xy is None or not len(crop.outline_xy):
        return ""
    steps = max(1, len(crop.outline_xy) // 40)
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in crop.outline_xy[::steps].tolist()) + "Z"


def settings(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield what the run was made with, name and value."""
    config = record.config
    spec, tiles = config.get("spec") or {}, config.get("tiles") or {}
    typing = config.get("classify") or {}
    yield "slide", str(record.slide.get("path"))
    yield "cellslide", record.cellslide_version
    yield "device", f"{record.device}, {record.engine}, {record.precision}"
    yield "run", f"{record.started} to {record.finished or 'not finished'} (UTC), seed {record.seed}"
    if spec:
        yield (
            "searched at",
            f"{spec.get('mpp')} µm per pixel, tiles of {tiles.get('size_px') or spec.get('tile_px')} px",
        )
    if typing:
        rule = ((typing.get("rule") or {}).get("decision") or {}).get("gate", "mix")
        paths = typing.get("paths", "both")
        if paths == "local" == ((typing.get("spec") or {}).get("calibration") or {}).get("paths"):
            paths = "local alone, since the global path gained less than a point of macro F1 in calibration"
        yield "typing", f"organ {typing.get('organ')}, rule {rule}, paths {paths}"
    counts = record.counts
    yield "tiles", f"{counts.tiles:,}, of them {counts.tiles_empty:,} without a nucleus, {counts.tiles_failed:,} failed"
    yield "nuclei", f"{counts.nuclei:,} of {counts.nuclei_raw:,} before tiles were merged"
    on_device = f", {record.peak_device_bytes / 2**30:.2f} GiB on the GPU" if record.peak_device_bytes else ""
    yield "most memory", f"{record.peak_rss_bytes / 2**30:.2f} GiB{on_device}"


def stages(record: RunRecord) -> Iterator[tuple[str, float, float]]:
    """Yield each stage, its seconds and its share of the longest; stages overlap."""
    seconds = {name: float(getattr(record.seconds, name)) for name in STAGES}
    longest = max(max(seconds.values()), 1e-9)
    for name, value in seconds.items():
        yield name, value, 100 * value / longest
