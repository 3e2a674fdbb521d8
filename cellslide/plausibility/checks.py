"""The checks of a run, one function each: a measure, the range that is expected of H&E tissue, and what to do next.

Ranges come from real fields and from faults made of them (docs/verdict.md). "look" says that numbers may be used after
a look at the page; "do not use" that they are most likely wrong as they stand.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellslide.plausibility.artefacts import INK, KINDS, LEAST_TISSUE, MOST_BLUR, Artefacts
from cellslide.plausibility.cells import LEAST_CELLS, CellSums
from cellslide.plausibility.histogram import Histogram
from cellslide.plausibility.scale import stated_over_true
from cellslide.types import Check, Float32, ModelKind, RunRecord, SlideInfo, Word

# 40x is 0.25 µm, 20x 0.5 µm: the magnification that a file states times its pixel size.
UM_TIMES_POWER, POWER_TOLERANCE = 10.0, 0.25
SQUARE_TOLERANCE = 0.02
# Pixel sizes that scanners have (µm), for what is advised.
USUAL_MPP = (0.125, 0.25, 0.5, 1.0, 2.0)
# Of so few nuclei neither a median nor a share means much.
FEW_CELLS = 20


@dataclass(frozen=True, slots=True)
class Range:
    """What is expected of a measure: good from `low` to `high`, of no use outside `worst_low` to `worst_high`."""

    low: float
    high: float
    worst_low: float = -np.inf
    worst_high: float = np.inf
    form: str = "g"
    unit: str = ""

    def grade(self, value: float) -> Word:
        """Return the word for a value."""
        if self.low <= value <= self.high:
            return "good"
        return "look" if self.worst_low <= value <= self.worst_high else "do not use"

    @property
    def words(self) -> str:
        """What is expected, for people."""
        low, high = f"{self.low:{self.form}}", f"{self.high:{self.form}}"
        text = f"at most {high}" if self.low <= 0 else f"{low} to {high}"
        return f"{text} {self.unit}".strip()


DIAMETER = Range(4.0, 10.0, 3.6, 13.0, unit="µm")
# The pixel size by width and distance of the nuclei: 1.5 to 3 standard deviations of a field, two for
# small and crowded nuclei, which lymphoid tissue has.
SCALE = Range(2**-0.45, 2**0.6, 2**-0.8, 2**0.8, ".2f", "times the stated one")
DENSITY = Range(50.0, 15_000.0, 1.0, 40_000.0, form=",.0f", unit="nuclei per mm²")
SPECKS, SPECK_UM = Range(0.0, 0.15, 0.0, 0.5, ".0%"), 2.5
GIANTS, GIANT_TIMES = Range(0.0, 0.06, 0.0, 0.2, ".0%"), 2.5
ABSTAINED = Range(0.0, 0.3, 0.0, 0.7, ".0%")
UNTYPED = Range(0.0, 0.05, 0.0, 1.0, ".0%")
FAILED = Range(0.0, 0.0, 0.0, 0.2, ".0%")
BROKEN = Range(0.0, 0.01, 0.0, 0.2, ".0%")
DRIFT = Range(0.0, 1.5, 0.0, 2.5, unit="times")
BLURRED = Range(0.0, 0.1, 0.0, 0.5, ".0%")
ARTEFACTS = Range(0.0, 0.1, 0.0, 0.5, ".0%")
BLOCKS = Range(0.0, 1.45, 0.0, 2.5)
# Eosin absorbs green; how much more than the other colours tells H&E from other stains (optical density of length 1).
GREEN_OF_EOSIN = Range(0.17, 1.0, -0.02, 1.0)
# Nuclei are the darker of both, and haematoxylin absorbs red as much as blue or more; where red and blue are exchanged
# one or the other is not so.
LEAST_DEPTH, LEAST_RED_OF_HAEMATOXYLIN = 0.0, -0.03
# No stained tissue is as dense as light on black is.
MOST_DENSE = 1.5
# Two stains that are nearer than this (vectors of length 1) are one: grey, or a single dye.
ONE_STAIN = 0.02
# Of so few fields no share means much.
FEW_FIELDS = 2
MIX = Range(0.0, 0.8, 0.0, 1.0, form=".1f")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a run is judged by.

    folder    of the slide, for the commands that are advised.
    artefacts  the fields of the slide and what is wrong with each.
    outlines  how many were looked at, and how many of them are no valid polygon; None where there are none.
    """

    folder: Path
    info: SlideInfo
    kind: ModelKind
    record: RunRecord
    cells: CellSums
    artefacts: Artefacts
    outlines: tuple[int, int] | None

    def again(self, flags: str) -> str:
        """Return the command that does the slide again with other flags."""
        command = "run" if self.record.config.get("classify") else "segment"
        path, output = shlex.quote(str(self.info.path)), shlex.quote(str(self.folder.parent))
        return f"cellslide {command} {path} -o {output} {flags} --overwrite"


