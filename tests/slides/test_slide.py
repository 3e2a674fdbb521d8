"""Opening and reading: the same pixel whichever box reads it, the pixel size or its exact error, every reader."""

from __future__ import annotations

import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellslide.errors import PixelSizeError, SlideError, TileError, UsageError
from cellslide.slides.pixel_size import PixelSize, choose, from_ome, from_openslide, from_tiff
from cellslide.slides.readers import WHITE, OpenSlideReader, TiffReader, composite
from cellslide.slides.resample import axis_taps
from cellslide.slides.slide import Slide, inspect_slide, nominal_downsample, open_slide, slide_from_array
from cellslide.types import Plane, UInt8
from tests.painted import GLASS, grid_centres, paint_slide, shrink, write_pyramid

MPP = 0.5
WIDTH, HEIGHT = 331, 218
SCALES = (0.5, 0.7, 1.0, 2.0, 2.0016, 3.7, 5.1)


def noise(width: int = WIDTH, height: int = HEIGHT) -> UInt8:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Noise as a generic pyramid whose levels do not divide, as OME-TIFF, and as a plain image."""
    folder = tmp_path_factory.mktemp("pyramids")
    paths = {name: folder / name for name in ("noise.tif", "noise.ome.tif", "noise.png")}
    write_pyramid(paths["noise.tif"], noise(), MPP, level_downsamples=(1, 2, 4), tile_px=64)
    write_pyramid(paths["noise.ome.tif"], noise(), MPP, level_downsamples=(1, 2, 4), tile_px=64)
    Image.fromarray(noise()).save(paths["noise.png"])
    return paths


def whole(slide: Slide, plane: Plane) -> UInt8:
    return slide.read_plane(plane, (0, 0, plane.width_px, plane.height_px))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["noise.tif", "noise.ome.tif", "noise.png"])
def test_a_pixel_does_not_depend_on_the_box(pyramids: dict[str, Path], name: str, scale: float) -> None:
    with open_slide(pyramids[name], mpp=MPP) as slide:
        plane = Plane.of(slide.info, MPP * scale)
        margin = 9
        full = slide.read_plane(plane, (-margin, -margin, plane.width_px + margin, plane.height_px + margin))
        rng = np.random.default_rng(1)
        for _ in range(12):
            x0, y0 = rng.integers(-margin, plane.width_px), rng.integers(-margin, plane.height_px)
            x1 = rng.integers(x0 + 1, plane.width_px + margin + 1)
            y1 = rng.integers(y0 + 1, plane.height_px + margin + 1)
            part = slide.read_plane(plane, (int(x0), int(y0), int(x1), int(y1)))
            expected = full[y0 + margin : y1 + margin, x0 + margin : x1 + margin]
            assert np.array_equal(part, expected), f"box {(x0, y0, x1, y1)}"


def test_large_reads_in_parts_are_the_same(pyramids: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(pyramids["noise.tif"]) as slide:
        plane = Plane.of(slide.info, MPP * 1.3)
        expected = whole(slide, plane)
        monkeypatch.setattr("cellslide.slides.slide.MAX_READ_PX", 500)
        assert np.array_equal(whole(slide, plane), expected)


@pytest.mark.parametrize("scale", [1.3, 2.0, 2.0016, 3.7])
def test_shrinking_is_the_area_mean(scale: float) -> None:
    image = noise(41, 27)
    slide = slide_from_array(image, MPP)
    plane = Plane.of(slide.info, MPP * scale)
    found = whole(slide, plane)
    fine = 50  # Each pixel as 50 x 50 samples: the mean over a plane pixel's samples is its area mean.
    padded = np.full((60, 80, 3), 255, np.uint8)
    padded[:27, :41] = image
    for row, col in ((0, 0), (3, 5), (plane.height_px - 2, plane.width_px - 2)):
        ys = ((np.arange(fine) + 0.5) / fine + row) * plane.scale_y
        xs = ((np.arange(fine) + 0.5) / fine + col) * plane.scale_x
        mean = padded[np.floor(ys).astype(int)][:, np.floor(xs).astype(int)].mean(axis=(0, 1))
        assert np.abs(found[row, col] - mean).max() < 3


@pytest.mark.parametrize("ratio", [0.4, 0.9, 1.0, 1.7, 2.0, 2.0016, 5.3])
def test_weights_sum_to_one_and_stay_near(ratio: float) -> None:
    taps = axis_taps(-3, 40, ratio)
    assert np.allclose(taps.weight.sum(axis=1), 1)
    centre = (taps.index + 0.5) * taps.weight
    if ratio >= 1:
        assert np.allclose(centre.sum(axis=1), (np.arange(-3, 40) + 0.5) * ratio, atol=0.51)
    else:
        assert np.allclose(centre.sum(axis=1), (np.arange(-3, 40) + 0.5) * ratio, atol=1e-9)


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif"])
@pytest.mark.parametrize("scale", [0.7, 1.0, 2.0016, 4.0, 5.3])
def test_discs_stay_where_they_were_painted(tmp_path: Path, suffix: str, scale: float) -> None:
    centres = grid_centres(397, 251, 80, margin_px=15)
    painted = paint_slide(tmp_path / f"discs{suffix}", 397, 251, MPP, centres, 14, (1, 2, 4))
    with open_slide(painted.path) as slide:
        plane = Plane.of(slide.info, MPP * scale)
        dark = 255.0 - whole(slide, plane)[..., 1]
    dark -= dark.min()
    ys, xs = (np.arange(n) + 0.5 for n in dark.shape)
    for x, y in centres:
        near = np.hypot(xs * plane.scale_x - x, (ys * plane.scale_y - y)[:, None]) < 24
        mass = np.where(near, dark, 0)
        found = (mass.sum(0) @ xs / mass.sum() * plane.scale_x, mass.sum(1) @ ys / mass.sum() * plane.scale_y)
        assert np.allclose(found, (x, y), atol=0.15)


def test_identity_is_a_copy(pyramids: dict[str, Path]) -> None:
    for path in pyramids.values():
        with open_slide(path, mpp=MPP) as slide:
            assert np.array_equal(whole(slide, Plane.of(slide.info, MPP * 1.004)), noise())


@pytest.mark.parametrize(("scale", "level"), [(0.5, 0), (1.0, 0), (1.99, 0), (2.0, 1), (3.9, 1), (4.0, 2), (40.0, 2)])
def test_best_level_is_the_coarsest_that_is_fine_enough(pyramids: dict[str, Path], scale: float, level: int) -> None:
    with open_slide(pyramids["noise.tif"]) as slide:
        assert slide.info.levels[1].downsample > 2  # 331 / 165: the ratio of sizes, not what was done.
        assert slide.level_scales == (1.0, 2.0, 4.0)
        assert slide.best_level(Plane(MPP * scale, scale, scale, 10, 10)) == level


@pytest.mark.parametrize(
    ("size0", "size", "stated", "expected"),
    [
        ((4443, 3567), (2221, 1783), 2.0005, 2.0),
        ((2220, 2967), (34, 46), 64.897, 64.0),
        ((1000, 500), (333, 166), 3.006, 3.0),
        ((1000, 500), (370, 185), 2.7027, 2.7027),
    ],
)
def test_nominal_downsample(size0: tuple[int, int], size: tuple[int, int], stated: float, expected: float) -> None:
    assert nominal_downsample(size0, size, stated) == expected


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".png"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (257, 1), (5, 3), (257, 256)])
def test_tiny_and_remainder_sizes(tmp_path: Path, suffix: str, width: int, height: int) -> None:
    path, image = tmp_path / f"tiny{suffix}", noise(width, height)
    if suffix == ".png":
        Image.fromarray(image).save(path)
    else:
        write_pyramid(path, image, MPP, level_downsamples=(1,))
    with open_slide(path, mpp=MPP) as slide:
        assert (slide.info.width_px, slide.info.height_px) == (width, height)
        tile = slide.read_plane(Plane.of(slide.info, MPP), (-4, -4, width + 60, height + 50))
        assert np.array_equal(tile[4 : 4 + height, 4 : 4 + width], image)
        assert (tile[:4] == 255).all() and (tile[4 + height :] == 255).all() and (tile[:, 4 + width :] == 255).all()
        assert slide.thumbnail(64).shape[0] <= 64


def test_outside_and_missing_tiles_are_background_not_black(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"
    write_pyramid(path, np.full((192, 192, 3), 90, np.uint8), MPP, level_downsamples=(1,), tile_px=64)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = tiff.pages[0].tags[name]
            tag.overwrite([0, 0, 0, *tag.value[3:]])  # The upper row of tiles was never scanned.
    with open_slide(path) as slide:
        assert slide.info.vendor == "generic-tiff"
        assert slide.info.bounds == (0, 64, 192, 128)
        pixels = slide.read_plane(Plane.of(slide.info, MPP), (0, 0, 250, 192))
    assert (pixels[:64] == 255).all() and (pixels[:, 192:] == 255).all()
    assert (pixels[64:, :192] == 90).all()


def test_composite_lays_alpha_on_the_background() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    assert composite(rgba, (250, 240, 230)).tolist() == [[[10, 20, 30], [250, 240, 230], [200, 192, 184]]]


def test_background_is_what_the_vendor_says(pyramids: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(pyramids["noise.tif"]) as slide:
        assert slide.background == WHITE
        assert isinstance(slide.reader, OpenSlideReader)
        slide.reader.background = (1, 2, 3)
        assert (slide.read_plane(Plane.of(slide.info, MPP), (-5, -5, 0, 0)) == (1, 2, 3)).all()


# ---------------------------------------------------------------- pixel size


def size(x: float | None, y: float | None) -> PixelSize:
    return PixelSize(x, y, "vendor", f"scanner says {x} x {y} µm")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "no pixel size in the file"),
        (size(352.8, 352.8), "352.8"),
        (size(0.01, 0.01), "0.01"),
        (size(0.5, 0.53), "5 %"),
        (size(0.5, None), "not a length"),
        (size(0.0, 0.0), "outside"),
        (size(float("nan"), 0.5), "nan"),
    ],
)
def test_unusable_pixel_size_names_file_value_and_flag(found: PixelSize | None, said: str) -> None:
    with pytest.raises(PixelSizeError) as error:
        choose(Path("some/slide.svs"), found, None)
    assert "some/slide.svs" in str(error.value) and "--mpp" in str(error.value) and said in str(error.value)
    assert error.value.exit_code == 2
    assert choose(Path("a.svs"), found, 0.25) == (0.25, 0.25, "flag")


@pytest.mark.parametrize("mpp", [0.049, 2.01, -1.0, float("nan")])
def test_flag_out_of_range_is_refused(mpp: float) -> None:
    with pytest.raises(PixelSizeError, match="--mpp"):
        choose(Path("a.svs"), size(0.5, 0.5), mpp)


@pytest.mark.parametrize(("mpp", "warned"), [(0.26, False), (0.2626, True), (0.2374, True)])
def test_flag_far_from_the_file_warns(caplog: pytest.LogCaptureFixture, mpp: float, warned: bool) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose(Path("a.svs"), size(0.25, 0.25), mpp, "list") == (mpp, mpp, "list")
    assert bool(caplog.records) is warned


def test_openslide_property_counts_unless_it_is_the_tiff_resolution() -> None:
    properties = {"openslide.vendor": "aperio", "openslide.mpp-x": "0.25", "openslide.mpp-y": "0.251"}
    found = from_openslide(properties)
    assert found is not None and (found.x, found.y, found.source) == (0.25, 0.251, "vendor")
    assert from_openslide({**properties, "openslide.vendor": "generic-tiff"}) is None
    assert from_openslide({"openslide.vendor": "aperio"}) is None


@pytest.mark.parametrize(
    ("unit", "number", "um"),
    [(None, 0.25, 0.25), ("µm", 0.25, 0.25), ("nm", 250, 0.25), ("mm", 0.00025, 0.25), ("pixel", 1, None)],
)
def test_ome_units(unit: str | None, number: float, um: float | None) -> None:
    units = f'PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"' if unit else ""
    pixels = f'<Pixels SizeX="20" SizeY="10" PhysicalSizeX="{number}" PhysicalSizeY="{number}" {units}/>'
    xml = f'<OME xmlns="http://ome"><Image><Pixels SizeX="3" SizeY="3"/></Image><Image>{pixels}</Image></OME>'
    found = from_ome(xml, 20, 10)
    assert found is not None and found.source == "ome"
    assert (found.x, found.y) == (pytest.approx(um), pytest.approx(um)) if um else found.problem
    assert from_ome(xml, 3, 3) is None
    assert from_ome("not xml", 20, 10) is None


@pytest.mark.parametrize(
    ("tags", "um"),
    [
        ({"XResolution": (40000, 1), "YResolution": (40000, 1), "ResolutionUnit": 3}, 0.25),
        ({"XResolution": (101600, 1), "YResolution": (101600, 1), "ResolutionUnit": 2}, 0.25),
    ],
)
def test_tiff_resolution(tags: dict[str, object], um: float) -> None:
    found = from_tiff(tags)
    assert found is not None and found.problem is None
    assert (found.x, found.y, found.source) == (pytest.approx(um), pytest.approx(um), "tiff")


def test_tiff_resolution_without_unit_is_no_length() -> None:
    tags = {"XResolution": (40000, 1), "YResolution": (40000, 1)}
    for extra in ({}, {"ResolutionUnit": 1}):
        found = from_tiff({**tags, **extra})
        assert found is not None and found.problem is not None and "unknown unit" in found.problem
    assert from_tiff({}) is None
    assert from_tiff({"XResolution": (1, 1), "YResolution": (1, 1), "ResolutionUnit": 1}) is None
    imagej = from_tiff({"XResolution": (4, 1), "YResolution": (4, 1)}, {"unit": "micron"})
    assert imagej is not None and imagej.x == 0.25


@pytest.mark.parametrize(
    ("resolution", "unit", "said"),
    [((72, 72), "INCH", "352.8"), ((40000, 40000), "NONE", "unknown unit"), ((20000, 18000), "CENTIMETER", "5 %")],
)
def test_tiff_with_a_false_resolution_is_refused(
    tmp_path: Path, resolution: tuple[int, int], unit: str, said: str
) -> None:
    path = tmp_path / "office.tif"
    tifffile.imwrite(
        path, noise(80, 70), photometric="rgb", tile=(64, 64), resolution=resolution, resolutionunit=unit, metadata=None
    )
    with pytest.raises(PixelSizeError, match="office.tif") as error:
        open_slide(path)
    assert said in str(error.value) and "--mpp" in str(error.value)
    assert inspect_slide(path).width_px == 80
    with open_slide(path, mpp=0.5, mpp_source="list") as slide:
        assert (slide.info.mpp_x, slide.info.mpp_source) == (0.5, "list")


@pytest.mark.parametrize(("suffix", "source"), [(".tif", "tiff"), (".ome.tif", "ome")])
def test_x_and_y_sizes_are_kept_apart(tmp_path: Path, suffix: str, source: str) -> None:
    painted = paint_slide(tmp_path / f"a{suffix}", 300, 200, 0.25, mpp_y=0.255)
    with open_slide(painted.path, slide_id="mine") as slide:
        info = slide.info
        assert (info.mpp_x, info.mpp_y) == (pytest.approx(0.25, rel=1e-4), pytest.approx(0.255, rel=1e-4))
        assert (info.mpp_source, info.slide_id) == (source, "mine")
        plane = Plane.of(info, 0.5)
        assert (plane.width_px, plane.height_px) == (150, 102)


# ---------------------------------------------------------------- readers


def test_ome_pyramid_has_all_its_levels(pyramids: dict[str, Path]) -> None:
    with open_slide(pyramids["noise.ome.tif"]) as slide:
        assert isinstance(slide.reader, TiffReader)
        assert [(v.width_px, v.height_px) for v in slide.info.levels] == [(331, 218), (165, 109), (82, 54)]
        assert np.array_equal(slide.reader.read_level(1, 0, 0, 165, 109), shrink(noise(), 2))


@pytest.mark.parametrize(
    "options",
    [
        {"rowsperstrip": 16},
        {"rowsperstrip": 16, "compression": "lzw", "predictor": True},
        {"planarconfig": "separate", "tile": (64, 64), "compression": "zlib"},
        {"bigtiff": True, "compression": "zstd", "tile": (64, 64)},
        {"tile": (64, 64), "compression": "webp", "compressionargs": {"lossless": True}},
    ],
    ids=str,
)
def test_tiff_layouts(tmp_path: Path, options: dict[str, object]) -> None:
    path, image = tmp_path / "layout.tif", noise(150, 90)
    data = image.transpose(2, 0, 1) if "planarconfig" in options else image
    tifffile.imwrite(path, data, photometric="rgb", resolution=(20000, 20000), resolutionunit=3, **options)
    reader = TiffReader(path)
    assert np.array_equal(reader.read_level(0, 0, 0, 150, 90), image)
    assert np.array_equal(reader.read_level(0, 30, 20, 100, 60), image[20:80, 30:130])
    reader.close()
    with open_slide(path) as slide:
        assert np.array_equal(whole(slide, Plane.of(slide.info, MPP)), image)


def test_grey_and_jpeg_ome(tmp_path: Path) -> None:
    grey, smooth = noise(70, 50)[..., 0], np.full((128, 192, 3), (200, 120, 180), np.uint8)
    tifffile.imwrite(tmp_path / "grey.ome.tif", grey, photometric="minisblack", metadata={"axes": "YX"})
    write_pyramid(tmp_path / "jpeg.ome.tif", smooth, MPP, compression="jpeg", tile_px=64)
    with open_slide(tmp_path / "grey.ome.tif", mpp=MPP) as slide:
        assert np.array_equal(whole(slide, Plane.of(slide.info, MPP)), np.repeat(grey[..., None], 3, axis=2))
    with open_slide(tmp_path / "jpeg.ome.tif") as slide:
        assert np.abs(whole(slide, Plane.of(slide.info, MPP)).astype(int) - smooth).max() <= 4


def test_deep_and_many_channel_tiff_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "deep.ome.tif", noise(40, 30).astype(np.uint16), photometric="rgb")
    tifffile.imwrite(tmp_path / "five.ome.tif", np.zeros((5, 30, 40), np.uint8), metadata={"axes": "CYX"})
    for name in ("deep.ome.tif", "five.ome.tif"):
        with pytest.raises(SlideError, match=f"{name}.*RGB"):
            open_slide(tmp_path / name, mpp=MPP)


def test_plain_images(tmp_path: Path) -> None:
    rgba = np.dstack([noise(30, 20), np.full((20, 30), 255, np.uint8)])
    rgba[:5, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    Image.fromarray(noise(30, 20)).save(tmp_path / "lossless.webp", lossless=True)
    Image.fromarray(np.full((20, 30, 3), GLASS, np.uint8)).save(tmp_path / "photo.jpg")
    with open_slide(tmp_path / "alpha.png", mpp=0.25) as slide:
        pixels = whole(slide, Plane.of(slide.info, 0.25))
        assert (pixels[:5] == 255).all() and np.array_equal(pixels[5:], noise(30, 20)[5:])
    with open_slide(tmp_path / "lossless.webp", mpp=0.25) as slide:
        assert np.array_equal(whole(slide, Plane.of(slide.info, 0.25)), noise(30, 20))
    assert inspect_slide(tmp_path / "photo.jpg").vendor == "jpeg"
    with pytest.raises(PixelSizeError, match="photo.jpg.*--mpp"):
        open_slide(tmp_path / "photo.jpg")


def test_missing_and_damaged_files_say_so(tmp_path: Path, pyramids: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="nowhere.svs: no such file"):
        open_slide(tmp_path / "nowhere.svs")
    (tmp_path / "text.svs").write_text("not a slide")
    (tmp_path / "cut.tif").write_bytes(pyramids["noise.tif"].read_bytes()[:200])
    (tmp_path / "cut.png").write_bytes(pyramids["noise.png"].read_bytes()[:2000])
    (tmp_path / "empty.svs").touch()
    for name in ("text.svs", "cut.tif", "cut.png", "empty.svs"):
        with pytest.raises(SlideError, match=name):
            open_slide(tmp_path / name, mpp=MPP)
    with pytest.raises(SlideError, match="no DICOM slide"):
        open_slide(tmp_path, mpp=MPP)


@pytest.mark.parametrize("name", ["noise.tif", "noise.ome.tif"])
def test_one_bad_tile_does_not_lose_the_slide(tmp_path: Path, pyramids: dict[str, Path], name: str) -> None:
    with tifffile.TiffFile(pyramids[name]) as tiff:
        page = tiff.pages[0]
        start, length = page.dataoffsets[0], page.databytecounts[0]
    content = bytearray(pyramids[name].read_bytes())
    content[start : start + length] = b"\xff" * length
    path = tmp_path / name
    path.write_bytes(content)
    with open_slide(path) as slide:
        plane = Plane.of(slide.info, MPP)
        for _ in range(2):
            with pytest.raises(TileError, match=name):
                slide.read_plane(plane, (0, 0, 32, 32))
            assert np.array_equal(slide.read_plane(plane, (128, 64, 200, 128)), noise()[64:128, 128:200])


@pytest.mark.parametrize("name", ["noise.tif", "noise.ome.tif", "noise.png"])
def test_pickled_slides_and_threads_read_the_same(pyramids: dict[str, Path], name: str) -> None:
    with open_slide(pyramids[name], mpp=MPP, slide_id="mine") as slide, pickle.loads(pickle.dumps(slide)) as again:
        assert again.info == slide.info
        plane = Plane.of(slide.info, MPP * 1.7)
        boxes = [(x, y, x + 50, y + 40) for x in range(0, 190, 25) for y in range(0, 120, 30)]
        expected = [slide.read_plane(plane, box) for box in boxes]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda box: again.read_plane(plane, box), boxes * 3))
        assert all(np.array_equal(a, b) for a, b in zip(expected * 3, found, strict=True))


# ---------------------------------------------------------------- real slides


def test_real_slides_open_or_give_exactly_that_error(shared: Path) -> None:
    folder = shared / "data" / "wsi"
    sizes = {}
    for name in ("CMU-1-Small-Region.svs", "CMU-1-Small-Region-dicom", "HE_example.tif", "OS-1-detail.ome.tif"):
        with open_slide(folder / name) as slide:
            sizes[name] = (slide.info.width_px, slide.info.height_px, round(slide.info.mpp_x, 4), slide.info.mpp_source)
    assert sizes == {
        "CMU-1-Small-Region.svs": (2220, 2967, 0.499, "vendor"),
        "CMU-1-Small-Region-dicom": (2220, 2967, 0.499, "vendor"),
        "HE_example.tif": (1380, 1484, 0.5001, "ome"),
        "OS-1-detail.ome.tif": (1101, 1101, 0.2271, "ome"),
    }
    with pytest.raises(PixelSizeError, match=r"TCGA-CR-7395-01A-01-TS1\.svs: no pixel size in the file; give --mpp"):
        open_slide(folder / "TCGA-CR-7395-01A-01-TS1.svs")


def test_dicom_by_folder_or_any_of_its_files_equals_the_svs(shared: Path) -> None:
    folder = shared / "data" / "wsi"
    with open_slide(folder / "CMU-1-Small-Region.svs") as slide:
        expected = slide.read_plane(Plane.of(slide.info, 0.499), (700, 900, 900, 1050)).astype(int)
    dicom = folder / "CMU-1-Small-Region-dicom"
    for path in (dicom, dicom / "level-0-frames-0-30.dcm", dicom / "level-10-frames-0-1.dcm"):
        with open_slide(path) as slide:
            assert len(slide.info.levels) == 12
            found = slide.read_plane(Plane.of(slide.info, 0.499), (700, 900, 900, 1050))
        assert np.abs(found - expected).mean() < 3


def test_level_that_does_not_divide_reads_the_same_from_any_box(shared: Path) -> None:
    """OpenSlide blends pixels of such a level by where the read starts, so reads must start at fixed places."""
    with open_slide(shared / "data" / "wsi" / "TCGA-CR-7395-01A-01-TS1.svs", mpp=0.25) as slide:
        plane = Plane.of(slide.info, 0.5)
        assert slide.best_level(plane) == 1
        full = slide.read_plane(plane, (1400, 600, 1800, 900))
        for box in ((1401, 603, 1500, 700), (1517, 777, 1719, 899), (1799, 600, 1800, 900)):
            x0, y0, x1, y1 = box
            assert np.array_equal(slide.read_plane(plane, box), full[y0 - 600 : y1 - 600, x0 - 1400 : x1 - 1400])
        level0 = slide.read_plane(Plane.of(slide.info, 0.25), (2800, 1200, 3600, 1800))
    # Where the level lies on level 0: least squares on the gradients gives its shift in level pixels.
    expected = shrink(level0, 2)[..., 1].astype(float)
    slopes = np.stack([np.gradient(expected, axis=axis).ravel() for axis in (1, 0)], axis=1)
    shift = np.linalg.lstsq(slopes, expected.ravel() - full[..., 1].ravel(), rcond=None)[0]
    assert np.abs(shift).max() < 0.3
