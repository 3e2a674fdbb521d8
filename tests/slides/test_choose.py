"""What the slide is in a file: page, size, pixel size, channels and levels by one decision, or a line that says why."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from cellslide.cli.main import cli
from cellslide.config import OutputConfig, TissueConfig
from cellslide.errors import FluorescenceError, PixelSizeError, SlideError, TileError
from cellslide.formats.verify import verify_folder
from cellslide.slides.missing import missing_tissue
from cellslide.slides.pixel_size import PixelSize, choose
from cellslide.slides.readers import OpenSlideReader, TiledReader, open_reader
from cellslide.slides.slide import Slide, inspect_slide, open_slide
from cellslide.slides.tissue import find_tissue
from cellslide.types import Plane, UInt8
from tests.support.fakes import fake_model
from tests.test_pipeline import BASE, segment

EDGE, MPP = 512, 0.25
RGB: dict[str, Any] = {"photometric": "rgb", "metadata": None}
TILES: dict[str, Any] = {**RGB, "tile": (128, 128)}
FULL = Plane(MPP, 1, 1, EDGE, EDGE)
HALF = Plane(2 * MPP, 2, 2, EDGE // 2, EDGE // 2)
NUCLEUS, STROMA = (96, 62, 142), (226, 168, 200)


def tissue(seed: int = 0) -> UInt8:
    """Nuclei on uneven stroma all over a field."""
    rng = np.random.default_rng(seed)
    base = cv2.GaussianBlur(rng.normal(0, 1, (EDGE, EDGE)).astype(np.float32), (0, 0), 4)
    image = np.asarray(STROMA, np.float32) + 80 * base[..., None]
    for x, y in rng.integers(0, EDGE, (150, 2)).tolist():
        cv2.circle(image, (x, y), 8, NUCLEUS, -1, cv2.LINE_AA)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


IMAGE = tissue()


def shrunk(image: UInt8, factor: int) -> UInt8:
    size = image.shape[1] // factor, image.shape[0] // factor
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def at(mpp: float) -> dict[str, Any]:
    return {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}


def pixels(path: Path, plane: Plane = FULL, **more: Any) -> UInt8:
    with open_slide(path, **more) as slide:
        return slide.read_plane(plane, (0, 0, plane.width_px, plane.height_px))


def check(path: Path, most: float = 0.0, mpp: float = MPP) -> None:
    """The slide, its half, and what `info` says of it are those of the painted field."""
    result = CliRunner().invoke(cli, ["info", str(path), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    with open_slide(path) as slide:
        info = slide.info
        assert (facts["width"], facts["height"]) == (info.width_px, info.height_px) == (EDGE, EDGE)
        assert (facts["mpp_x"], facts["mpp_source"]) == (info.mpp_x, info.mpp_source)
        assert info.mpp_x == pytest.approx(mpp, rel=1e-4)
        assert [v["width"] for v in facts["levels"]] == [v.width_px for v in info.levels]
    assert np.abs(pixels(path).astype(int) - IMAGE).mean() <= most
    assert np.abs(pixels(path, HALF).astype(int) - shrunk(IMAGE, 2)).mean() <= most + 1


def ome(channels: str = "", size: int = EDGE, mpp: float = MPP, n: int = 3, more: str = "", images: str = "") -> bytes:
    data = "".join(f'<TiffData FirstC="{c}" IFD="{c}" PlaneCount="1"/>' for c in range(n))
    sizes = f'PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}"'
    channels = channels or '<Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
    return (
        f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{more}<Image ID="Image:0">'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="{size}" SizeY="{size}" SizeC="3" SizeZ="1" '
        f'SizeT="1" {sizes}>{channels}{data}</Pixels></Image>{images}</OME>'
    ).encode()


def named(*names: str, more: str = "") -> str:
    return "".join(
        f'<Channel ID="Channel:0:{k}" Name="{name}" SamplesPerPixel="1" {more}/>' for k, name in enumerate(names)
    )


# ---------------------------------------------------------------- which page


LAYOUTS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "thumbnail first, strips": [(4, {**RGB, "subfiletype": 1}), (1, {**RGB, "rowsperstrip": 64})],
    "thumbnail first, strips, not marked": [(4, RGB), (1, {**RGB, "rowsperstrip": 64})],
    "small to large": [(k, {**TILES, "subfiletype": int(k > 1)}) for k in (4, 2, 1)],
    "small to large, not marked": [(k, TILES) for k in (4, 2, 1)],
    "small to large, strips": [(k, RGB) for k in (4, 2, 1)],
    "all marked as reduced": [(k, {**TILES, "subfiletype": 1}) for k in (1, 2)],
    "large to small": [(k, {**TILES, "subfiletype": int(k > 1)}) for k in (1, 2, 4)],
}


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_largest_page_is_the_slide_with_its_own_pixel_size(tmp_path: Path, name: str, big: bool) -> None:
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path, bigtiff=big) as tiff:
        for factor, options in LAYOUTS[name]:
            tiff.write(shrunk(IMAGE, factor), **options, **at(MPP * factor))
    check(path)


def test_a_label_that_comes_first_is_no_level(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    label = np.full((256, 256, 3), 255, np.uint8)
    cv2.putText(label, "S-1234", (10, 130), cv2.FONT_HERSHEY_SIMPLEX, 1.8, (0, 0, 0), 6)
    with tifffile.TiffWriter(path) as tiff:
        for image in (label, IMAGE):
            tiff.write(image, **TILES, **at(MPP))
    check(path)
    assert len(inspect_slide(path).levels) == 1


def test_of_ome_images_of_one_size_the_pixel_size_is_that_of_the_one_read(tmp_path: Path) -> None:
    path, other = tmp_path / "slide.ome.tif", np.ascontiguousarray(IMAGE[::-1])
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for image, mpp, name in ((other, 1.0, "label image"), (IMAGE, MPP, "scan"), (other, 0.5, "scan 2")):
            size = {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            tiff.write(image, photometric="rgb", tile=(128, 128), metadata={"axes": "YXS", "Name": name, **size})
    check(path)


def test_a_page_larger_than_what_ome_describes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(shrunk(IMAGE, 2), description=ome(size=EDGE // 2, n=1), **TILES)
        tiff.write(IMAGE, **TILES)
    with pytest.raises(SlideError, match="page 1 is 512 x 512 px, larger than"):
        open_slide(path)


# ---------------------------------------------------------------- three pages


def planes(path: Path, order: Sequence[int], xml: bytes, levels: Sequence[int] = (), **options: Any) -> Path:
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for k, c in enumerate(order):
            kind = {"photometric": "minisblack", "metadata": None, "tile": (128, 128), **options}
            plane = np.ascontiguousarray(IMAGE[..., c])
            tiff.write(plane, subifds=len(levels), description=xml if k == 0 else None, **kind)
            for factor in levels:
                tiff.write(shrunk(plane, factor), subfiletype=1, **kind)
    return path


@pytest.mark.parametrize("levels", [(), (2, 4)])
@pytest.mark.parametrize("codec", [None, "deflate", "lzw", "jpeg2000", "jpeg"])
def test_red_green_and_blue_as_three_pages(tmp_path: Path, codec: str | None, levels: tuple[int, ...]) -> None:
    options = {"compressionargs": {"level": 95}} if codec == "jpeg" else {}
    path = planes(tmp_path / "a.ome.tif", (0, 1, 2), ome(named("Red", "Green", "Blue")), levels,
                  compression=codec, **options)  # fmt: skip
    check(path, 3 if codec in ("jpeg", "jpeg2000") else 0)
    assert len(inspect_slide(path).levels) == 1 + len(levels)


@pytest.mark.parametrize("predictor", [False, True])
def test_three_pages_in_the_order_of_their_names(tmp_path: Path, predictor: bool) -> None:
    xml = ome(named("B", "R", "G"))
    check(planes(tmp_path / "a.ome.tif", (2, 0, 1), xml, (2,), compression="zlib", predictor=predictor))


def test_three_pages_in_the_order_of_their_colours(tmp_path: Path) -> None:
    colours = (65535, -16776961, 16711935)  # RGBA of blue, red and green.
    channels = "".join(f'<Channel ID="C:{k}" SamplesPerPixel="1" Color="{c}"/>' for k, c in enumerate(colours))
    check(planes(tmp_path / "a.ome.tif", (2, 0, 1), ome(channels)))


def test_planes_of_one_page_in_the_order_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    data = np.ascontiguousarray(np.moveaxis(IMAGE[..., ::-1], 2, 0))
    tifffile.imwrite(path, data, planarconfig="separate", description=ome(named("Blue", "Green", "Red"), n=1), **TILES)
    check(path)


def test_three_pages_without_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        for c in range(3):
            tiff.write(np.ascontiguousarray(IMAGE[..., c]), photometric="minisblack", metadata=None, **at(MPP))
    check(path)
    assert "nothing says which of its three channels" in caplog.text


@pytest.mark.parametrize("codec", [None, "lzw", "zlib", "jpeg2000", "jpeg"])
def test_a_fourth_page_is_opacity_where_it_is_all_or_nothing(tmp_path: Path, codec: str | None) -> None:
    xml = ome('<Channel ID="C:0" SamplesPerPixel="1"/>' * 4, n=4).replace(b'SizeC="3"', b'SizeC="4"')
    options = {**TILES, "photometric": "minisblack", "compression": codec, "metadata": None}
    for fourth, read in ((np.full((EDGE, EDGE), 255, np.uint8), True), (IMAGE[..., 0], False)):
        path = tmp_path / f"{read}.ome.tif"
        with tifffile.TiffWriter(path) as tiff:
            for k, plane in enumerate((*np.moveaxis(IMAGE, 2, 0), fourth)):
                tiff.write(np.ascontiguousarray(plane), description=xml if k == 0 else None, **options)
        if read:
            check(path, 12 if codec == "jpeg" else 0)
        else:
            with pytest.raises(SlideError, match="4 pages"):
                open_slide(path)


# ---------------------------------------------------------------- colours and extra samples


def write_both(folder: Path, image: UInt8, **options: Any) -> list[Path]:
    """Write an image in strips and in tiles."""
    paths = [folder / "strips.tif", folder / "tiles.tif"]
    for path, more in zip(paths, ({"rowsperstrip": 64}, {"tile": (128, 128)}), strict=True):
        tifffile.imwrite(path, image, metadata=None, **more, **options, **at(MPP))
    return paths


def test_cmyk_is_converted(tmp_path: Path) -> None:
    for path in write_both(tmp_path, np.asarray(Image.fromarray(IMAGE).convert("CMYK")), photometric="separated"):
        check(path)


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("declared", [["unspecified"], None])
def test_a_fourth_sample_is_alpha_only_where_that_is_declared(tmp_path: Path, declared: Any, value: int) -> None:
    image = np.dstack([IMAGE, np.full((EDGE, EDGE), value, np.uint8)])
    for path in write_both(tmp_path, image, photometric="rgb", extrasamples=declared or ["unspecified"]):
        if declared is None:
            with tifffile.TiffFile(path, mode="r+") as tiff:
                # Another tag in its place, of no meaning to anyone.
                tiff.filehandle.seek(tiff.pages[0].tags["ExtraSamples"].offset)
                tiff.filehandle.write((65001).to_bytes(2, "little"))
        check(path)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_declared_alpha_is_laid_on_white(tmp_path: Path, kind: str) -> None:
    share = np.linspace(0.2, 1, EDGE, dtype=np.float32)[None, :, None]
    stored = IMAGE * (share if kind == "assocalpha" else 1)
    alpha = np.broadcast_to(np.rint(255 * share[..., 0]), (EDGE, EDGE))
    image = np.dstack([np.rint(stored), alpha]).astype(np.uint8)
    expected = IMAGE * share + 255 * (1 - share)
    for path in write_both(tmp_path, image, photometric="rgb", extrasamples=[kind]):
        assert np.abs(pixels(path) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["minisblack", "miniswhite"])
def test_grey(tmp_path: Path, kind: str) -> None:
    grey = IMAGE[..., 1]
    for path in write_both(tmp_path, 255 - grey if kind == "miniswhite" else grey, photometric=kind):
        assert np.array_equal(pixels(path), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("shift", [0, 8])
def test_palette(tmp_path: Path, shift: int) -> None:
    palette = np.random.default_rng(0).integers(100, 256, (3, 256)).astype(np.uint16)
    index = IMAGE[..., 0]
    for path in write_both(tmp_path, index, photometric="palette", colormap=palette << shift):
        assert np.array_equal(pixels(path), palette.astype(np.uint8)[:, index].transpose(1, 2, 0))


def test_ycbcr_outside_jpeg_is_converted_unless_it_is_subsampled(tmp_path: Path) -> None:
    ycc = np.ascontiguousarray(cv2.cvtColor(IMAGE, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])
    for path in write_both(tmp_path, ycc, photometric="ycbcr", subsampling=(1, 1)):
        check(path, 1)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tiff.pages[0].tags["YCbCrSubSampling"].overwrite((2, 2))
        with pytest.raises(SlideError, match=r"YCbCr that is subsampled.*convert"):
            open_slide(path)


def test_cielab_is_refused(tmp_path: Path) -> None:
    for path in write_both(tmp_path, IMAGE, photometric="cielab"):
        with pytest.raises(SlideError, match=f"{path.name}: colours of kind CIELAB.*convert"):
            open_slide(path)


@pytest.mark.parametrize("kind", ["rgb", "ycbcr"])
@pytest.mark.parametrize("level", [0, 1])
def test_jpeg_tiles_are_in_the_colours_that_their_streams_say(tmp_path: Path, kind: str, level: int) -> None:
    """A tag that says RGB over subsampled components, or YCbCr over components called R, G and B, is wrong."""
    path = tmp_path / "slide.tif"
    sampling = {"subsampling": (2, 2)} if kind == "ycbcr" else {}
    jpeg = {"compression": "jpeg", "compressionargs": {"level": 95}, "metadata": None, "tile": (128, 128)}
    with tifffile.TiffWriter(path) as tiff:
        for factor in (1, 2):
            stored = shrunk(IMAGE, factor)
            if kind == "ycbcr":  # tifffile takes samples as the tag has them.
                stored = cv2.cvtColor(stored, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
            more = {"subfiletype": int(factor > 1), "photometric": kind, **sampling, **jpeg, **at(MPP)}
            tiff.write(np.ascontiguousarray(stored), **more)
    check(path, 4)
    with tifffile.TiffFile(path) as tiff:
        place = tiff.pages[level].tags["PhotometricInterpretation"].valueoffset
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write({"rgb": 6, "ycbcr": 2}[kind].to_bytes(2, "little"))
    check(path, 4)


# ---------------------------------------------------------------- bit depth


@pytest.mark.parametrize("bits", [12, 16])
def test_deeper_samples_are_refused(tmp_path: Path, bits: int) -> None:
    deep = IMAGE.astype(np.uint16) << (bits - 8)
    paths = [*write_both(tmp_path, deep, photometric="rgb"), tmp_path / "deep.png"]
    cv2.imwrite(str(paths[2]), deep[..., ::-1])
    for path in paths:
        with pytest.raises(SlideError, match=rf"{path.name}: .*8-bit RGB"):
            open_slide(path, mpp=MPP)


def test_floats_and_signed_bytes_are_refused(tmp_path: Path) -> None:
    for image in ((IMAGE / 255).astype(np.float32), IMAGE.astype(np.int8)):
        for path in write_both(tmp_path, image, photometric="rgb"):
            with pytest.raises(SlideError, match="not an 8-bit RGB image"):
                open_slide(path)


# ---------------------------------------------------------------- fluorescence


def told(path: Path, *flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["info", str(path), *flags])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "channels",
    [
        named("DAPI", "CD3", "CD8"),
        named("Red", "Green", "Blue", more='EmissionWavelength="520"'),
        named("", "", "", more='IlluminationType="Epifluorescence"'),
        named("marker A", "marker B", "marker C"),
    ],
)
@pytest.mark.parametrize("layout", ["pages", "planes", "chunky"])
def test_channels_of_fluorescence_are_refused_unless_one_insists(tmp_path: Path, channels: str, layout: str) -> None:
    path = tmp_path / "slide.ome.tif"
    if layout == "pages":
        planes(path, (0, 1, 2), ome(channels), (2,))
    else:
        image = IMAGE if layout == "chunky" else np.ascontiguousarray(np.moveaxis(IMAGE, 2, 0))
        how = "contig" if layout == "chunky" else "separate"
        tifffile.imwrite(path, image, planarconfig=how, description=ome(channels, n=1), **TILES)
    with pytest.raises(FluorescenceError, match="--allow-fluorescence") as error:
        open_slide(path)
    assert error.value.exit_code == 2
    assert told(path)[0] == 2 and told(path, "--allow-fluorescence")[0] == 0
    assert np.array_equal(pixels(path, allow_fluorescence=True), IMAGE)


def test_segment_refuses_fluorescence_with_the_same_words_as_info(tmp_path: Path) -> None:
    path = planes(tmp_path / "slide.ome.tif", (0, 1, 2), ome(named("DAPI", "CD3", "CD8")))
    with pytest.raises(FluorescenceError, match="DAPI, CD3, CD8; --allow-fluorescence"):
        segment(path, tmp_path)
    table = segment(path, tmp_path, replace(BASE, allow_fluorescence=True, output=OutputConfig(overwrite=True)))[1]
    assert table.run.config["allow_fluorescence"] is True


def test_light_on_black_is_fluorescence_whatever_the_file(tmp_path: Path, shared: Path) -> None:
    dark = np.zeros((EDGE, EDGE, 3), np.uint8)
    dark[..., 2] = cv2.inRange(IMAGE[..., 1], 0, 100) // 2
    Image.fromarray(dark).save(tmp_path / "dark.png")
    tifffile.imwrite(tmp_path / "dark.tif", dark, **TILES, **at(MPP))
    for path in (tmp_path / "dark.png", tmp_path / "dark.tif", shared / "data" / "wsi" / "hamamatsu-fluorescence.ndpi"):
        with pytest.raises(FluorescenceError, match="is black"):
            open_slide(path, mpp=MPP)


def test_many_channels_with_names_are_fluorescence(tmp_path: Path) -> None:
    path, channels = tmp_path / "a.ome.tif", {"Name": ["DAPI", "CD3", "CD8", "CD20"]}
    tifffile.imwrite(path, np.zeros((4, 30, 40), np.uint16), metadata={"axes": "CYX", "Channel": channels})
    with pytest.raises(FluorescenceError, match="DAPI, CD3, CD8, CD20"):
        open_slide(path, mpp=MPP)


@pytest.mark.parametrize("name", ["H&amp;E", "Brightfield", "TL Brightfield", "Channel 0", "RGB", "scan of A12"])
def test_one_channel_of_colour_may_have_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "slide.ome.tif"
    xml = ome(f'<Channel ID="Channel:0:0" Name="{name}" SamplesPerPixel="3"/>', n=1)
    tifffile.imwrite(path, IMAGE, description=xml, **TILES)
    check(path)


# ---------------------------------------------------------------- orientation


@pytest.mark.parametrize("turn", range(2, 9))
def test_turned_files_are_read_as_they_are_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture, turn: int) -> None:
    for path in write_both(tmp_path, IMAGE, photometric="rgb", extratags=[(274, 3, 1, turn, True)]):
        check(path)
        assert f"Orientation is {turn}" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("turn", range(2, 9))
def test_turned_pictures_are_read_as_they_are_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, turn: int
) -> None:
    picture, exif = Image.fromarray(IMAGE[:, :300]), Image.Exif()
    exif[0x0112] = turn
    picture.save(tmp_path / f"turned{suffix}", exif=exif)
    picture.save(tmp_path / f"plain{suffix}")
    plane = Plane(MPP, 1.0, 1.0, 300, EDGE)
    np.testing.assert_array_equal(
        pixels(tmp_path / f"turned{suffix}", plane, mpp=MPP), pixels(tmp_path / f"plain{suffix}", plane, mpp=MPP)
    )
    assert caplog.text.count(f"Orientation is {turn}") == 1


def test_damaged_exif_says_nothing_of_the_pixels(tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "a.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png", mpp=MPP), IMAGE)


def test_a_vendors_file_that_is_turned_is_refused(tmp_path: Path) -> None:
    for turn in (1, 3):
        path = tmp_path / f"{turn}.tif"
        how = {**TILES, "software": "MedScan", "description": "Objective Power=20", "metadata": None, **at(MPP)}
        tifffile.imwrite(path, IMAGE, **how, extratags=[(274, 3, 1, turn, True)])
        assert openslide.OpenSlide.detect_format(path) == "trestle"
    inspect_slide(tmp_path / "1.tif")
    with pytest.raises(SlideError, match="Orientation is 3"):
        inspect_slide(tmp_path / "3.tif")


# ---------------------------------------------------------------- levels


def padded(level: UInt8) -> UInt8:
    out = np.full((384, 384, 3), 255, np.uint8)
    out[:256, :256] = level
    return out


BAD_LEVELS = {
    "padded": padded,
    "padded by a little": lambda level: cv2.copyMakeBorder(level, 0, 12, 0, 12, cv2.BORDER_REPLICATE),
    "cropped": lambda level: np.ascontiguousarray(level[:200, :200]),
    "shifted": lambda level: np.roll(level, (9, 14), (0, 1)),
    "empty": lambda level: np.full_like(level, 255),
    "black": np.zeros_like,
    "another slide": lambda level: shrunk(tissue(9), 2),
    "false colours": lambda level: np.ascontiguousarray(level[..., ::-1]),
    "turned": lambda level: np.ascontiguousarray(level[::-1]),
}


@pytest.mark.parametrize("name", BAD_LEVELS)
@pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".svs"])
def test_a_level_that_does_not_show_level_0_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, suffix: str
) -> None:
    path, bad = tmp_path / f"slide{suffix}", np.asarray(BAD_LEVELS[name](shrunk(IMAGE, 2)), np.uint8)
    write_levels(path, [IMAGE, bad, shrunk(IMAGE, 4)])
    check(path)
    assert [v.width_px for v in inspect_slide(path).levels] == [512, 128]
    assert "it is not read" in caplog.text


def write_levels(path: Path, levels: Sequence[UInt8]) -> None:
    """Write a pyramid as plain TIFF, OME-TIFF or SVS."""
    kind, about = path.name.split(".", 1)[1], None
    with tifffile.TiffWriter(path, bigtiff=kind == "ome.tif") as tiff:
        for k, level in enumerate(levels):
            more: dict[str, Any] = {} if kind == "svs" else {"subfiletype": int(k > 0)}
            if kind == "svs":
                about = f"Aperio Image Library v12\r\n{EDGE}x{EDGE} (128x128)|AppMag = 40|MPP = {MPP}"
            elif kind == "ome.tif":
                about = ome(n=1) if k == 0 else None
                more |= {"subifds": len(levels) - 1} if k == 0 else {}
            tiff.write(level, description=about, **TILES, **more, **at(MPP))


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".svs"])
def test_levels_rounded_up_or_down_stay(tmp_path: Path, suffix: str) -> None:
    image, path = np.ascontiguousarray(IMAGE[:507, :501]), tmp_path / f"slide{suffix}"
    levels = [cv2.resize(image, size, interpolation=cv2.INTER_AREA) for size in ((251, 254), (125, 126), (63, 64))]
    write_levels(path, [image, *(np.asarray(level, np.uint8) for level in levels)])
    assert len(inspect_slide(path).levels) == 4


# ---------------------------------------------------------------- DICOM


def dicom(shared: Path, folder: Path, colours: str, said: str, subsampling: str = "444") -> Path:
    """Write the field as one level of DICOM, its frames JPEG in `colours` while the header says `said`."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install 'cellslide[test]'")
    from pydicom.encaps import encapsulate
    from pydicom.uid import generate_uid

    data = copy.deepcopy(pydicom.dcmread(shared / "data/wsi/CMU-1-Small-Region-dicom/level-0-frames-0-30.dcm"))
    for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PerFrameFunctionalGroupsSequence"):
        if name in data:
            delattr(data, name)
    tiles = [IMAGE[y : y + 256, x : x + 256].copy() for y in (0, 256) for x in (0, 256)]
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SeriesInstanceUID = generate_uid()
    data.TotalPixelMatrixColumns = data.TotalPixelMatrixRows = EDGE
    data.Rows = data.Columns = 256
    data.NumberOfFrames, data.PhotometricInterpretation = len(tiles), said
    data.ImagedVolumeWidth = data.ImagedVolumeHeight = EDGE * MPP / 1e3
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [MPP / 1e3] * 2
    how = {"outcolorspace": colours} if colours == "rgb" else {"subsampling": subsampling}
    data.PixelData = encapsulate([imagecodecs.jpeg8_encode(tile, level=95, **how) for tile in tiles])
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    folder.mkdir()
    data.save_as(folder / "a.dcm", enforce_file_format=True)
    return folder