def checks(evidence: Evidence) -> Iterator[Check]:
    """Yield all checks that apply to a run."""
    yield from pixel_size(evidence)
    yield from stain(evidence)
    yield from focus(evidence)
    yield from enough(evidence)
    yield from tiles(evidence)
    yield from density(evidence)
    yield from nuclear_size(evidence)
    yield from outlines(evidence)
    yield from seams(evidence)
    yield from drift(evidence)
    yield from classes(evidence)


def pixel_size(evidence: Evidence) -> Iterator[Check]:
    """Compare the pixel size with the magnification that the file states."""
    info = evidence.info
    if not evidence.record.slide:
        return
    power, mpp = info.objective_power, round(info.mpp_x, 4)
    if abs(info.mpp_x / info.mpp_y - 1) > SQUARE_TOLERANCE:
        advice = f"Pixels are {info.mpp_y:.4g} µm high: not square. Check the pixel size with cellslide info."
        yield Check("pixel_size_um", mpp, "square pixels", "look", advice)
        return
    if power and abs(info.mpp_x * power / UM_TIMES_POWER - 1) > POWER_TOLERANCE:
        usual = UM_TIMES_POWER / power
        advice = f"The file states {power:g}x, which is about {usual:.2g} µm per pixel, not {mpp:g}: "
        advice += evidence.again(f"--mpp {usual:.2g}")
        yield Check("pixel_size_um", mpp, f"about {usual:.2g} µm", "look", advice)
        return
    expected = f"about {UM_TIMES_POWER / power:.2g} µm" if power else "no magnification is stated"
    yield Check("pixel_size_um", mpp, expected, "good")


def stain(evidence: Evidence) -> Iterator[Check]:
    """Judge whether the colours are those of haematoxylin and eosin, and whether JPEG has left them whole."""
    fields = evidence.artefacts.fields
    rows = (fields.column("tissue") >= LEAST_TISSUE) & (evidence.artefacts.kind != INK)
    if rows.sum() < FEW_FIELDS:
        return
    haematoxylin, eosin = (np.median(fields.vectors(name)[rows], axis=0) for name in ("haematoxylin", "eosin"))
    margin = round(float(eosin[1] - max(eosin[0], eosin[2])), 3)
    dense = float(np.median(fields.column("density")[rows])) > MOST_DENSE
    one = float(np.linalg.norm(haematoxylin - eosin)) < ONE_STAIN
    depth = float(np.median(fields.column("depth")[rows]))
    exchanged = depth < LEAST_DEPTH or haematoxylin[0] - haematoxylin[2] < LEAST_RED_OF_HAEMATOXYLIN
    word = "do not use" if dense or one else GREEN_OF_EOSIN.grade(margin)
    word = "look" if word == "good" and exchanged else word
    found = f"haematoxylin {_vector(haematoxylin)}, eosin {_vector(eosin)}"
    advice = "The colours are not those of H&E: " + ("light on black, as in fluorescence. " if dense else "")
    advice += "red and blue may be exchanged. " if exchanged and not dense else ""
    advice += "The models know H&E alone, and other stains (IHC, trichrome, grey) give wrong nuclei and classes. Is it "
    advice += f"the right file? cellslide info {shlex.quote(str(evidence.info.path))}"
    expected = f"eosin absorbs green more than red and blue, by {GREEN_OF_EOSIN.low:g} at least; nuclei are darker"
    yield Check("stain", found, expected, word, "" if word == "good" else advice)
    blocks = fields.column("blocks")[rows]
    if np.isfinite(blocks).any():
        ratio = round(float(np.nanmedian(blocks)), 2)
        word = BLOCKS.grade(ratio)
        advice = f"Steps at the borders of JPEG blocks are {ratio:g} times those elsewhere: so much compression takes "
        advice += "the chromatin away. Use the scanner's own file."
        yield Check("jpeg_blocks", ratio, BLOCKS.words, word, "" if word == "good" else advice)


