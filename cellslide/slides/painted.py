"""A slide to try things on: tissue painted from nothing but a seed, so that it ships with no one's data.

The painter works in stain concentrations (haematoxylin and eosin, each a plane) and turns them into light at the end by
Beer-Lambert, as Ruifrok and Johnston (2001) describe it; the stain vectors are theirs. Frames: level-0 pixels, (x, y).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from cellslide.errors import CellslideError
from cellslide.store.atomic import beside
from cellslide.types import Bool, Float32, Float64, Int32, UInt8

MPP = 0.25
WIDTH_PX, HEIGHT_PX = 2048, 1536
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.09, 0.95, 0.28], np.float32)
GLASS = np.array([244, 243, 245], np.float32)

SAMPLE_URL = "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/CMU-1-Small-Region.svs"
SAMPLE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"


@dataclass(frozen=True, slots=True)
class Kind:
    """How nuclei of one kind look: half axes in µm (low, high), stain, chromatin contrast, rim and nucleoli."""

    long_um: tuple[float, float]
    short_um: tuple[float, float]
    stain: float
    clumps: float
    rim: float
    nucleoli: int
    wobble: float
    gap_px: int = 1


EPITHELIUM = Kind((4.2, 5.6), (2.4, 3.0), 0.50, 0.20, 0.14, 1, 0.07)
TUMOUR = Kind((4.0, 6.4), (3.0, 4.8), 0.33, 0.34, 0.22, 2, 0.09, gap_px=2)
LYMPHOCYTE = Kind((3.0, 3.6), (2.7, 3.3), 0.68, 0.28, 0.06, 0, 0.06)
FIBROBLAST = Kind((5.0, 8.5), (1.2, 1.9), 0.54, 0.18, 0.10, 0, 0.09, gap_px=3)


@dataclass(slots=True)
class Canvas:
    """Stain planes (H, W), the tissue, and the painted nuclei: `labels` holds k + 1 where nucleus k is."""

    rng: np.random.Generator
    haematoxylin: Float32
    eosin: Float32
    labels: Int32
    grain: Float32
    fibre_angle: Float32
    centroid_xy: list[tuple[float, float]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.labels.shape[0], self.labels.shape[1]


@dataclass(frozen=True, slots=True)
class Painting:
    """What was painted: image uint8 (H, W, 3), label map int32 (H, W) and centroids float64 (N, 2) of its nuclei."""

    image: UInt8
    labels: Int32
    centroid_xy: Float64


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma_px: float) -> Float32:
    """Return noise of unit variance that varies over about `sigma_px` pixels, float32 (H, W)."""
    step = max(1, int(sigma_px / 3))
    height, width = (math.ceil(n / step) + 4 for n in shape)
    small = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), sigma_px / step)
    full = cv2.resize(small, (width * step, height * step), interpolation=cv2.INTER_CUBIC)[: shape[0], : shape[1]]
    return np.asarray((full - full.mean()) / full.std(), np.float32)


def _endless_streaks(rng: np.random.Generator, thin_px: float, long_px: float, size: int = 1536) -> Float32:
    """Return noise blurred more along x than along y, of unit variance, that continues over its edges."""
    f = np.fft.fftfreq(size)
    blur = np.exp(-2 * (np.pi * thin_px * f[:, None]) ** 2 - 2 * (np.pi * long_px * f[None, :]) ** 2)
    streaks = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * blur).real
    return np.asarray(streaks / streaks.std(), np.float32)


def _fibres(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Float32, Float32]:
    """Return collagen texture of unit variance and the angle of its fibres in radians; a smooth field bends them."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    tilt = math.radians(-24)
    bend = 95 * smooth_noise(rng, shape, 190) + 16 * smooth_noise(rng, shape, 60)
    along = x * math.cos(tilt) + y * math.sin(tilt)
    across = -x * math.sin(tilt) + y * math.cos(tilt) + bend
    texture = np.zeros(shape, np.float32)
    for thin, length, weight in ((1.6, 40.0, 0.6), (4.0, 90.0, 0.9), (11.0, 170.0, 0.8)):
        streaks = _endless_streaks(rng, thin, length)
        size = len(streaks)
        where = np.mod(along, size).astype(np.float32), np.mod(across, size).astype(np.float32)
        texture += weight * cv2.remap(streaks, *where, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    slope_y, slope_x = np.gradient(cv2.GaussianBlur(across, (0, 0), 4))
    return texture / texture.std(), np.arctan2(-slope_x, slope_y).astype(np.float32)


def _blob(shape: tuple[int, int], centre: tuple[float, float], radius: Float64) -> tuple[Float32, Float32]:
    """Return (distance, angle) planes of a star-shaped blob: px to its edge along the ray, positive inside."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    angle = np.arctan2(y - centre[1], x - centre[0])
    edge = np.interp(angle, np.linspace(-np.pi, np.pi, len(radius)), radius)
    return (edge - np.hypot(x - centre[0], y - centre[1])).astype(np.float32), angle


def _star(rng: np.random.Generator, radius_px: float, wobble: float) -> Float64:
    """Return the radius of a closed wobbly ring at 361 angles."""
    angle = np.linspace(-np.pi, np.pi, 361)
    waves = sum(rng.normal(0, wobble / k) * np.cos(k * angle + rng.uniform(0, 6.28)) for k in range(2, 7))
    return np.asarray(radius_px * (1 + waves), np.float64)


def _soft(distance_px: Float32, width_px: float) -> Float32:
    return np.clip(distance_px / width_px + 0.5, 0, 1).astype(np.float32)


def _lay(canvas: Canvas, alpha: Float32, haematoxylin: Float32 | float, eosin: Float32 | float) -> None:
    """Cover the canvas with a layer of the given stain where alpha is 1."""
    canvas.haematoxylin += alpha * (haematoxylin - canvas.haematoxylin)
    canvas.eosin += alpha * (eosin - canvas.eosin)


def add_nucleus(canvas: Canvas, kind: Kind, xy: tuple[float, float], angle: float) -> bool:
    """Paint one nucleus; return False and paint nothing if it would meet another one or leave the canvas."""
    rng = canvas.rng
    a, b = (rng.uniform(*axis) / MPP for axis in (kind.long_um, kind.short_um))
    reach = int(a * 1.3) + 4
    x0, y0 = int(xy[0]) - reach, int(xy[1]) - reach
    height, width = canvas.shape
    if min(x0, y0) < 0 or x0 + 2 * reach > width or y0 + 2 * reach > height:
        return False
    if canvas.labels[int(xy[1]), int(xy[0])]:
        return False  # Most tries end here, before anything is drawn.
    box = slice(y0, y0 + 2 * reach), slice(x0, x0 + 2 * reach)
    depth = _nucleus_depth(rng, (xy[0] - x0, xy[1] - y0), 2 * reach, (a, b, angle), kind.wobble)
    if canvas.labels[box][depth > -kind.gap_px].any():
        return False
    _stain_nucleus(canvas, kind, box, depth)
    inside = depth > 0
    canvas.labels[box][inside] = len(canvas.centroid_xy) + 1
    rows, cols = np.nonzero(inside)
    canvas.centroid_xy.append((x0 + cols.mean() + 0.5, y0 + rows.mean() + 0.5))
    return True


def _nucleus_depth(
    rng: np.random.Generator, xy: tuple[float, float], size: int, ellipse: tuple[float, float, float], wobble: float
) -> Float32:
    """Return how deep each pixel lies inside a bent ellipse, in px, negative outside."""
    a, b, angle = ellipse
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    x, y = x - xy[0], y - xy[1]
    p, q = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    q = q + rng.normal(0, 0.12) * b * ((p / a) ** 2 - 0.4)
    turn, rho = np.arctan2(q / b, p / a), np.hypot(p / a, q / b)
    waves = ((k, rng.normal(0, wobble) / (k - 1), rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
    edge = 1 + sum(size * np.cos(k * turn + shift) for k, size, shift in waves)
    slope = np.hypot(p / a**2, q / b**2) / np.maximum(rho, 1e-3)
    inside: Float32 = ((edge - rho) / np.maximum(slope, 1 / a)).astype(np.float32)
    return inside


def _stain_nucleus(canvas: Canvas, kind: Kind, box: tuple[slice, slice], depth: Float32) -> None:
    """Stain one nucleus: chromatin in clumps, a darker membrane, nucleoli, and its own focus."""
    rng = canvas.rng
    size = depth.shape[0]
    top, left = rng.integers(0, canvas.grain.shape[0] - size, 2)
    chromatin = canvas.grain[top : top + size, left : left + size]
    stain = kind.stain * rng.uniform(0.82, 1.2) * (1 + kind.clumps * chromatin)
    stain = stain + kind.rim * np.exp(-((depth - 1.5) ** 2) / 4.5)
    rows, cols = np.nonzero(depth > 4)
    y, x = np.mgrid[:size, :size]
    for _ in range(rng.integers(0, kind.nucleoli + 1) if len(rows) else 0):
        k = rng.integers(len(rows))
        stain = stain + 0.3 * np.exp(-((y - rows[k]) ** 2 + (x - cols[k]) ** 2) / rng.uniform(5, 12))
    focus = float(rng.uniform(0.5, 1.3))
    alpha = cv2.GaussianBlur(_soft(depth, 1.6), (0, 0), focus)
    stain = cv2.GaussianBlur(np.maximum(stain, 0.08).astype(np.float32), (0, 0), focus)
    canvas.haematoxylin[box] += alpha * (stain - canvas.haematoxylin[box])
    canvas.eosin[box] += alpha * (0.10 - canvas.eosin[box])


def _scatter(canvas: Canvas, where: Bool, tries: int) -> Iterator[tuple[float, float]]:
    """Yield random points of a mask."""
    rows, cols = np.nonzero(where)
    for k in canvas.rng.integers(0, len(rows), tries) if len(rows) else ():
        yield float(cols[k]) + 0.5, float(rows[k]) + 0.5


def _stroma(canvas: Canvas, fibres: Float32) -> None:
    fine = smooth_noise(canvas.rng, canvas.shape, 1.2)
    eosin = 0.165 + 0.042 * fibres + 0.018 * fine + 0.02 * smooth_noise(canvas.rng, canvas.shape, 120)
    clefts = _soft(-(fibres + 1.5), 0.6)
    _lay(
        canvas, np.ones(canvas.shape, np.float32), 0.035 + 0.012 * fibres, np.maximum(eosin, 0.03) * (1 - 0.85 * clefts)
    )


def _gland(canvas: Canvas, centre: tuple[float, float], radius_px: float, mottle: Float32, mucus: Float32) -> Bool:
    """Paint one gland: a ring of columnar cells round a lumen; return the pixels that it takes."""
    rng = canvas.rng
    outer = _star(rng, radius_px, 0.09)
    depth, angle = _blob(canvas.shape, centre, outer)
    thick = rng.uniform(64, 80)
    streaks = smooth_noise(rng, (1, 361), 2.0)[0]
    cell_walls = np.interp(angle, np.linspace(-np.pi, np.pi, 361), streaks).astype(np.float32)
    body = _soft(depth, 3)
    fade = np.clip(depth / thick, 0, 1)
    _lay(canvas, body, 0.11 - 0.04 * fade + 0.018 * mottle, 0.155 + 0.025 * mottle + 0.02 * cell_walls)
    lumen = _soft(depth - thick - 3 * cell_walls, 4)
    _lay(canvas, lumen, 0.4 * mucus, mucus)
    for row_px in (24, 42):
        share = 1.0 if row_px == 24 else 0.35
        for turn in np.arange(-np.pi, np.pi, 21.0 / (radius_px - row_px)):
            if rng.random() > share:
                continue
            ray = turn + rng.normal(0, 0.02)
            edge = float(np.interp((ray + np.pi) % (2 * np.pi) - np.pi, np.linspace(-np.pi, np.pi, 361), outer))
            r = edge - row_px - rng.normal(0, 5)
            at = centre[0] + r * math.cos(ray), centre[1] + r * math.sin(ray)
            add_nucleus(canvas, EPITHELIUM, at, ray + rng.normal(0, 0.18))
    return depth > -8


def _tumour(canvas: Canvas, where: Float32) -> None:
    """Paint a solid sheet of large pale nuclei: first nuclei, then a cell body round each by its nearest nucleus."""
    first = len(canvas.centroid_xy)
    haze = smooth_noise(canvas.rng, canvas.shape, 2.0)
    _lay(canvas, _soft(where, 6), 0.09 + 0.02 * haze, 0.17 + 0.03 * haze)
    for at in _scatter(canvas, where > 10, 6000):
        add_nucleus(canvas, TUMOUR, at, canvas.rng.uniform(0, np.pi))
    seeds = np.ones(canvas.shape, np.uint8)
    for x, y in canvas.centroid_xy[first:]:
        seeds[int(y), int(x)] = 0
    if not seeds.all():
        _cell_borders(canvas, seeds, where)


def _cell_borders(canvas: Canvas, seeds: UInt8, where: Float32) -> None:
    """Draw faint membranes where the nearest nucleus changes."""
    _, owner = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    changes = (owner != np.roll(owner, 1, 0)) | (owner != np.roll(owner, 1, 1))
    line = cv2.GaussianBlur(changes.astype(np.float32), (0, 0), 1.3) * _soft(where, 6) * (canvas.labels == 0)
    canvas.eosin += 0.16 * line
    bodies = canvas.rng.normal(1, 0.12, int(owner.max()) + 1).astype(np.float32)[owner]
    inside = _soft(where, 6) * (canvas.labels == 0)
    canvas.eosin *= 1 + inside * (bodies - 1)


def _vessel(canvas: Canvas, centre: tuple[float, float], radius_px: float) -> Bool:
    """Paint a small vessel with red cells and flat nuclei in its wall; return the pixels that it takes."""
    rng = canvas.rng
    depth, _ = _blob(canvas.shape, centre, _star(rng, radius_px, 0.12))
    _lay(canvas, _soft(depth + 9, 3), 0.05, 0.24)
    _lay(canvas, _soft(depth, 3), 0.0, 0.02)
    for x, y in _scatter(canvas, depth > 14, int(radius_px * 0.8)):
        _red_cell(canvas, int(x), int(y))
    for turn in np.arange(0, 2 * np.pi, 80 / radius_px):
        ray = turn + rng.normal(0, 0.15)
        at = centre[0] + (radius_px + 5) * math.cos(ray), centre[1] + (radius_px + 5) * math.sin(ray)
        add_nucleus(canvas, FIBROBLAST, at, ray + np.pi / 2)
    return depth > -14


def _red_cell(canvas: Canvas, x: int, y: int) -> None:
    """Paint one red cell: a pink disc, paler in the middle, that covers what lies below; none at the slide's edge."""
    if min(x, y) < 16 or x + 16 > canvas.shape[1] or y + 16 > canvas.shape[0]:
        return
    rows, cols = np.mgrid[-16:16, -16:16] + 0.5
    r = np.hypot(cols, rows * canvas.rng.uniform(1, 1.3)).astype(np.float32)
    box = slice(y - 16, y + 16), slice(x - 16, x + 16)
    alpha = 0.9 * _soft(12.5 - r, 2)
    canvas.haematoxylin[box] *= 1 - alpha
    canvas.eosin[box] += alpha * (0.29 - 0.09 * np.exp(-((r / 6) ** 2)) - canvas.eosin[box])


GLANDS = ((330, 380, 165), (690, 300, 140), (420, 800, 185), (800, 690, 150), (330, 1190, 140), (730, 1120, 165))
VESSELS = ((1040, 430, 52), (1010, 960, 40), (560, 560, 30))
TUMOUR_AT, LYMPHOID_AT = (1490, 560), (1330, 1150)


def _compose(canvas: Canvas, fibres: Float32) -> None:
    """Paint tissue from the bottom up: stroma, glands, vessels, tumour, lymphoid cluster, cells of the stroma."""
    rng = canvas.rng
    _stroma(canvas, fibres)
    taken = np.zeros(canvas.shape, bool)
    mottle = smooth_noise(rng, canvas.shape, 2.2)
    mucus = np.clip(0.03 + 0.02 * smooth_noise(rng, canvas.shape, 14), 0, 1)
    for x, y, radius in GLANDS:
        taken |= _gland(canvas, (x + rng.normal(0, 12), y + rng.normal(0, 12)), radius, mottle, mucus)
    for x, y, radius in VESSELS:
        taken |= _vessel(canvas, (x, y), radius)
    sheet = _blob(canvas.shape, TUMOUR_AT, _star(rng, 360, 0.2))[0]
    _tumour(canvas, np.where(taken, -50, sheet).astype(np.float32))
    taken |= sheet > -6
    cluster = _blob(canvas.shape, LYMPHOID_AT, _star(rng, 190, 0.16))[0]
    for at in _scatter(canvas, (cluster > 0) & ~taken, 5000):
        add_nucleus(canvas, LYMPHOCYTE, at, rng.uniform(0, np.pi))
    for at in _scatter(canvas, ~taken, 260):
        add_nucleus(canvas, LYMPHOCYTE, at, rng.uniform(0, np.pi))
    for at in _scatter(canvas, ~taken & (cluster < 0), 700):
        angle = float(canvas.fibre_angle[int(at[1]), int(at[0])])
        add_nucleus(canvas, FIBROBLAST, at, angle + rng.normal(0, 0.12))


def _tissue(rng: np.random.Generator, shape: tuple[int, int]) -> Float32:
    """Return 1 on tissue and 0 on glass with a ragged edge; the piece lies free on the glass."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    out = np.square(np.square((x / shape[1] - 0.49) / 0.45)) + np.square(np.square((y / shape[0] - 0.5) / 0.45))
    ragged = out + 0.16 * smooth_noise(rng, shape, 110) + 0.02 * smooth_noise(rng, shape, 9)
    return _soft((1 - ragged).astype(np.float32), 0.02)


def paint(seed: int = 0) -> Painting:
    """Paint the demonstration slide at 0.25 µm/px; the same seed gives the same picture."""
    rng = np.random.default_rng(seed)
    shape = HEIGHT_PX, WIDTH_PX
    fibres, angle = _fibres(rng, shape)
    grain = 0.65 * smooth_noise(rng, (512, 512), 1.4) + 0.75 * smooth_noise(rng, (512, 512), 3.2)
    empty = np.zeros(shape, np.float32)
    canvas = Canvas(rng, empty.copy(), empty.copy(), np.zeros(shape, np.int32), grain, angle)
    _compose(canvas, fibres)
    return _on_glass(canvas, _tissue(rng, shape))


def _on_glass(canvas: Canvas, tissue: Float32) -> Painting:
    """Cut the tissue out, drop nuclei on its edge from the record, and take the picture."""
    image = _expose(canvas, tissue)
    lit = np.bincount(canvas.labels[tissue > 0.5], minlength=len(canvas.centroid_xy) + 1)
    whole = np.bincount(canvas.labels.ravel(), minlength=len(lit))
    keep = (lit >= 0.95 * whole)[1:]
    number = np.concatenate([[0], np.where(keep, np.cumsum(keep), 0)]).astype(np.int32)
    return Painting(image, number[canvas.labels], np.array(canvas.centroid_xy, np.float64)[keep])


def _expose(canvas: Canvas, tissue: Float32) -> UInt8:
    """Turn stain into light (Beer-Lambert), then add uneven thickness, blur, illumination and noise of the camera."""
    rng, shape = canvas.rng, canvas.shape
    thick = tissue * (1 + 0.06 * smooth_noise(rng, shape, 90) + 0.06 * smooth_noise(rng, shape, 1.3))
    density = (
        np.clip(canvas.haematoxylin, 0, 2)[..., None] * HAEMATOXYLIN + np.clip(canvas.eosin, 0, 2)[..., None] * EOSIN
    )
    light = GLASS * np.power(np.float32(10), -density * thick[..., None])
    light = cv2.GaussianBlur(light, (0, 0), 0.7) * (1 + 0.006 * smooth_noise(rng, shape, 400))[..., None]
    light += rng.normal(0, 1.6, light.shape).astype(np.float32)
    image: UInt8 = np.clip(light + 0.5, 0, 255).astype(np.uint8)
    return image


def write_pyramid(path: Path, image: UInt8, mpp: float) -> None:
    """Write uint8 (H, W, 3) RGB as a tiled JPEG pyramid down to about 512 px, with its pixel size in the tags."""
    import tifffile

    levels = [image]
    while max(levels[-1].shape[:2]) > 512:
        height, width = levels[-1].shape[:2]
        half = cv2.resize(levels[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        levels.append(np.asarray(half, np.uint8))
    with beside(path) as scratch, tifffile.TiffWriter(scratch) as tiff:
        for k, level in enumerate(levels):
            per_cm = 10_000 / (mpp * image.shape[1] / level.shape[1])
            tiff.write(
                level, photometric="rgb", tile=(256, 256), compression="jpeg", compressionargs={"level": 90},
                resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", subfiletype=1 if k else 0, metadata=None,
            )  # fmt: skip


def make_slide(path: Path, seed: int = 0) -> Painting:
    """Paint the demonstration slide, write it to `path` as a pyramidal TIFF, and return what was painted."""
    painting = paint(seed)
    write_pyramid(path, painting.image, MPP)
    return painting


def fetch_sample(path: Path, url: str = SAMPLE_URL, sha256: str = SAMPLE_SHA256) -> None:
    """Download OpenSlide's CC0 test slide to `path` unless it is there; raise if what came is not that file."""
    from urllib.error import URLError
    from urllib.request import urlopen

    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return
    try:
        with urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (URLError, TimeoutError) as error:
        raise CellslideError(f"{url}: cannot download ({error}); leave --download out to work offline") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise CellslideError(f"{url}: sha256 is {found}, expected {sha256}; nothing was kept, leave --download out")
    with beside(path) as scratch:
        scratch.write_bytes(content)