@pytest.mark.parametrize(
    ("colours", "said", "subsampling", "lies"),
    [
        ("ycbcr", "RGB", "420", True),
        ("ycbcr", "RGB", "422", True),
        ("ycbcr", "RGB", "444", True),
        ("rgb", "YBR_FULL_422", "444", True),
        ("ycbcr", "YBR_FULL_422", "422", False),
        ("rgb", "RGB", "444", False),
    ],
)
def test_dicom_frames_are_in_the_colours_that_their_streams_say(
    shared: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    colours: str,
    said: str,
    subsampling: str,
    lies: bool,
) -> None:
    path = dicom(shared, tmp_path / "slide", colours, said, subsampling)
    check(path, 4)
    assert ("state different colours" in caplog.text) is lies
    with open_slide(path) as slide:
        assert isinstance(slide.reader, TiledReader)


def sparse(shared: Path, folder: Path, order: Sequence[int], kind: str | None, places: bool = True) -> Path:
    """Write the field as one level of DICOM in tiles of 128 px: those of `order`, with their places."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install 'cellslide[test]'")
    from pydicom.encaps import encapsulate

    dicom(shared, folder, "ycbcr", "YBR_FULL_422", "422")
    data = pydicom.dcmread(folder / "a.dcm")
    del data.DimensionOrganizationType
    if kind is not None:
        data.DimensionOrganizationType = kind
    data.Rows = data.Columns = 128
    data.NumberOfFrames = len(order)
    corners = [(k % 4 * 128, k // 4 * 128) for k in order]
    tiles = [IMAGE[y : y + 128, x : x + 128].copy() for x, y in corners]
    data.PixelData = encapsulate([imagecodecs.jpeg8_encode(tile, level=95, subsampling="422") for tile in tiles])
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    frames = []
    for x, y in corners if places else ():
        place, frame = pydicom.Dataset(), pydicom.Dataset()
        place.ColumnPositionInTotalImagePixelMatrix, place.RowPositionInTotalImagePixelMatrix = x + 1, y + 1
        for axis in "XYZ":
            setattr(place, f"{axis}OffsetInSlideCoordinateSystem", 0)
        frame.PlanePositionSlideSequence = [place]
        frames.append(frame)
    if frames:
        data.PerFrameFunctionalGroupsSequence = frames
    data.save_as(folder / "a.dcm", enforce_file_format=True)
    return folder


@pytest.mark.parametrize("kind", ["TILED_SPARSE", None])
@pytest.mark.parametrize("order", [range(16), range(15, -1, -1), [5, 2, *range(6, 16), 0, 1, 3, 4, 5]])
def test_sparse_dicom_frames_lie_where_they_say(
    shared: Path, tmp_path: Path, kind: str | None, order: Sequence[int]
) -> None:
    check(sparse(shared, tmp_path / "slide", order, kind), 4)


def test_sparse_dicom_frames_that_are_missing_in_tissue_are_counted(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = sparse(shared, tmp_path / "slide", [k for k in range(15, -1, -1) if k != 5], "TILED_SPARSE")
    with open_slide(path) as slide:
        assert missing_tissue(slide, 0, find_tissue(slide, TissueConfig())) == [(128.0, 128.0, 256.0, 256.0)]
    assert "1 tiles inside the tissue are missing" in caplog.text


def test_a_frame_that_is_missing_from_a_full_grid_fails_its_tile(shared: Path, tmp_path: Path) -> None:
    path = sparse(shared, tmp_path / "slide", range(15), "TILED_FULL", places=False)
    with pytest.raises(TileError, match="slide"):
        pixels(path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_glass_that_is_not_neutral_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str) -> None:
    image = IMAGE.copy()
    image[:, 300:] = 250
    false = np.ascontiguousarray(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])
    for name, shown in (("right", image), ("false", false)):
        path = tmp_path / f"{name}{suffix}"
        Image.fromarray(shown).save(path)
        caplog.clear()
        inspect_slide(path)
        assert ("not neutral" in caplog.text) is (name == "false")


# ---------------------------------------------------------------- missing tiles


def drop(path: Path, tiles: Sequence[int], page: int = 0) -> None:
    """Take tiles out of a page: no bytes."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name in ("TileByteCounts", "TileOffsets"):
            tag = tiff.pages[page].tags[name]
            tag.overwrite([0 if k in tiles else v for k, v in enumerate(tag.value)])