def _vector(values: Float32) -> str:
    return " ".join(f"{v:.2f}" for v in values.tolist())


def focus(evidence: Evidence) -> Iterator[Check]:
    """Judge how much of the searched tissue is out of focus, and how much is no clean tissue."""
    fields, kind = evidence.artefacts.fields, evidence.artefacts.kind
    tissue = (fields.column("tissue") >= LEAST_TISSUE) | (kind > 0)
    n = int(tissue.sum())
    if n < FEW_FIELDS:
        return
    view = f"cellslide view {shlex.quote(str(evidence.folder))}"
    blurred = round(float((fields.column("blur") > MOST_BLUR)[tissue].mean()), 4)
    word = BLURRED.grade(blurred)
    advice = (
        f"{blurred:.0%} of the tissue is out of focus: nuclei are missed and typed wrongly there. Scan it again, or "
    )
    advice += f"leave these regions out (in_artefact; tissue.geojson shows them): {view}"
    yield Check("out_of_focus", blurred, BLURRED.words, word, "" if word == "good" else advice)
    names = [
        f"{(kind == code).sum() / n:.0%} {name}" for code, name in enumerate(KINDS) if code and (kind == code).any()
    ]
    share = round(float((kind[tissue] > 0).mean()), 4)
    word = ARTEFACTS.grade(share)
    advice = (
        f"{', '.join(names)} of the tissue; {evidence.cells.in_artefact:,} of {evidence.cells.n:,} nuclei lie there. "
    )
    advice += f"Leave them out (in_artefact) or look: {view}"
    yield Check("artefacts", share, ARTEFACTS.words, word, "" if word == "good" else advice)


def enough(evidence: Evidence) -> Iterator[Check]:
    """Say where there is so little that most checks cannot be made: no fault was looked for, so none was found."""
    n, fields = evidence.cells.n, evidence.artefacts.fields
    n_fields = int((fields.column("tissue") >= LEAST_TISSUE).sum())
    if 0 < n < FEW_CELLS or (len(fields) and n_fields < FEW_FIELDS):
        advice = (
            f"{n:,} nuclei and {n_fields:,} fields of 64 µm with tissue: too little to judge the pixel size and the "
        )
        advice += "stain by. Look at each outline on the page, and at the pixel size."
        yield Check("enough_to_judge", float(n), f"at least {FEW_CELLS} nuclei and {FEW_FIELDS} fields", "look", advice)


def tiles(evidence: Evidence) -> Iterator[Check]:
    """Judge the tiles that failed, or that the file leaves out."""
    counts = evidence.record.counts
    if not counts.tiles:
        return
    share = round((counts.tiles_failed + counts.tiles_missing) / (counts.tiles + counts.tiles_missing), 4)
    word, advice = FAILED.grade(share), ""
    if word != "good":
        first = evidence.record.failed_tiles[0].error if evidence.record.failed_tiles else "no reason is known"
        lost = f"{counts.tiles_failed:,} of {counts.tiles:,} tiles failed, {counts.tiles_missing:,} are missing"
        advice = f"{lost} ({first}): there are no nuclei in these places. The same command again tries them again."
    yield Check("tiles_lost", share, "none", word, advice)


