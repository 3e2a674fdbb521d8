"""The quick way to pixels: those of OpenSlide to the bit, each tile decoded once; bad tiles and odd files as before."""

from __future__ import annotations

import io
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from cellslide.bench import crops as bench_crops
from cellslide.bench import read as bench_read
from cellslide.cli.main import cli
from cellslide.errors import TileError
from cellslide.inference.crops import crop_corners, plan_regions, read_region
from cellslide.slides.readers import OpenSlideReader, SlideReader, TiffReader, TiledReader, open_reader, tiled
from cellslide.slides.readers.cache import TileCache
from cellslide.slides.readers.dicom import ITEM, _frames
from cellslide.slides.slide import open_slide
from cellslide.types import CropSpec, Plane, UInt8

WIDTH, HEIGHT = 700, 530
APERIO = "Aperio Image Library v12\r\n700x530 (64x64)|AppMag = 20|MPP = 0.5"
JPEG = {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2), "compressionargs": {"level": 85}}
FORMS: dict[str, dict[str, Any]] = {
    "aperio.svs": {**JPEG, "description": APERIO},
    "generic.tif": JPEG,
    "half.tif": {**JPEG, "subsampling": (2, 1)},
    "full.tif": {**JPEG, "subsampling": (1, 1), "bigtiff": True},
    "rgb.tif": {"compression": "jpeg", "photometric": "rgb"},
    "j2k.svs": {"compression": 33005, "photometric": "rgb", "description": APERIO},
}


