"""The picture in `cells.zarr` lies under the nuclei, in pixels and in µm, and is as small as was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from cellslide.cli.main import cli
from cellslide.store.cell_table import open_table
from tests.viewed import HEIGHT, MPP, WIDTH, Viewed, write_viewed


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    return write_viewed(tmp_path_factory.mktemp("pictured") / "out")


def export(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["export", "--format", "csv", *map(str, arguments)])
    return result.exit_code, result.output


def test_spatialdata_sees_nuclei_on_the_slide_in_both_frames(viewed: Viewed) -> None:
    spatialdata = pytest.importorskip("spatialdata", reason="extra `spatial` is not installed")
    from spatialdata.transformations import get_transformation

    before = spatialdata.read_zarr(viewed.folder / "cells.zarr")
    frames = get_transformation(before["nuclei"], get_all=True)
    um = frames["micrometres"].to_affine_matrix(("x", "y"), ("x", "y"))
    assert set(frames) == {"global", "micrometres"} and np.allclose(um, np.diag([MPP, MPP, 1]))
    assert export(viewed.folder, "--with-image", "--image-mb", 3) == (0, f"{viewed.folder / 'cells.csv.gz'}\n")
    data = spatialdata.read_zarr(viewed.folder / "cells.zarr")
    assert len(data["nuclei"]) == data["cells"].n_obs == 300
    factor = np.sqrt(WIDTH * HEIGHT * 3 / 2.25e6)
    for frame, scale in (("global", factor), ("micrometres", factor * MPP)):
        step = get_transformation(data["slide"], frame).to_affine_matrix(("x", "y"), ("x", "y"))
        assert np.allclose(step, np.diag([scale, scale, 1]))
    levels = [np.asarray(level["image"]) for level in data["slide"].values()]
    assert sum(level.nbytes for level in levels) < 3e6 and [max(level.shape) for level in levels] == [1000, 500]
    for k, level in enumerate(levels):
        places = [((viewed.xy - shift) / factor / 2**k).astype(int) for shift in (0, 40)]
        on, off = (level[1, at[:, 1], at[:, 0]] for at in places)
        assert on.mean() < 170 < 200 < np.median(off), "discs are dark, and glass lies between them"


def test_a_picture_stays_with_the_table_and_is_replaced(viewed: Viewed) -> None:
    assert export(viewed.folder, "--with-image", "--image-mb", 1)[0] == 0
    assert export(viewed.folder, "--with-image", "--image-mb", 100)[0] == 0
    image = zarr.open_group(viewed.folder / "cells.zarr", mode="r")["images/slide/s0"]
    assert image.shape == (3, HEIGHT, WIDTH)
    with open_table(viewed.folder / "cells.zarr") as table:
        assert table.n == 300 and "class" in table.columns


def test_a_slide_that_moved_is_named(tmp_path: Path) -> None:
    viewed = write_viewed(tmp_path / "out")
    moved = viewed.slide.rename(tmp_path / "moved.tif")
    code, words = export(viewed.folder, "--with-image")
    assert code == 2 and "--slide" in words
    assert export(viewed.folder, "--with-image", "--slide", moved)[0] == 0
    assert export(viewed.folder, "--slide", moved)[0] == 2