def density(evidence: Evidence) -> Iterator[Check]:
    """Judge the number of nuclei on the area that was searched."""
    area = evidence.record.searched_mm2
    if not evidence.cells.n:
        advice = "No nucleus was found. tissue.geojson shows what was searched; is the pixel size right, is it H&E?"
        yield Check("nuclei_per_mm2", 0.0, DENSITY.words, "do not use", advice)
    elif area:
        found = round(evidence.cells.n / area, 1)
        word = DENSITY.grade(found)
        few = "Few nuclei for tissue" if found < DENSITY.low else "More nuclei than tissue holds"
        advice = f"{few}: look at the outline of what was searched on the page, and at the pixel size."
        yield Check("nuclei_per_mm2", found, DENSITY.words, word, "" if word == "good" else advice)


def nuclear_size(evidence: Evidence) -> Iterator[Check]:
    """Judge the median diameter of nuclei, and how many are far smaller or larger."""
    sizes = evidence.cells.diameter
    if evidence.kind == "point" or sizes.n < FEW_CELLS:
        return
    median = round(sizes.quantile(0.5), 2)
    word = DIAMETER.grade(median)
    yield Check("nucleus_diameter_um", median, DIAMETER.words, word, "" if word == "good" else _scale(evidence, median))
    yield _scale_of_nuclei(evidence, median)
    specks = round(share_below(sizes, SPECK_UM), 4)
    word = SPECKS.grade(specks)
    advice = f"{specks:.0%} of the outlines are less than {SPECK_UM:g} µm wide: debris or noise. Look at the smallest."
    yield Check("specks", specks, SPECKS.words, word, "" if word == "good" else advice)
    giants = round(1 - share_below(sizes, GIANT_TIMES * median), 4)
    word = GIANTS.grade(giants)
    advice = (
        f"{giants:.0%} of the outlines are more than {GIANT_TIMES:g} times as wide as the median: nuclei that were "
    )
    advice += "taken for one, or folds and ink. Look at the largest on the page."
    yield Check("giants", giants, GIANTS.words, word, "" if word == "good" else advice)


def share_below(sizes: Histogram, limit: float) -> float:
    """Return the share of values below a limit, to the step of the histogram."""
    total = sizes.counts.sum(axis=0)
    step = round((limit - sizes.low) / (sizes.high - sizes.low) * sizes.steps)
    return float(total[: max(step, 0)].sum() / max(total.sum(), 1))


def _scale_of_nuclei(evidence: Evidence, median: float) -> Check:
    """Compare the pixel size with what the nuclei say of it."""
    ratio = round(1 / stated_over_true(evidence.cells), 2)
    word = SCALE.grade(ratio)
    return Check("pixel_size_by_nuclei", ratio, SCALE.words, word, "" if word == "good" else _scale(evidence, median))


def _scale(evidence: Evidence, median: float) -> str:
    """Return in words which pixel size would make nuclei as large and as far apart as nuclei are, with the command."""
    mpp = evidence.info.mpp_x
    ratio = stated_over_true(evidence.cells)
    likely = min(USUAL_MPP, key=lambda other: abs(np.log(other * ratio / mpp)))
    words = f"Nuclei here are {median:.1f} µm wide in the median, human nuclei 5 to 12"
    if abs(np.log2(likely / mpp)) < 0.4:
        return f"{words}: look at the outlines on the page before you use the numbers."
    return f"{words}: the pixel size is likely {likely:g} µm, not {mpp:.3g}: {evidence.again(f'--mpp {likely:g}')}"


def outlines(evidence: Evidence) -> Iterator[Check]:
    """Judge the share of outlines that cross themselves."""
    if evidence.outlines is None or not evidence.outlines[0]:
        return
    looked, broken = evidence.outlines
    share = round(broken / looked, 4)
    word = BROKEN.grade(share)
    advice = f"{broken:,} of {looked:,} outlines cross themselves; they are repaired in the GeoJSON."
    yield Check("outlines_crossing", share, BROKEN.words, word, "" if word == "good" else advice)