def tissue(width: int = WIDTH, height: int = HEIGHT) -> UInt8:
    """Blurred noise: colours that JPEG must mix, and no two tiles alike."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(cv2.normalize(cv2.GaussianBlur(image, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX), np.uint8)


def write(path: Path, options: dict[str, Any], downsamples: tuple[int, ...] = (1, 2), tile_px: int = 64) -> Path:
    """Write `tissue` as a pyramid of tiles."""
    image = tissue()
    options = dict(options)
    about, big = options.pop("description", None), options.pop("bigtiff", False)
    with tifffile.TiffWriter(path, bigtiff=big) as tiff:
        for k, d in enumerate(downsamples):
            level = cv2.resize(image, (WIDTH // d, HEIGHT // d), interpolation=cv2.INTER_AREA)
            kind = {"subfiletype": 1} if k and about is None else {}
            where = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
            tiff.write(level, tile=(tile_px, tile_px), description=about, metadata=None, **options, **kind, **where)
    return path


def boxes(width: int, height: int, n: int = 20) -> list[tuple[int, int, int, int]]:
    """Random (x, y, width, height), some beyond the edges, and the whole with a margin."""
    rng = np.random.default_rng(1)
    corner = rng.integers((-30, -30), (width, height), (n, 2))
    size = rng.integers(1, 200, (n, 2))
    return [
        (-5, -7, width + 20, height + 11),
        *((int(x), int(y), int(w), int(h)) for (x, y), (w, h) in zip(corner, size, strict=True)),
    ]


def same(found: SlideReader, expected: SlideReader, level: int) -> bool:
    size = found.header.levels[level]
    return all(
        np.array_equal(found.read_level(level, *box), expected.read_level(level, *box))
        for box in boxes(size.width_px, size.height_px)
    )


def spoil(path: Path, tile: int, change: Callable[[bytearray], None], page: int = 0) -> None:
    """Change the bytes of one tile in place; their number stays."""
    with tifffile.TiffFile(path) as tiff:
        start, length = tiff.pages[page].dataoffsets[tile], tiff.pages[page].databytecounts[tile]
    content = bytearray(path.read_bytes())
    part = content[start : start + length]
    change(part)
    content[start : start + length] = part
    assert len(part) == length
    path.write_bytes(content)


# ---------------------------------------------------------------- the same pixels


@pytest.mark.parametrize("name", FORMS)
def test_pixels_are_those_of_openslide(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, FORMS[name])
    reader, plain = open_reader(path), OpenSlideReader(path, path)
    assert isinstance(reader, TiledReader)
    assert [level.downsample for level in reader.header.levels] == [1, 2]
    assert all(same(reader, plain, level) for level in (0, 1))
    assert reader.header.read_by.startswith("cellslide") and plain.header.read_by == "OpenSlide"
    reader.close()


@pytest.mark.parametrize("compression", ["jpeg", 34712])
def test_pixels_of_ome_tiff_are_those_of_tifffile(tmp_path: Path, compression: str | int) -> None:
    path = tmp_path / "s.ome.tif"
    kind = {"photometric": "rgb", "tile": (64, 64), "compression": compression}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(tissue(), subifds=1, metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, **kind)
        tiff.write(np.ascontiguousarray(tissue()[::3, ::3]), subfiletype=1, **kind)
    reader, plain = open_reader(path), TiffReader(path)
    assert isinstance(reader, TiledReader) and len(reader.levels) == 2
    assert all(same(reader, plain, level) for level in (0, 1))


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "CMU-1-Small-Region-dicom"])
def test_real_slides_are_those_of_openslide(shared: Path, name: str) -> None:
    reader = open_reader(shared / "data" / "wsi" / name)
    assert isinstance(reader, TiledReader) and isinstance(reader.beside, OpenSlideReader)
    corner = reader.header.width_px - 1200, reader.header.height_px - 1100, 1210, 1110
    assert np.array_equal(reader.read_level(0, *corner), reader.beside.read_level(0, *corner))


def test_levels_that_do_not_divide_are_read_as_they_are_stored(shared: Path) -> None:
    """OpenSlide counts in level-0 pixels and blends neighbours there; what the file holds is nearer to the truth."""
    path = shared / "data" / "wsi" / "TCGA-CR-7395-01A-01-TS1.svs"
    reader = open_reader(path)
    assert isinstance(reader, TiledReader) and reader.header.levels[1].downsample != 2
    found = reader.read_level(1, 500, 300, 600, 500)
    with tifffile.TiffFile(path) as tiff:
        assert np.array_equal(found, tiff.pages[2].asarray()[300:800, 500:1100])
    full = reader.read_level(0, 1000, 600, 1200, 1000)
    truth = cv2.resize(full, (600, 500), interpolation=cv2.INTER_AREA).astype(float)
    blended = reader.beside.read_level(1, 500, 300, 600, 500)
    assert np.abs(found - truth).mean() < np.abs(blended - truth).mean()


def test_large_boxes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "s.tif", {"compression": "zlib", "photometric": "rgb"})
    reader = open_reader(path)
    assert isinstance(reader, OpenSlideReader)
    expected = [reader.read_level(level, -9, -5, 300, 260) for level in (0, 1)]
    monkeypatch.setattr("cellslide.slides.readers.vendor.LINES_PX", 5000)
    for level in (0, 1):
        assert np.array_equal(reader.read_level(level, -9, -5, 300, 260), expected[level])


# ---------------------------------------------------------------- damaged tiles


# Of JPEG 2000 the last bytes are detail that decoders do without.
@pytest.mark.parametrize(
    ("name", "cut"),
    [("generic.tif", 0.3), ("generic.tif", 0.9), ("aperio.svs", 0.9), ("s.ome.tif", 0.9), ("j2k.svs", 0.1)],
)
def test_a_damaged_tile_is_lost_alone(tmp_path: Path, name: str, cut: float) -> None:
    if name == "s.ome.tif":
        tifffile.imwrite(tmp_path / name, tissue(), tile=(64, 64), photometric="rgb", compression="jpeg", ome=True)
    else:
        write(tmp_path / name, FORMS[name])
    whole = open_reader(tmp_path / name).read_level(0, 128, 64, 100, 100)

    def fill(part: bytearray) -> None:
        part[int(len(part) * cut) :] = b"\xff" * (len(part) - int(len(part) * cut))

    spoil(tmp_path / name, 0, fill)
    reader = open_reader(tmp_path / name)
    assert isinstance(reader, TiledReader)
    for _ in range(2):
        with pytest.raises(TileError, match=f"{name}.*tile 0 across, 0 down"):
            reader.read_level(0, 10, 10, 20, 20)
        assert np.array_equal(reader.read_level(0, 128, 64, 100, 100), whole)


def test_a_file_cut_short_while_it_is_open_loses_the_tiles_beyond(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tif", JPEG, (1,))
    reader = open_reader(path)
    assert isinstance(reader, TiledReader)
    path.write_bytes(path.read_bytes()[: int(reader.levels[0].offset[4])])
    assert reader.read_level(0, 0, 0, 256, 64).shape == (64, 256, 3)
    with pytest.raises(TileError, match="tile 4 across, 0 down cannot be decoded"):
        reader.read_level(0, 256, 0, 64, 64)


def test_what_openslide_overlooks_is_overlooked(tmp_path: Path) -> None:
    """The last two bytes say that the picture ends: libjpeg misses them, and has all pixels."""
    path = write(tmp_path / "s.tif", JPEG, (1,))
    expected = open_reader(path).read_level(0, 0, 0, 300, 60)
    kept = []
    for tile in range(5):

        def forget(part: bytearray) -> None:
            part[-2:] = b"\0\0"

        spoil(path, tile, forget)
    reader, plain = open_reader(path), OpenSlideReader(path, path)
    assert isinstance(reader, TiledReader)
    for tile in range(5):
        box = (tile * 64, 0, 60, 60)
        try:
            kept.append(np.array_equal(plain.read_level(0, *box), reader.read_level(0, *box)))
        except TileError:
            with pytest.raises(TileError):
                reader.read_level(0, *box)
    assert all(kept) and expected.shape == (60, 300, 3)


# ---------------------------------------------------------------- odd files


def missing(path: Path) -> None:
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = tiff.pages[0].tags[name]
            tag.overwrite([0, *tag.value[1:]])


def test_odd_files_stay_with_the_other_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_by(name: str) -> str:
        reader = open_reader(tmp_path / name)
        assert isinstance(reader, OpenSlideReader)
        return reader.header.read_by

    missing(write(tmp_path / "sparse.tif", JPEG))
    assert read_by("sparse.tif") == "OpenSlide, since tiles are missing"
    write(tmp_path / "zlib.tif", {"compression": "zlib", "photometric": "rgb"})
    assert "no tiles of JPEG or JPEG 2000" in read_by("zlib.tif")
    write(tmp_path / "ycc.svs", {**FORMS["j2k.svs"], "compression": 33003})
    assert "no tiles of JPEG or JPEG 2000 in RGB" in read_by("ycc.svs")
    write(tmp_path / "s.tif", JPEG)
    # As if the tags lied about the colours.
    monkeypatch.setattr(tiled.JpegCodec, "decode", lambda self, data, out: out.fill(7))
    assert read_by("s.tif") == "OpenSlide, since its tiles are coded in an unusual way"


def test_a_tile_that_is_damaged_where_it_is_compared_stays_with_openslide(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tif", JPEG, (1,))

    def fill(part: bytearray) -> None:
        part[20:] = b"\xff" * (len(part) - 20)

    spoil(path, 4 * 11 + 5, fill)
    reader = open_reader(path)
    assert isinstance(reader, OpenSlideReader)
    assert reader.read_level(0, 0, 0, 64, 64).shape == (64, 64, 3)


def test_info_says_what_reads_the_pixels(tmp_path: Path) -> None:
    missing(write(tmp_path / "sparse.tif", JPEG))
    write(tmp_path / "plain.tif", JPEG)
    for name, said in (("sparse.tif", "OpenSlide, since tiles are missing"), ("plain.tif", "tile by tile (JPEG)")):
        result = CliRunner().invoke(cli, ["info", str(tmp_path / name)])
        assert result.exit_code == 0 and said in " ".join(result.stdout.split())


# ---------------------------------------------------------------- decoded once


def block(value: int) -> UInt8:
    return np.full((10, 10, 1), value, np.uint8)


def test_the_cache_keeps_what_is_wanted_again_and_its_bound() -> None:
    cache = TileCache(500)
    cache.get("kept", lambda: block(1), keep=True)
    for k in range(20):
        cache.get(k, lambda k=k: block(k), keep=False)  # type: ignore[misc]
    assert cache.made == 21 and cache._bytes == 500
    assert cache.get("kept", lambda: block(9), keep=True)[0, 0, 0] == 1
    for k in range(8):
        cache.get(("other", k), lambda: block(2), keep=True)
    assert cache.get("kept", lambda: block(9))[0, 0, 0] == 9


def test_threads_wait_for_the_one_that_decodes() -> None:
    cache, started, go = TileCache(10_000), threading.Event(), threading.Event()

    def slow() -> UInt8:
        started.set()
        assert go.wait(10)
        return block(3)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(cache.get, "a", slow)
        assert started.wait(10)
        others = [pool.submit(cache.get, "a", lambda: block(4)) for _ in range(3)]
        go.set()
        assert [f.result()[0, 0, 0] for f in (first, *others)] == [3] * 4
    assert cache.made == 1


def test_an_error_is_not_kept() -> None:
    cache = TileCache(10_000)
    with pytest.raises(ValueError, match="bad"):
        cache.get("a", lambda: (_ for _ in ()).throw(ValueError("bad")))  # type: ignore[arg-type]
    assert cache.get("a", lambda: block(5))[0, 0, 0] == 5


@pytest.mark.parametrize("overlap_px", [0, 16, 32])
def test_tiles_that_overlap_decode_each_tile_once(tmp_path: Path, overlap_px: int) -> None:
    path = write(tmp_path / "s.tif", JPEG, (1,))
    reader = open_reader(path)
    assert isinstance(reader, TiledReader)
    # Room for two rows of tiles of the file: far less than a row of reads is high.
    reader.cache.most_bytes = 3 * 64 * 2 * 64 * reader.levels[0].n_across
    for y in range(0, HEIGHT, 256 - overlap_px):
        for x in range(0, WIDTH, 256 - overlap_px):
            reader.read_level(0, x, y, 256, 256)
    assert reader.cache.made <= 1.15 * len(reader.levels[0].offset)


def test_threads_read_the_same_and_decode_once(tmp_path: Path) -> None:
    reader = open_reader(write(tmp_path / "s.tif", JPEG, (1,)))
    assert isinstance(reader, TiledReader)
    whole = reader.beside.read_level(0, 0, 0, WIDTH, HEIGHT)
    places = [(x, y) for y in range(0, HEIGHT - 100, 40) for x in range(0, WIDTH - 100, 50)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda xy: reader.read_level(0, *xy, 100, 100), places))
    assert all(
        np.array_equal(part, whole[y : y + 100, x : x + 100]) for part, (x, y) in zip(found, places, strict=True)
    )
    assert reader.cache.made == 8 * reader.levels[0].n_across


def test_crops_of_shared_regions_decode_each_tile_about_once(tmp_path: Path) -> None:
    with open_slide(write(tmp_path / "s.tif", JPEG, (1,))) as slide:
        plane, xy = Plane.of(slide.info, 0.5), np.random.default_rng(2).uniform(0, (WIDTH, HEIGHT), (200, 2))
        spec = CropSpec(64, 64)
        for region in plan_regions(xy, [(crop_corners(xy, 64), 64)], 256):
            read_region(slide, plane, region.box, (spec.border,))
        assert isinstance(slide.reader, TiledReader)
        assert slide.reader.cache.made <= 1.5 * len(slide.reader.levels[0].offset)


# ---------------------------------------------------------------- where frames of DICOM lie


def item(data: bytes) -> bytes:
    return ITEM + struct.pack("<I", len(data)) + data


@pytest.mark.parametrize("table", ["none", "basic", "extended"])
def test_frames_are_found_by_each_table(table: str) -> None:
    frames = [b"abcd", b"efghij", b"kl"]
    starts, at = [], 0
    for frame in frames:
        starts.append(at)
        at += 8 + len(frame)
    data: Any = {}
    if table == "extended":
        lengths = [len(frame) for frame in frames]
        names = {"ExtendedOffsetTable": starts, "ExtendedOffsetTableLengths": lengths}
        values = {name: struct.pack("<3Q", *numbers) for name, numbers in names.items()}
        data = type("Header", (SimpleNamespace,), {"__contains__": lambda self, name: hasattr(self, name)})(**values)
    content = item(struct.pack("<3I", *starts) if table == "basic" else b"") + b"".join(map(item, frames))
    offset, n_bytes = _frames(io.BytesIO(content), data, len(content))
    assert [content[o : o + n] for o, n in zip(offset, n_bytes, strict=True)] == frames


def test_without_pydicom_openslide_reads_dicom(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    reader = open_reader(shared / "data" / "wsi" / "CMU-1-Small-Region-dicom")
    assert isinstance(reader, OpenSlideReader) and "cellslide[dicom]" in reader.header.read_by


# ---------------------------------------------------------------- what the bench says of it


def test_bench_rows_of_reading_and_crops(tmp_path: Path) -> None:
    path = write(tmp_path / "s.svs", FORMS["aperio.svs"])
    rows = list(bench_read.slide_rows(path, 1))
    assert [row.form.split(": ")[1] for row in rows] == ["OpenSlide", "cellslide", "cellslide, overlap"]
    assert all(row.value and row.count == 1 for row in rows)
    rows = list(bench_crops.field_rows(path, CropSpec(224, 224), 40, 1))
    assert rows[0].ratio == 1 and rows[2].count == 40
    assert rows[3].unit == "×" and rows[3].value == pytest.approx(1, abs=0.5)
