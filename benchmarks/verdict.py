"""How many faults a verdict catches, and how many good fields it calls bad.

`python -m benchmarks.verdict DATA [--cache DIR]` takes real H&E fields of DATA/{consep,tnbc,brca-m2c}, makes faults
of them (a wrong pixel size, blur, other stains, ink, JPEG, fluorescence), finds nuclei with the network that ships and
prints how each kind is judged. Nuclei are kept in the cache: a change of the checks alone is measured in a minute.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from cellslide.config import InferConfig, SegmentConfig
from cellslide.inference.segmenter import Segmenter, open_segmenter
from cellslide.pipeline import segment_array
from cellslide.plausibility.artefacts import find_artefacts
from cellslide.plausibility.cells import CellSums
from cellslide.plausibility.checks import FEW_CELLS, Evidence, checks, enough, focus, stain
from cellslide.plausibility.fields import measure_fields
from cellslide.plausibility.scale import features
from cellslide.slides.slide import slide_from_array
from cellslide.types import WORDS, Bool, Cells, Float32, Float64, Plane, RunRecord, Tile, UInt8, Verdict
from cellslide.weights import load_model

PLANE_MPP = 0.4
SETS = ("consep", "tnbc", "brca-m2c")
MOST_PX = 800
HAEMATOXYLIN, EOSIN, DAB = (
    np.array(v, np.float32) for v in ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
)


@dataclass(frozen=True, slots=True)
class Case:
    """A field as a run meets it: uint8 (H, W, 3), the pixel size that is stated, and what was done to it."""

    name: str
    kind: str
    image: UInt8
    mpp: float


def fields(data: Path, each: int) -> Iterator[tuple[str, UInt8, float]]:
    """Yield name, image and pixel size (µm) of `each` fields a set, evenly spread over it."""
    for name in SETS:
        with (data / name / "manifest.csv").open(encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        for k in np.unique(np.linspace(0, len(rows) - 1, each).astype(int)).tolist():
            image = cv2.cvtColor(cv2.imread(str(data / name / rows[k]["file"])), cv2.COLOR_BGR2RGB)
            yield f"{name}/{Path(rows[k]['file']).stem}", image[:MOST_PX, :MOST_PX], float(rows[k]["mpp"])


def blurred(image: UInt8, mpp: float, um: float) -> UInt8:
    """Blur by a Gaussian of `um` µm."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), um / mpp), np.uint8)


def density(image: UInt8) -> Float32:
    """Return the optical density of uint8 (H, W, 3)."""
    return np.asarray(-np.log(np.maximum(image, 1).astype(np.float32) / 245), np.float32)


def light(density: Float32) -> UInt8:
    """Return the image of an optical density."""
    return np.clip(np.rint(245 * np.exp(-density)), 0, 255).astype(np.uint8)


def concentrations(image: UInt8) -> tuple[Float32, Float32]:
    """Return haematoxylin and eosin (H, W) of an image, not negative."""
    stains = np.stack([HAEMATOXYLIN, EOSIN, np.cross(HAEMATOXYLIN, EOSIN)])
    found = density(image) @ np.linalg.inv(stains).astype(np.float32)
    return np.maximum(found[..., 0], 0), np.maximum(found[..., 1], 0)


def as_ihc(image: UInt8) -> UInt8:
    """Replace eosin by DAB, as of an antibody against cytoplasm, with nuclei blue."""
    haematoxylin, eosin = concentrations(image)
    return light(0.7 * haematoxylin[..., None] * HAEMATOXYLIN + eosin[..., None] * DAB)


def as_fluorescence(image: UInt8) -> UInt8:
    """Show haematoxylin as light on black, blue as DAPI is."""
    haematoxylin, _ = concentrations(image)
    lit = np.clip(haematoxylin / max(float(np.quantile(haematoxylin, 0.99)), 1e-3), 0, 1) * 255
    return np.stack([0.1 * lit, 0.2 * lit, lit], axis=-1).astype(np.uint8)


def as_jpeg(image: UInt8, quality: int) -> UInt8:
    """Write and read as JPEG."""
    _, packed = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR)[..., ::-1], np.uint8)


def with_ink(image: UInt8, color: tuple[int, int, int]) -> UInt8:
    """Draw a broad stroke of a pen across the middle, through which the tissue hardly shows."""
    height, width = image.shape[:2]
    stroke = np.zeros((height, width), np.float32)
    cv2.line(stroke, (0, int(0.7 * height)), (width, int(0.3 * height)), 1.0, int(0.45 * height))
    stroke = cv2.GaussianBlur(stroke, (0, 0), 6)[..., None] * 0.9
    return np.rint(image * (1 - stroke) + np.array(color) * stroke).astype(np.uint8)


Fault = Callable[[UInt8, float], tuple[UInt8, float]]
FAULTS: dict[str, Fault] = {
    "pixel size x 0.5": lambda image, mpp: (image, 0.5 * mpp),
    "pixel size x 0.67": lambda image, mpp: (image, mpp / 1.5),
    "pixel size x 1.5": lambda image, mpp: (image, 1.5 * mpp),
    "pixel size x 2": lambda image, mpp: (image, 2 * mpp),
    "blur 1.5 µm": lambda image, mpp: (blurred(image, mpp, 1.5), mpp),
    "blur 3 µm": lambda image, mpp: (blurred(image, mpp, 3.0), mpp),
    "red and blue exchanged": lambda image, mpp: (np.ascontiguousarray(image[..., ::-1]), mpp),
    "grey": lambda image, mpp: (np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2), mpp),
    "IHC (eosin made DAB)": lambda image, mpp: (as_ihc(image), mpp),
    "fluorescence": lambda image, mpp: (as_fluorescence(image), mpp),
    "ink, blue": lambda image, mpp: (with_ink(image, (30, 60, 150)), mpp),
    "ink, green": lambda image, mpp: (with_ink(image, (20, 110, 60)), mpp),
    "ink, black": lambda image, mpp: (with_ink(image, (25, 22, 28)), mpp),
    "JPEG of quality 5": lambda image, mpp: (as_jpeg(image, 5), mpp),
}  # fmt: skip


