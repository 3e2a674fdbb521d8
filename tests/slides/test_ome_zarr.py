"""OME-Zarr images as slides: both versions, axes and colours in any order, and metadata that nobody should believe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cellslide.errors import CellslideError, SlideError
from cellslide.slides.inputs import expand_slides
from cellslide.slides.readers import open_reader
from cellslide.slides.slide import open_slide

RNG = np.random.default_rng(3)
IMAGE = np.kron(RNG.integers(120, 240, (24, 32, 3)), np.ones((8, 8, 1))).astype(np.uint8)


def write(
    folder: Path, version: str = "0.5", axes: str = "cyx", unit: str | None = "micrometer", **changes: Any
) -> Path:
    """Write `IMAGE` as OME-Zarr of two levels; `changes` replace parts of its metadata."""
    new = version == "0.5"
    group = zarr.open_group(folder, mode="w", zarr_format=3 if new else 2)
    datasets = []
    for k, step in enumerate((1, 2)):
        pixels = IMAGE[::step, ::step][:, :, changes.get("order", [0, 1, 2])].astype(changes.get("dtype", np.uint8))
        shape = [dict(zip("yxc", pixels.shape, strict=True)).get(axis, 1) for axis in axes]
        pixels = pixels.transpose(["yxc".index(axis) for axis in axes if axis in "yxc"]).reshape(shape)
        group.create_array(str(k), data=pixels, chunks=tuple(min(n, 50) for n in shape))
        scale = [0.5 * step if axis in "yx" else 1.0 for axis in axes]
        datasets.append({"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    datasets[0]["path"] = changes.get("path", "0")
    named = [{"name": axis, **({"unit": unit} if unit and axis in "yx" else {})} for axis in axes]
    said = {"version": version, "multiscales": [{"axes": named, "datasets": datasets}], **changes.get("more", {})}
    group.attrs.update({"ome": said} if new else said)
    return folder


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["cyx", "yxc", "tczyx"])
def test_pixels_levels_and_pixel_size(tmp_path: Path, version: str, axes: str) -> None:
    with open_slide(write(tmp_path / "a.ome.zarr", version, axes)) as slide:
        info = slide.info
        assert (info.width_px, info.height_px, info.mpp_x, info.mpp_source) == (256, 192, 0.5, "ome")
        assert [level.width_px for level in info.levels] == [256, 128]
    reader = open_reader(tmp_path / "a.ome.zarr")
    part = reader.read_level(0, -10, 150, 100, 60)
    assert np.array_equal(part[:42, 10:], IMAGE[150:, :90]) and (part[42:] == 255).all() and (part[:, :10] == 255).all()
    assert np.array_equal(reader.read_level(1, 7, 9, 50, 60), IMAGE[::2, ::2][9:69, 7:57])


def test_channels_are_put_in_order_by_their_colours(tmp_path: Path) -> None:
    channels = [{"label": str(k), "color": colour} for k, colour in enumerate(("0000FF", "FF0000", "00FF00"))]
    folder = write(tmp_path / "a.zarr", order=[2, 0, 1], more={"omero": {"channels": channels}})
    assert np.array_equal(open_reader(folder).read_level(0, 0, 0, 256, 192), IMAGE)


def test_markers_are_no_stain(tmp_path: Path) -> None:
    channels = [{"label": name, "color": "0000FF"} for name in ("DAPI", "CD3", "CD8")]
    folder = write(tmp_path / "a.zarr", more={"omero": {"channels": channels}})
    assert "DAPI" in (open_reader(folder).header.fluorescence or "")


def test_no_unit_is_no_pixel_size(tmp_path: Path) -> None:
    with pytest.raises(CellslideError, match="--mpp"):
        open_slide(write(tmp_path / "a.zarr", unit=None))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"dtype": np.uint16}, "8 bits"), ({"path": "../b.zarr/0"}, "leads out"), ({"path": "9"}, "a.zarr"),
     ({"more": {"multiscales": []}}, "not an OME-Zarr image"), ({"axes": "yx", "order": [0]}, "c, y and x")],
)  # fmt: skip
def test_what_is_no_slide_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write(tmp_path / "b.zarr")
    if changes.get("axes") == "yx":
        folder = write(tmp_path / "a.zarr")
        attributes = zarr.open_group(folder, mode="r+").attrs
        said: Any = attributes["ome"]
        said["multiscales"][0]["axes"] = [{"name": "y"}, {"name": "x"}]
        attributes["ome"] = said
    else:
        folder = write(tmp_path / "a.zarr", **changes)
    with pytest.raises(SlideError, match=words):
        open_reader(folder)


def test_a_size_that_no_slide_has_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a.zarr")
    zarr.open_group(folder, mode="r+").create_array(
        "0", shape=(3, 1 << 30, 1 << 30), chunks=(3, 64, 64), dtype="uint8", overwrite=True
    )
    with pytest.raises(SlideError, match="no slide"):
        open_reader(folder)
    zarr.open_group(folder, mode="r+").create_array(
        "0", shape=(3, 1 << 15, 1 << 15), chunks=(3, 1 << 15, 1 << 15), dtype="uint8", overwrite=True
    )
    with pytest.raises(SlideError, match="memory"):
        open_reader(folder)


def test_folders_hold_images_but_no_tables(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.ome.zarr", "0.4")
    zarr.open_group(tmp_path / "in" / "cells.zarr", mode="w")
    for named in (tmp_path / "in", tmp_path / "in" / "*.zarr", tmp_path / "in" / "a.ome.zarr"):
        (found,) = expand_slides([named])
        assert found.path.name == "a.ome.zarr" and found.slide_id == "a.ome"