def seams(evidence: Evidence) -> Iterator[Check]:
    """Judge whether nuclei are lost or counted twice where tiles meet."""
    found = evidence.cells.seams
    if found is None:
        return
    many = found.twins > max(2.0, 0.01 * found.near)
    expected = f"about {found.expected:,.0f}, none of them twice"
    advice = (
        f"{found.near:,} nuclei lie within 3 µm of where tiles meet, {found.twins:,} pairs may be one nucleus: try a "
    )
    advice += f"larger overlap: {evidence.again('--overlap 256')}"
    bad = found.odd or many
    yield Check("nuclei_at_seams", float(found.near), expected, "look" if bad else "good", advice if bad else "")


def drift(evidence: Evidence) -> Iterator[Check]:
    """Judge whether nuclei grow or shrink along the slide, as they do where the scan changes."""
    ratios = []
    for bands in (evidence.cells.bands_x, evidence.cells.bands_y):
        medians = [bands.quantile(0.5, k) for k in range(bands.groups) if bands.counts[k].sum() >= LEAST_CELLS]
        if len(medians) > 1:
            ratios.append(max(medians) / min(medians))
    if ratios:
        most = round(max(ratios), 3)
        word = DRIFT.grade(most)
        advice = (
            "Nuclei of one part of the slide are this many times as wide as those of another: compare focus and stain "
        )
        advice += f"of the parts: cellslide view {shlex.quote(str(evidence.folder))}"
        yield Check("size_drift", most, DRIFT.words, word, "" if word == "good" else advice)


def classes(evidence: Evidence) -> Iterator[Check]:
    """Judge how the nuclei were typed."""
    cells, typing = evidence.cells, evidence.record.config.get("classify") or {}
    typed = int(cells.counts.sum()) + cells.abstained
    if typing and cells.n:
        share = round(cells.untyped / cells.n, 4)
        word = UNTYPED.grade(share)
        advice = f"{cells.untyped:,} of {cells.n:,} nuclei were not typed; classes speak of the others alone."
        yield Check("not_typed", share, UNTYPED.words, word, "" if word == "good" else advice)
    if typing and typed >= FEW_CELLS:
        share = round(cells.abstained / typed, 4)
        word = ABSTAINED.grade(share)
        advice = (
            f"No class was said of {share:.0%} of the nuclei: the classifier does not know such tissue, or the organ "
        )
        advice += "is not the one given (--organ)."
        yield Check("abstained", share, ABSTAINED.words, word, "" if word == "good" else advice)
    if typing.get("organ_trained") is False:
        organ, trained = str(typing.get("organ")), ", ".join(typing["spec"]["organs"]) or "no organ by name"
        worth = typing["spec"]["calibration"].get("accuracy_unseen")
        advice = f"The classifier was not trained on {organ} and abstains more."
        if worth is not None:
            advice += f" On an organ left out of training it typed {worth:.0%} of the nuclei right."
        yield Check("organ", organ, trained, "look", advice)
    yield from _mix(evidence)


def _mix(evidence: Evidence) -> Iterator[Check]:
    """Compare the mix of classes in each part of the slide with that of the whole."""
    mix, whole = evidence.cells.mix, evidence.cells.counts
    large = mix[mix.sum(axis=1) >= LEAST_CELLS]
    if len(large) < 2 or len(whole) < 2:
        return
    distance = np.abs(large / large.sum(axis=1, keepdims=True) - whole / whole.sum()).sum(axis=1) / 2
    most = round(float(distance.max()), 3)
    word = MIX.grade(most)
    advice = (
        "One part of the slide has other classes than the whole: another tissue, or a fault of that part. Look at the "
    )
    advice += f"maps of the classes on the page: cellslide view {shlex.quote(str(evidence.folder))}"
    yield Check("class_mix_change", most, MIX.words, word, "" if word == "good" else advice)