def cases(data: Path, good: int, faulty: int) -> Iterator[Case]:
    """Yield good fields, then each fault of some of them."""
    found = list(fields(data, good))
    for name, image, mpp in found:
        yield Case(name, "good", image, mpp)
    some = list(fields(data, faulty))
    for kind, make in FAULTS.items():
        for name, image, mpp in some:
            yield Case(name, kind, *make(image, mpp))


def sums_of(case: Case, cells: Cells) -> CellSums:
    """Sum up the nuclei of a field as those of a slide are."""
    height, width = case.image.shape[:2]
    sums = CellSums(("Nucleus",), size_um=(width * case.mpp, height * case.mpp))
    zeros = np.zeros(len(cells), np.int64)
    bands = np.zeros((len(cells), 2), np.int64)
    sums.add(cells.centroid_xy * case.mpp, bands, cells.area_um2, zeros, zeros == 0)
    return sums


def fit_scale(found: Sequence[tuple[Case, CellSums]]) -> None:
    """Print the line of `plausibility.scale`, and how far fields that did not fit it lie from the truth."""
    found = [(case, sums) for case, sums in found if sums.n >= FEW_CELLS]
    known = np.array([[*features(sums), 1.0] for _, sums in found])
    true = np.array([np.log2(float(case.kind.rpartition("x ")[2])) if "x" in case.kind else 0.0 for case, _ in found])
    names = np.array([case.name for case, _ in found])

    def line(rows: Bool) -> Float64:
        a, b = known[rows], true[rows]
        return np.asarray(np.linalg.solve(a.T @ a + 1e-2 * np.eye(a.shape[1]), a.T @ b), np.float64)

    off = np.array([known[k] @ line(names != names[k]) - true[k] for k in range(len(found))])
    print(f"line {line(names != '').round(3).tolist()}; standard deviation of {len(off)} fields {off.std():.2f} (log2)")


def judge_case(case: Case, cells: Cells | None) -> Verdict:
    """Return the verdict on a field with its nuclei, or of its pixels alone."""
    slide = slide_from_array(np.ascontiguousarray(case.image), case.mpp)
    plane = Plane.of(slide.info, PLANE_MPP)
    whole = (0, 0, plane.width_px, plane.height_px)
    image = slide.read_plane(plane, whole)
    fields = measure_fields(image, Tile(0, 0, 0, whole, whole), plane, case.mpp, 8 / plane.scale_x)
    sums = CellSums(("Nucleus",)) if cells is None else sums_of(case, cells)
    area = case.image.shape[0] * case.image.shape[1] * case.mpp**2 / 1e6
    record = RunRecord("", "done", {}, {}, [], "", "", "", 0, "", searched_mm2=area)
    evidence = Evidence(Path("."), slide.info, "mask", record, sums, find_artefacts(fields, plane), None)
    found = checks(evidence) if cells is not None else (*stain(evidence), *focus(evidence), *enough(evidence))
    return Verdict.of(found)


def nuclei(case: Case, cache: Path, segmenter: Segmenter | None) -> Cells | None:
    """Return the nuclei of a case, found now or kept from before; None where there are none and no network is given."""
    key = hashlib.sha256(f"{case.name}|{case.kind}".encode()).hexdigest()[:16]
    path = cache / f"{key}.npz"
    if not path.exists():
        if segmenter is None:
            return None
        found = segment_array(segmenter, case.image, case.mpp, segmenter.config)
        np.savez(path, xy=found.centroid_xy, area=found.area_um2, score=found.score)
    kept = np.load(path)
    none = np.zeros(len(kept["xy"]), np.int32)
    return Cells(kept["xy"], none, none, kept["score"], kept["area"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge all cases and print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("verdict-cache"))
    parser.add_argument("--good", type=int, default=14, help="good fields of each set")
    parser.add_argument("--faulty", type=int, default=4, help="fields of each set that faults are made of")
    parser.add_argument("--model", help="network that finds nuclei  [default: the one that ships]")
    parser.add_argument("--no-network", action="store_true", help="take nuclei from the cache alone")
    given = parser.parse_args(arguments)
    given.cache.mkdir(parents=True, exist_ok=True)
    words: dict[str, list[tuple[str, bool]]] = {}
    sized: list[tuple[Case, CellSums]] = []
    with ExitStack() as stack:
        segmenter = None
        if not given.no_network:
            config = SegmentConfig(infer=InferConfig(workers=0, batch_size=1))
            segmenter = stack.enter_context(open_segmenter(load_model(given.model), config))
        for case in cases(given.data, given.good, given.faulty):
            # Only a wrong pixel size needs the nuclei; the other faults are seen in the pixels.
            by_network = segmenter if case.kind.startswith(("good", "pixel")) else None
            found = nuclei(case, given.cache, by_network)
            if found is not None:
                sized.append((case, sums_of(case, found)))
            words.setdefault(case.kind, []).append((judge_case(case, found).word, found is not None))
    fit_scale(sized)
    print("| fields | n | with nuclei | good | look | do not use |\n| --- | --- | --- | --- | --- | --- |")
    for kind, all_words in words.items():
        counts = [sum(word == name for word, _ in all_words) for name in WORDS]
        known = sum(found for _, found in all_words)
        print(f"| {kind} | {len(all_words)} | {known} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    main()
