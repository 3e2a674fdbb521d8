"""Vectors of nuclei: the right place is read, whatever came with it; table, files beside it, resume, the command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result

from cellslide.cli.main import cli
from cellslide.config import EmbedConfig, InferConfig
from cellslide.embed import Embedder, embed_array, embed_slide, open_embedder
from cellslide.errors import CellslideError, Interrupted, UsageError
from cellslide.models.muse import MuseBackbone, MuseConfig
from cellslide.progress import Watch
from cellslide.slides.slide import Slide, open_slide, slide_from_array
from cellslide.store.cell_table import open_table
from cellslide.store.run_record import read_record
from cellslide.store.table_writer import CellTableWriter
from cellslide.types import Cells, RunRecord
from tests.painted import DISC, PINK_DISC, paint_slide
from tests.support.fake_muse import FakeMuse, fake_muse
from tests.support.fakes import fake_spec

WIDTH, HEIGHT, RADIUS = 620, 360, 9.0
# Corners, edges, the borders of windows at 64 px, and places between.
CENTRES = np.array(
    [
        (0.5, 0.5),
        (10, 350),
        (619, 359),
        (64, 64),
        (128, 200),
        (192, 128),
        (300.5, 64),
        (310, 200),
        (448, 320),
        (600, 20),
    ]
)
COLORS = np.array([(DISC, PINK_DISC)[k % 2] for k in range(len(CENTRES))], np.uint8)


def embedder(loaded: object = None, batch: int = 3, **changes: object) -> Embedder:
    infer = InferConfig(device="cpu", batch_size=batch)
    return open_embedder(loaded or fake_muse(), EmbedConfig(infer=infer, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embed") / "s.tif"
    paint_slide(path, WIDTH, HEIGHT, 0.5, CENTRES, RADIUS, disc_color=COLORS)
    return path


@pytest.fixture
def slide(painted: Path) -> Iterator[Slide]:
    with open_slide(painted) as opened:
        yield opened


@pytest.fixture
def folder(slide: Slide, tmp_path: Path) -> Path:
    """A folder of `segment` with a table of the discs as points."""
    n = len(CENTRES)
    zero, one = np.zeros(n, np.int32), np.ones(n, np.float32)
    out = tmp_path / "out" / "s"
    return _table(out, slide, Cells(CENTRES, zero, zero, one, one))


def _table(out: Path, slide: Slide, cells: Cells) -> Path:
    out.mkdir(parents=True)
    writer = CellTableWriter(out / "cells.zarr", slide.info, fake_spec("point"))
    writer.append(cells)
    writer.close(RunRecord("0", "done", {"path": "s.tif"}, {}, [], "cpu", "torch", "fp32", 0, "2024-01-01T00:00:00Z"))
    return out


def vectors(folder: Path) -> np.ndarray:
    with open_table(folder / "cells.zarr") as table:
        return table.matrix("embedding")


def test_the_colour_at_each_place_is_read(slide: Slide, folder: Path) -> None:
    record, skipped = embed_slide(folder, slide, embedder())
    assert not skipped and vectors(folder).dtype == np.float32
    inside = slice(3, None)
    np.testing.assert_allclose(vectors(folder)[inside], COLORS[inside] / 255, atol=0.02)
    # At the slide's edge the disc is mirrored, so its colour stands on both sides.
    np.testing.assert_allclose(vectors(folder)[:3], COLORS[:3] / 255, atol=0.02)
    assert record.weights[-1].id == "fake-muse"
    assert read_record(folder) is not None and read_record(folder).config["embed"]["zarr"]["field_px"] == "128"
    with open_table(folder / "cells.zarr") as table:
        assert table.run.config["embed"] == record.config["embed"] and len(table) == len(CENTRES)


def test_each_nucleus_lies_in_the_middle_of_its_window(slide: Slide) -> None:
    windows = embedder().lay_windows(slide, CENTRES)
    assert sorted(np.concatenate(windows.rows).tolist()) == list(range(len(CENTRES)))
    for corner, rows in zip(windows.corner, windows.rows, strict=True):
        inside = windows.centre[rows] - corner
        assert (inside >= 32).all() and (inside < 96).all()


@pytest.fixture(scope="module")
def network() -> MuseBackbone:
    torch.manual_seed(0)
    sizes = {"encoder": {"name": "vit", "embed_dim": 32, "depth": 4, "heads": 2}, "extract_layers": [0, 1, 2, 3]}
    return MuseBackbone(MuseConfig.of({**sizes, "img_size": 64})).eval()


def test_company_changes_nothing(network: MuseBackbone) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (200, 300, 3), dtype=np.uint8)
    xy = rng.uniform(0, (300, 200), (40, 2))
    reader = embedder(fake_muse(network, tile_px=64), batch=4)
    every = embed_array(reader, image, 0.5, xy)
    some = rng.permutation(40)[:15]
    np.testing.assert_array_equal(embed_array(reader, image, 0.5, xy[some]), every[some])
    other_batch = embed_array(embedder(fake_muse(network, tile_px=64), batch=7), image, 0.5, xy)
    np.testing.assert_allclose(other_batch, every, rtol=1e-4, atol=1e-5)
    assert every.shape == (40, network.dim) and np.ptp(every, axis=0).min() > 0


def test_another_pixel_size_reads_the_same_places(slide: Slide, folder: Path) -> None:
    embed_slide(folder, slide, embedder(read_mpp=0.25, field_px=256))
    np.testing.assert_allclose(vectors(folder)[3:], COLORS[3:] / 255, atol=0.03)


def test_done_is_skipped_and_other_settings_are_refused(slide: Slide, folder: Path) -> None:
    embed_slide(folder, slide, embedder())
    before = vectors(folder)
    module = FakeMuse()
    assert embed_slide(folder, slide, embedder(fake_muse(module)))[1] and module.asked == []
    with pytest.raises(UsageError, match="field_px.*--overwrite"):
        embed_slide(folder, slide, embedder(field_px=64))
    assert not embed_slide(folder, slide, embedder(field_px=64, overwrite=True))[1]
    np.testing.assert_allclose(vectors(folder)[3:], before[3:], atol=0.05)


def test_vectors_of_the_detector_are_not_lost_in_silence(slide: Slide, folder: Path) -> None:
    embed_slide(folder, slide, embedder())
    record = read_record(folder)
    assert record is not None
    (folder / "run.json").unlink()
    with open_table(folder / "cells.zarr") as table:
        foreign = replace(table.run, config={})
    from cellslide.store.run_record import write_record

    write_record(folder, foreign)
    with pytest.raises(UsageError, match="--overwrite"):
        embed_slide(folder, slide, embedder())
    assert not embed_slide(folder, slide, embedder(to="npz"))[1]


@pytest.mark.parametrize("to", ["parquet", "npz"])
def test_files_beside_the_table(slide: Slide, folder: Path, to: str) -> None:
    embed_slide(folder, slide, embedder(to=to))
    if to == "npz":
        with np.load(folder / "embedding.npz") as data:
            ids, found = data["cell_id"], data["embedding"]
    else:
        rows = pq.read_table(folder / "embedding.parquet")
        ids, found = rows["cell_id"].to_numpy(), np.stack(rows["embedding"].to_numpy())
    assert ids.tolist() == list(range(len(CENTRES)))
    np.testing.assert_allclose(found[3:], COLORS[3:] / 255, atol=0.02)
    with open_table(folder / "cells.zarr") as table:
        assert "embedding" not in table.matrices
    assert embed_slide(folder, slide, embedder(to=to))[1], "it is there already"


@pytest.mark.parametrize("to", ["zarr", "parquet", "npz"])
def test_a_slide_without_cells_has_its_vectors_too(slide: Slide, tmp_path: Path, to: str) -> None:
    none = np.zeros(0, np.float32)
    out = _table(tmp_path / "s", slide, Cells(np.zeros((0, 2)), none.astype(int), none.astype(int), none, none))
    assert not embed_slide(out, slide, embedder(to=to))[1]
    assert embed_slide(out, slide, embedder(to=to))[1], "it is there already"
    if to == "parquet":
        assert pq.read_table(out / "embedding.parquet").num_rows == 0


def test_goes_on_where_it_stopped(slide: Slide, folder: Path) -> None:
    embed_slide(folder, slide, embedder(to="npz"))
    left = iter([None, None, 130])
    with pytest.raises(Interrupted):
        embed_slide(folder, slide, embedder(batch=1), Watch(stop=lambda: next(left)))
    assert (folder / ".embed").is_dir()
    with pytest.raises(UsageError, match="field_px.*--overwrite"):
        embed_slide(folder, slide, embedder(field_px=64))
    first, again = FakeMuse(), FakeMuse()
    embed_slide(folder, slide, embedder(fake_muse(again), batch=1))
    embed_slide(folder, slide, embedder(fake_muse(first), batch=1, overwrite=True))
    assert 0 < len(again.asked) == len(first.asked) - 3
    with np.load(folder / "embedding.npz") as data:
        np.testing.assert_array_equal(vectors(folder), data["embedding"])
    assert not (folder / ".embed").exists()


def test_memory_that_runs_out_halves_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    image = np.full((300, 300, 3), 200, np.uint8)
    xy = np.random.default_rng(0).uniform(0, 300, (50, 2))
    caplog.set_level("WARNING", "cellslide")
    module = FakeMuse(fits=2)
    np.testing.assert_allclose(embed_array(embedder(fake_muse(module), batch=8), image, 0.5, xy), 200 / 255, atol=1e-6)
    assert module.asked[:3] == [8, 4, 2] and "--batch-size 2" in caplog.text
    with pytest.raises(CellslideError, match="--field-px"):
        embed_array(embedder(fake_muse(FakeMuse(fits=0))), image, 0.5, xy)


def test_no_nuclei(tmp_path: Path) -> None:
    image = np.full((100, 100, 3), 200, np.uint8)
    assert embed_array(embedder(), image, 0.5, np.zeros((0, 2))).shape == (0, 3)
    assert len(embedder().lay_windows(slide_from_array(image, 0.5), np.zeros((0, 2)))) == 0


def test_settings_out_of_range_name_their_flag() -> None:
    with pytest.raises(UsageError, match="--field-px"):
        EmbedConfig(field_px=100)
    with pytest.raises(UsageError, match="--read-mpp"):
        EmbedConfig(read_mpp=9.0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["embed", *map(str, arguments), "--device", "cpu", "--no-progress"])


def test_command(painted: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.weights.muse.load_muse", lambda *args: fake_muse())
    result = run(folder)
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(vectors(folder)[3:], COLORS[3:] / 255, atol=0.02)
    cells = tmp_path / "cells.csv"
    cells.write_text("x,y\n" + "".join(f"{x},{y}\n" for x, y in CENTRES[3:]))
    result = run(painted, "-o", tmp_path / "other", "--cells", cells)
    assert result.exit_code == 0, result.output
    assert len(vectors(tmp_path / "other" / "s")) == len(CENTRES) - 3
    assert run(painted, "-o", tmp_path / "none").exit_code == 2
    assert "--field-px 100" in run(folder, "--field-px", "100").output