@pytest.mark.parametrize("suffix", [".svs", ".tif", ".ome.tif"])
def test_tiles_that_are_missing_in_tissue_are_counted_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    path = tmp_path / f"slide{suffix}"
    write_levels(path, [IMAGE, shrunk(IMAGE, 2)])
    drop(path, (0, 5))
    with open_slide(path) as slide:
        find_tissue(slide, TissueConfig())
    assert "2 tiles inside the tissue are missing" in caplog.text
    for tissue_config in (TissueConfig(), TissueConfig(enabled=False)):
        config = replace(BASE, tissue=tissue_config, output=OutputConfig(formats=("zarr",), overwrite=True))
        record, _ = segment(path, tmp_path, config, fake_model(mpp=MPP))
        assert record.status == "done_with_errors" and record.counts.tiles_failed == 0
        assert record.counts.tiles_missing == 2
        assert [(t.x, t.y) for t in record.failed_tiles] == [(0, 0), (128, 128)]
        assert "missing in the file" in record.failed_tiles[0].error
    assert not verify_folder(tmp_path / path.stem).faults


def test_a_hole_in_the_only_level_counts_where_tissue_is_all_around(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_levels(path, [IMAGE])
    drop(path, (5,))
    with open_slide(path) as slide:
        assert missing_tissue(slide, 0, find_tissue(slide, TissueConfig())) == [(128.0, 128.0, 256.0, 256.0)]


def test_tiles_that_are_left_out_on_glass_are_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image, path = IMAGE.copy(), tmp_path / "slide.svs"
    image[:, 256:] = 255
    write_levels(path, [image, shrunk(image, 2)])
    drop(path, [k for k in range(16) if k % 4 > 1])
    drop(path, [1, 3], page=1)
    with open_slide(path) as slide:
        assert len(slide.info.levels) == 2
        find_tissue(slide, TissueConfig())
    assert "missing" not in caplog.text


def test_levels_without_tiles_are_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "slide.svs"
    write_levels(path, [IMAGE, shrunk(IMAGE, 2), shrunk(IMAGE, 4)])
    drop(path, range(4), page=1)
    check(path)
    assert "256 x 256 px lacks tiles that level 0 has; it is not read" in caplog.text
    drop(path, range(16))
    with pytest.raises(SlideError, match="level 0 has no tiles"):
        open_slide(path)


# ---------------------------------------------------------------- pixel size and objective


@pytest.mark.parametrize(
    ("mpp", "power", "source", "outcome"),
    [
        (1.0, 40, "tiff", "refused"),
        (0.1, 40, "tiff", "refused"),
        (0.4, 40, "tiff", "taken"),
        (0.25, 40, "tiff", "taken"),
        (0.5, 40, "vendor", "warned"),
        (0.12, 40, "vendor", "warned"),
        (0.5, 40, "ome", "warned"),
        (1.0, 40, "ome", "refused"),
        (1.0, 20, "vendor", "refused"),
        (0.5, 20, "vendor", "taken"),
        (1.0, 10, "ome", "taken"),
        (0.5, None, "tiff", "taken"),
    ],
)
def test_a_pixel_size_that_contradicts_the_objective(
    caplog: pytest.LogCaptureFixture, mpp: float, power: float | None, source: Any, outcome: str
) -> None:
    found = PixelSize(mpp, mpp, source, f"it says {mpp} µm", power)
    if outcome == "refused":
        with pytest.raises(PixelSizeError, match=r"objective is .*give --mpp"):
            choose(Path("a.svs"), found, None)
    else:
        assert choose(Path("a.svs"), found, None) == (mpp, mpp, source)
    assert ("objective" in caplog.text) is (outcome == "warned")


def test_a_flag_that_contradicts_the_objective_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        choose(Path("a.svs"), PixelSize(1.0, 1.0, "tiff", "it says 1 µm", 40), 0.5)
        choose(Path("a.svs"), PixelSize(1.0, 1.0, "tiff", "it says 1 µm", 40), 0.25)
    assert len(caplog.records) == 1 and "--mpp is 0.5, but its objective is 40x" in caplog.text


def test_a_default_resolution_in_an_svs_is_refused_by_info_and_reading_alike(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    about = f"Aperio Image Library v12\r\n{EDGE}x{EDGE} (128x128)|AppMag = 40"
    tifffile.imwrite(path, IMAGE, description=about, **TILES, **at(1.0))
    with pytest.raises(PixelSizeError, match=r"10000 x 10000 per cm, but its objective is 40x"):
        open_slide(path)
    facts = json.loads(CliRunner().invoke(cli, ["info", str(path), "--json"]).stdout)
    assert facts["mpp_x"] is None and facts["objective_power"] == 40
    assert np.array_equal(pixels(path, mpp=MPP), IMAGE)


@pytest.mark.parametrize("named_objective", [True, False])
def test_the_magnification_of_ome_counts(tmp_path: Path, named_objective: bool) -> None:
    path = tmp_path / "slide.ome.tif"
    objective = '<Instrument ID="I:0"><Objective ID="O:0" NominalMagnification="40"/></Instrument>'
    xml = ome(mpp=1.0, n=1, more=objective).decode()
    if named_objective:
        xml = xml.replace('<Pixels ID="Pixels:0"', '<ObjectiveSettings ID="O:0"/><Pixels ID="Pixels:0"')
    tifffile.imwrite(path, IMAGE, description=xml.encode(), **TILES)
    assert inspect_slide(path).objective_power == 40
    with pytest.raises(PixelSizeError, match="objective is 40x"):
        open_slide(path)


# ---------------------------------------------------------------- a sample is decoded


def test_a_file_of_which_nothing_can_be_decoded_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, IMAGE, compression="zlib", **TILES, **at(MPP))
    with tifffile.TiffFile(path) as tiff:
        spans = list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True))
    content = bytearray(path.read_bytes())
    for start, length in spans:
        content[start : start + length] = b"\xff" * length
    path.write_bytes(content)
    with pytest.raises(SlideError, match="not one of 16 places could be decoded"):
        inspect_slide(path)


def test_openslide_reads_only_where_it_sees_the_same_slide(tmp_path: Path) -> None:
    for name, levels in (("plain.tif", (1, 2)), ("ascending.tif", (2, 1))):
        with tifffile.TiffWriter(tmp_path / name) as tiff:
            for factor in levels:
                tiff.write(shrunk(IMAGE, factor), subfiletype=int(factor > 1), **TILES, **at(MPP * factor))
        reader = open_reader(tmp_path / name)
        assert isinstance(reader, OpenSlideReader) is (name == "plain.tif")
        reader.close()
    assert isinstance(open_slide(tmp_path / "plain.tif"), Slide)
