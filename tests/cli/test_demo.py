"""The painted slide is a slide, is tissue, and knows its nuclei; the demo command does the whole job with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import openslide
import pytest
from click.testing import CliRunner

from cellslide.cli.main import cli
from cellslide.errors import CellslideError
from cellslide.slides import painted as demo


@pytest.fixture(scope="module")
def painting() -> demo.Painting:
    return demo.paint()


def test_same_seed_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WIDTH_PX", 800)
    monkeypatch.setattr(demo, "HEIGHT_PX", 640)
    first, second, other = demo.paint(3), demo.paint(3), demo.paint(4)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.centroid_xy, second.centroid_xy)
    assert not np.array_equal(first.image, other.image)


def test_it_looks_like_tissue_on_glass(painting: demo.Painting) -> None:
    grey = painting.image.mean(axis=2)
    assert painting.image.shape == (demo.HEIGHT_PX, demo.WIDTH_PX, 3)
    assert 0.5 < (grey < 225).mean() < 0.9
    assert grey[:20].mean() > 235
    assert grey[-20:].mean() > 235
    nuclei = painting.image[painting.labels > 0].mean(axis=0)
    stroma = painting.image[(painting.labels == 0) & (grey < 225)].mean(axis=0)
    assert nuclei[2] > nuclei[0]
    assert stroma[0] > stroma[1] + 30
    assert nuclei[0] < stroma[0] - 60


def test_nuclei_are_apart_and_where_it_says(painting: demo.Painting) -> None:
    n = len(painting.centroid_xy)
    assert n > 600
    area = np.bincount(painting.labels.ravel(), minlength=n + 1)[1:]
    assert len(area) == n
    equivalent_um = 2 * np.sqrt(area / np.pi) * demo.MPP
    assert 3 < equivalent_um.min() < equivalent_um.max() < 16
    rows, cols = np.nonzero(painting.labels)
    owner = painting.labels[rows, cols] - 1
    centre = np.stack([np.bincount(owner, v + 0.5, n) / np.bincount(owner, minlength=n) for v in (cols, rows)], axis=1)
    # A nucleus painted later never covers an earlier one, so the recorded centre is that of the pixels left.
    assert np.abs(centre - painting.centroid_xy).max() < 0.01


def test_written_slide_is_a_pyramid_with_pixel_size(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(150, 160, (700, 1101, 3), dtype=np.uint8)
    demo.write_pyramid(tmp_path / "s.tif", image, 0.5)
    with openslide.OpenSlide(tmp_path / "s.tif") as slide:
        assert slide.level_dimensions == ((1101, 700), (550, 350), (275, 175))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-3)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5, rel=1e-3)
        assert np.asarray(slide.read_region((500, 300), 0, (50, 50)))[..., :3].mean() == pytest.approx(154.5, abs=3)
    assert [p.name for p in tmp_path.iterdir()] == ["s.tif"]


def test_download_is_checked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"a slide")
    right = hashlib.sha256(b"a slide").hexdigest()
    demo.fetch_sample(tmp_path / "new" / "a.svs", source.as_uri(), right)
    assert (tmp_path / "new" / "a.svs").read_bytes() == b"a slide"
    source.unlink()
    demo.fetch_sample(tmp_path / "new" / "a.svs", source.as_uri(), right)
    with pytest.raises(CellslideError, match="cannot download"):
        demo.fetch_sample(tmp_path / "b.svs", source.as_uri(), right)
    source.write_bytes(b"another")
    with pytest.raises(CellslideError, match="sha256"):
        demo.fetch_sample(tmp_path / "b.svs", source.as_uri(), right)
    assert not (tmp_path / "b.svs").exists()


def test_pinned_sample_is_the_one_we_know(shared: Path) -> None:
    sample = shared / "data" / "wsi" / "CMU-1-Small-Region.svs"
    assert hashlib.sha256(sample.read_bytes()).hexdigest() == demo.SAMPLE_SHA256


def test_demo_draws_and_says_where_to_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole command with a fake network, on a small painting."""
    from types import SimpleNamespace

    import cellslide.weights
    from tests.support.fakes import FakeMask, fake_spec

    monkeypatch.setattr(demo, "WIDTH_PX", 700)
    monkeypatch.setattr(demo, "HEIGHT_PX", 560)
    fake = SimpleNamespace(spec=fake_spec(), module=FakeMask().eval(), entry=None)
    monkeypatch.setattr(cellslide.weights, "load_model", lambda *_: fake)
    result = CliRunner().invoke(cli, ["demo", "-o", str(tmp_path), "--device", "cpu", "--no-progress"])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "demo-slide"
    for name in ("cells.geojson.gz", "cells.zarr", "run.json", "overlay.png", "overlay-detail.png"):
        assert (folder / name).exists(), name
        assert str(folder / name) in result.stdout
    assert json.loads((folder / "run.json").read_text())["counts"]["nuclei"] > 10


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_finds_the_painted_nuclei(tmp_path: Path, painting: demo.Painting) -> None:
    result = CliRunner().invoke(cli, ["demo", "-o", str(tmp_path), "--device", "cpu", "--no-progress"])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "demo-slide"
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    found = _found_labels(folder / "cells.zarr", painting)
    share = len(np.unique(found[found > 0])) / len(painting.centroid_xy)
    assert share > 0.85, f"found {share:.2f} of the painted nuclei"
    assert (found > 0).mean() > 0.85, "many cells lie where no nucleus was painted"


def _found_labels(table_path: Path, painting: demo.Painting) -> np.ndarray:
    """The painted nucleus under each cell's centroid, 0 where there is none."""
    from cellslide.store.cell_table import open_table

    with open_table(table_path) as table:
        xy = np.concatenate([chunk.cells.centroid_xy for chunk in table.iter_chunks(outlines=False)])
    return painting.labels[xy[:, 1].astype(int), xy[:, 0].astype(int)]
