"""The whole flow on painted slides with fake networks: exact, whatever tiles, batches, workers and interruptions."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cellslide.batch.run import SlideOutcome, StopOnSignal, exit_code, in_shard
from cellslide.batch.work import do_slide
from cellslide.classify.targets import Target
from cellslide.config import InferConfig, OutputConfig, SegmentConfig, TileConfig, TissueConfig
from cellslide.errors import CellslideError, Interrupted, SlideError, TileError, UsageError
from cellslide.inference.search import lay_out
from cellslide.inference.segmenter import Segmenter, open_segmenter, resolve_tiles
from cellslide.inference.torch_engine import TorchEngine
from cellslide.models.cellvta import CellVTA
from cellslide.pipeline import segment_array, segment_slide
from cellslide.progress import IDLE, Silent, Watch
from cellslide.slides.inputs import SlideInput
from cellslide.slides.slide import Slide, slide_from_array
from cellslide.store.cell_table import CellTable, open_table
from cellslide.types import Cells, Plane, RunRecord, UInt8
from cellslide.weights import LoadedModel
from tests.inference.test_torch_engine import TINY
from tests.painted import DISC, PINK_DISC, PaintedSlide, paint_slide
from tests.support.fakes import CLASSES, FakeMask, fake_model

BASE = SegmentConfig(
    tissue=TissueConfig(enabled=False),
    infer=InferConfig(device="cpu", workers=0, batch_size=2),
    output=OutputConfig(formats=("zarr",)),
)
# Own boxes of tiles of 256, 512 and 1024 px with an overlap of 64 px meet here.
SEAMS = (224, 416, 480, 608, 800, 928, 992)


def centres(width: int, height: int, scale: float = 1.0) -> np.ndarray:
    """Return places (N, 2) of discs in level-0 pixels: on seams and their crossings, borders, corners, and between."""
    seams = [(x, y) for x in SEAMS for y in SEAMS]
    near = [(x + 16.25, y + 17.5) for x in SEAMS[::2] for y in (60, 300, 700)]
    rim = [
        (0.0, 30.0),
        (30.0, 0.0),
        (width, 100.0),
        (100.0, height),
        (0.0, 0.0),
        (width - 5, height - 5),
        (width - 4, 5.0),
    ]
    rng = np.random.default_rng(1)
    places = [(x * scale, y * scale) for x, y in seams + near] + rim
    for x, y in rng.uniform(0, (width, height), (300, 2)):
        if min((x - a) ** 2 + (y - b) ** 2 for a, b in places) > (22 * scale) ** 2:
            places.append((x, y))
    return np.array([p for p in places if p[0] <= width and p[1] <= height])


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> PaintedSlide:
    path = tmp_path_factory.mktemp("slides") / "seams.tif"
    places = centres(1101, 803)
    return paint_slide(
        path, 1101, 803, 0.5, places, 7.0, disc_color=[(DISC, PINK_DISC)[k % 2] for k in range(len(places))]
    )


def source(path: Path) -> SlideInput:
    return SlideInput(path, slide_id=path.stem)


def segment(
    path: Path, out: Path, config: SegmentConfig = BASE, model: LoadedModel | None = None, watch: Watch = IDLE
) -> tuple[RunRecord, CellTable]:
    with open_segmenter(model or fake_model(), config) as segmenter:
        record, _ = segment_slide(source(path), segmenter, out, watch)
    return record, open_table(out / path.stem / "cells.zarr")


def segment_slides(sources: list[SlideInput], segmenter: Segmenter, out: Path) -> Iterator[SlideOutcome]:
    """Yield how each slide of a run ends."""
    return (do_slide(Target(source, out / source.slide_id), segmenter, None) for source in sources)


def columns(table: CellTable) -> dict[str, np.ndarray]:
    """Return what a table says of its cells, in the order of their places, without what names tiles or rows."""
    (chunk,) = table.iter_chunks(1 << 20)
    cells = chunk.cells
    order = np.lexsort((cells.centroid_xy[:, 0], cells.centroid_xy[:, 1]))
    cells = cells.take(order)
    found = {
        "uuid": chunk.uuid[order].astype(str),
        "xy": cells.centroid_xy,
        "score": cells.score,
        "area": cells.area_um2,
    }
    optional = {"prob": cells.class_prob, "ring": cells.contour_xy, "start": cells.contour_start, "box": cells.box_xyxy}
    return found | {name: column for name, column in optional.items() if column is not None}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def visible(slide: PaintedSlide) -> np.ndarray:
    """Return (N, 2) the middle of each disc's pixels, in level-0 pixels, of discs that show at least 10 pixels."""
    found = []
    for k in range(len(slide.centres_xy)):
        rows, cols = np.nonzero(slide.labels == k + 1)
        if len(rows) >= 10:
            found.append((cols.mean() + 0.5, rows.mean() + 0.5))
    return np.array(found)


def test_every_disc_is_found_once_where_it_was_painted(slide: PaintedSlide, tmp_path: Path) -> None:
    record, table = segment(slide.path, tmp_path, model=fake_model(classes=CLASSES))
    expected, (chunk,) = visible(slide), table.iter_chunks(1 << 20)
    assert table.n == len(expected) == record.counts.nuclei > 100
    gap = np.abs(chunk.cells.centroid_xy[:, None] - expected[None]).max(axis=2)
    assert (gap.min(axis=0) < 0.51).all() and (gap.min(axis=1) < 0.51).all()
    nearest = gap.argmin(axis=1)
    pixels = np.bincount(slide.labels.ravel())[1:]
    np.testing.assert_allclose(chunk.cells.area_um2, pixels[pixels >= 10][nearest] * 0.25, rtol=1e-6)
    painted = [table.class_names[k] for k in chunk.class_index]
    rows, cols = np.rint(expected[nearest].T[::-1] - 0.5).astype(int).clip(0, [[802], [1100]])
    blue = (slide.image[rows, cols] == DISC).all(axis=1)
    assert painted == ["blue" if b else "pink" for b in blue] and 0 < blue.sum() < len(blue)


@pytest.mark.parametrize("size", [512, 1024])
def test_tile_size_changes_nothing(slide: PaintedSlide, tmp_path: Path, size: int) -> None:
    _, small = segment(slide.path, tmp_path / "256")
    _, large = segment(slide.path, tmp_path / "large", replace(BASE, tiles=TileConfig(size)))
    assert_same(columns(small), columns(large))


@pytest.mark.parametrize(("mpp", "scale"), [(0.25, 2.0), (0.37, 0.5 / 0.37), (0.8, 0.625)])
def test_tile_size_changes_nothing_on_resampled_slides(tmp_path: Path, mpp: float, scale: float) -> None:
    width, height = int(701 * scale), int(533 * scale)
    path = tmp_path / "resampled.tif"
    painted = paint_slide(path, width, height, mpp, centres(width, height, scale), 7.0 * scale, (1, 4))
    _, small = segment(path, tmp_path / "256")
    _, large = segment(path, tmp_path / "512", replace(BASE, tiles=TileConfig(512)))
    assert_same(columns(small), columns(large))
    gap = np.abs(columns(small)["xy"][:, None] - visible(painted)[None]).max(axis=2)
    inner = (visible(painted) > 8 * scale).all(axis=1) & (
        visible(painted) < (width - 8 * scale, height - 8 * scale)
    ).all(axis=1)
    assert inner.sum() > 30 and (gap.min(axis=0)[inner] < scale).all()


@pytest.mark.parametrize("kind", ["box", "point"])
def test_tile_size_changes_nothing_for_boxes_and_points(slide: PaintedSlide, tmp_path: Path, kind: str) -> None:
    _, small = segment(slide.path, tmp_path / "256", model=fake_model(kind))
    _, large = segment(slide.path, tmp_path / "512", replace(BASE, tiles=TileConfig(512)), fake_model(kind))
    assert small.n == len(visible(slide))
    if kind == "box":
        assert_same(columns(small), columns(large))
    else:
        # A point says nothing of the disc's size, so one cut by a tile's edge in the band may be placed differently.
        np.testing.assert_allclose(columns(small)["xy"], columns(large)["xy"], atol=7)


def test_batch_and_workers_change_nothing(slide: PaintedSlide, tmp_path: Path) -> None:
    _, one = segment(slide.path, tmp_path / "a")
    for name, batch, workers in (("b", 1, 0), ("c", 7, 2)):
        infer = InferConfig(device="cpu", workers=workers, batch_size=batch)
        _, other = segment(slide.path, tmp_path / name, replace(BASE, infer=infer))
        assert_same(columns(one), columns(other))
        (a,), (b,) = one.iter_chunks(1 << 20), other.iter_chunks(1 << 20)
        np.testing.assert_array_equal(a.cells.centroid_xy, b.cells.centroid_xy)  # the order of ids too


class StopAfter(Silent):
    """Asks for a stop once `tiles` tiles are done, and counts the tiles of the whole run."""

    def __init__(self, tiles: int) -> None:
        self.tiles, self.seen, self.begun = tiles, 0, (0, 0)

    def begin(self, slide_id: str, tiles: int, done: int) -> None:
        self.begun = (tiles, done)

    def advance(self, nuclei: int) -> None:
        self.seen += 1

    def stop(self) -> int | None:
        return 143 if self.seen >= self.tiles else None


def test_an_interrupted_slide_goes_on_and_ends_the_same(slide: PaintedSlide, tmp_path: Path) -> None:
    _, whole = segment(slide.path, tmp_path / "whole")
    folder = tmp_path / "parts" / "seams"
    done = 0
    for _ in range(3):
        hears = StopAfter(4)
        with pytest.raises(Interrupted) as stopped:
            segment(slide.path, tmp_path / "parts", watch=Watch(hears, hears.stop))
        assert stopped.value.exit_code == 143
        assert hears.begun == (24, done) and hears.seen == 4
        done += 4
        assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
        assert not (folder / "cells.zarr").exists() and (folder / ".parts").is_dir()
    hears = StopAfter(99)
    record, table = segment(slide.path, tmp_path / "parts", watch=Watch(hears, hears.stop))
    assert hears.begun == (24, 12) and hears.seen == 12
    assert_same(columns(whole), columns(table))
    assert record.counts.tiles == 24 and not (folder / ".parts").exists()
    assert sorted(p.name for p in folder.iterdir()) == ["cells.zarr", "run.json", "tissue.geojson"]


def test_a_complete_slide_is_skipped_and_missing_formats_are_made(slide: PaintedSlide, tmp_path: Path) -> None:
    first, _ = segment(slide.path, tmp_path)
    stamp = (tmp_path / "seams" / "run.json").stat().st_mtime_ns
    again, _ = segment(slide.path, tmp_path, replace(BASE, infer=replace(BASE.infer, batch_size=5)))
    assert again == first and (tmp_path / "seams" / "run.json").stat().st_mtime_ns == stamp
    segment(slide.path, tmp_path, replace(BASE, output=OutputConfig(formats=("zarr", "csv"))))
    assert (tmp_path / "seams" / "cells.csv.gz").is_file()
    # The record lists the new file, and says nothing else than before.
    record = json.loads((tmp_path / "seams" / "run.json").read_text())
    assert "cells.csv.gz" in [entry["name"] for entry in record["files"]] and record["finished"] == first.finished


def test_other_settings_are_refused_unless_overwritten(slide: PaintedSlide, tmp_path: Path) -> None:
    segment(slide.path, tmp_path)
    other = replace(BASE, tiles=TileConfig(512))
    with pytest.raises(UsageError, match=r"config\.tiles\.size_px.*--overwrite"):
        segment(slide.path, tmp_path, other)
    assert json.loads((tmp_path / "seams" / "run.json").read_text())["config"]["tiles"]["size_px"] == 256
    anew = replace(other, output=replace(other.output, overwrite=True))
    assert segment(slide.path, tmp_path, anew)[0].config["tiles"]["size_px"] == 512
    with pytest.raises(UsageError, match="weights.0.sha256"):
        segment(slide.path, tmp_path, other, fake_model(weights_sha256="1" * 64))


def test_parts_of_other_settings_are_refused_before_anything_is_touched(slide: PaintedSlide, tmp_path: Path) -> None:
    hears = StopAfter(2)
    with pytest.raises(Interrupted):
        segment(slide.path, tmp_path, watch=Watch(hears, hears.stop))
    before = (tmp_path / "seams" / "run.json").read_text()
    with pytest.raises(UsageError, match="--overwrite"):
        segment(slide.path, tmp_path, replace(BASE, tiles=TileConfig(512)))
    assert (tmp_path / "seams" / "run.json").read_text() == before


def test_the_record_says_what_was_done(slide: PaintedSlide, tmp_path: Path) -> None:
    record, table = segment(slide.path, tmp_path, replace(BASE, infer=replace(BASE.infer, seed=7)))
    content = json.loads((tmp_path / "seams" / "run.json").read_text())
    assert content["status"] == "done" and content["seed"] == 7 and content["device"] == "cpu"
    assert content["counts"] == {
        "tiles": 24,
        "tiles_empty": 0,
        "tiles_failed": 0,
        "tiles_missing": 0,
        "nuclei_raw": record.counts.nuclei_raw,
        "nuclei": table.n,
        "rejected": 0,
        "abstained": 0,
    }
    assert content["batch_size"] == {"tiles": 2, "local": None, "context": None}
    assert content["searched_mm2"] == pytest.approx(1101 * 803 * 0.25 / 1e6, abs=1e-6)
    assert record.counts.nuclei_raw > table.n
    assert (content["slide"]["width"], content["slide"]["height"], content["slide"]["mpp"]) == (1101, 803, 0.5)
    assert content["config"]["tiles"] == {"size_px": 256, "overlap_px": 64}
    assert content["config"]["spec"]["mpp"] == 0.5
    assert content["weights"] == [{"id": "fake", "sha256": "0" * 64, "licence": "Apache-2.0"}]
    assert content["started"] <= content["finished"] and content["peak_rss_bytes"] > 10 << 20
    seconds = content["seconds"]
    assert all(seconds[name] > 0 for name in ("read", "infer", "decode", "merge", "write", "total"))
    assert seconds["classify"] == 0 and table.run.counts == record.counts


@pytest.fixture
def torn(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Make tiles fail to read, by the x of their box; returns the set, which a test may change."""
    broken = {192}
    whole = Slide.read_plane

    def read(self: Slide, plane: Plane, xyxy: tuple[int, int, int, int]) -> UInt8:
        if xyxy[0] in broken and xyxy[2] - xyxy[0] == 256:
            raise TileError("bad block")
        return whole(self, plane, xyxy)

    monkeypatch.setattr(Slide, "read_plane", read)
    return broken


def test_failed_tiles_are_recorded_and_done_again_next_time(
    slide: PaintedSlide, tmp_path: Path, torn: set[int]
) -> None:
    record, partial = segment(slide.path, tmp_path)
    assert record.status == "done_with_errors" and record.counts.tiles_failed == 4
    assert [(t.x, t.y) for t in record.failed_tiles] == [(192, y) for y in (0, 192, 384, 576)]
    assert record.failed_tiles[0].error == "read: TileError: bad block"
    assert 0 < partial.n < len(visible(slide))
    torn.clear()
    hears = StopAfter(99)
    record, table = segment(slide.path, tmp_path, watch=Watch(hears, hears.stop))
    assert record.status == "done" and hears.begun == (24, 20) and table.n == len(visible(slide))
    assert record.failed_tiles == [] and not (tmp_path / "seams" / ".parts").exists()
    assert_same(columns(table), columns(segment(slide.path, tmp_path / "clean")[1]))


def test_a_slide_of_which_no_tile_can_be_done_fails(slide: PaintedSlide, tmp_path: Path, torn: set[int]) -> None:
    torn.update(range(0, 2000, 192))
    with pytest.raises(SlideError, match=f"{slide.path.name}.*bad block"):
        segment(slide.path, tmp_path)
    content = json.loads((tmp_path / "seams" / "run.json").read_text())
    assert content["status"] == "failed" and "not one of 24" in content["error"]


def test_a_slide_smaller_than_a_tile_and_one_pixel_more_than_one(tmp_path: Path) -> None:
    for name, width, height in (("small", 60, 41), ("remainder", 257, 256)):
        path = tmp_path / f"{name}.tif"
        painted = paint_slide(path, width, height, 0.5, [(20, 20), (width, height / 2)], 7.0, (1,))
        record, table = segment(path, tmp_path / "out")
        np.testing.assert_allclose(columns(table)["xy"], visible(painted)[[0, 1]], atol=0.51)
        assert record.counts.tiles == (1 if name == "small" else 2)


def test_a_slide_without_tissue_finishes_with_no_cells(tmp_path: Path) -> None:
    path = tmp_path / "blank.tif"
    paint_slide(path, 900, 700, 0.5)
    formats = replace(BASE, tissue=TissueConfig(), output=OutputConfig(formats=("zarr", "geojson", "csv", "parquet")))
    record, table = segment(path, tmp_path / "out", formats)
    assert record.status == "done" and record.counts.tiles == 0 and record.counts.nuclei == table.n == 0
    assert {"cells.zarr", "cells.geojson.gz", "cells.csv.gz", "cells.parquet", "run.json", "tissue.geojson"} <= {
        p.name for p in (tmp_path / "out" / "blank").iterdir()
    }
    assert segment(path, tmp_path / "out", formats)[0] == record


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> PaintedSlide:
    """A slide whose left half is tissue."""
    path = tmp_path_factory.mktemp("slides") / "half.tif"
    places = [(x, y) for x in range(60, 940, 40) for y in range(60, 900, 40)]
    return paint_slide(path, 2000, 900, 0.5, places, 7.0, background="tissue", tissue_xyxy=(0, 0, 1000, 900))


def test_only_tissue_is_searched_and_the_tiles_do_not_show(half: PaintedSlide, tmp_path: Path) -> None:
    everywhere, _ = segment(half.path, tmp_path / "all")
    record, small = segment(half.path, tmp_path / "256", replace(BASE, tissue=TissueConfig()))
    assert 0 < record.counts.tiles < everywhere.counts.tiles
    assert small.n == len(half.centres_xy)
    _, large = segment(half.path, tmp_path / "512", replace(BASE, tissue=TissueConfig(), tiles=TileConfig(512)))
    assert_same(columns(small), columns(large))


@pytest.mark.parametrize("size", [256, 512])
def test_a_region_of_interest_holds_exactly_its_nuclei(half: PaintedSlide, tmp_path: Path, size: int) -> None:
    roi = tmp_path / "roi.geojson"
    square = [[190, 110], [650, 110], [650, 490], [190, 490], [190, 110]]
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [square]}))
    config = replace(BASE, tissue=TissueConfig(enabled=False, roi=roi), tiles=TileConfig(size))
    record, table = segment(half.path, tmp_path, config)
    x, y = half.centres_xy.T
    assert table.n == ((x > 190) & (x < 650) & (y > 110) & (y < 490)).sum() > 50
    assert record.config["tissue"]["roi_sha256"] is not None
    roi.write_text(json.dumps({"type": "Polygon", "coordinates": [[[0, 0], [400, 0], [400, 300], [0, 300], [0, 0]]]}))
    with pytest.raises(UsageError, match="roi_sha256"):
        segment(half.path, tmp_path, config)


@pytest.mark.parametrize("in_part", [False, True])
def test_another_slide_of_the_name_is_refused_by_both_paths(tmp_path: Path, in_part: bool) -> None:
    for name, place in (("a", (100, 100)), ("b", (160, 100))):
        (tmp_path / name).mkdir()
        paint_slide(tmp_path / name / "s.tif", 300, 260, 0.5, [place], 7.0)
    segment(tmp_path / "a" / "s.tif", tmp_path / "out")
    if in_part:
        shutil.rmtree(tmp_path / "out" / "s" / "cells.zarr")
        (tmp_path / "out" / "s" / ".parts").mkdir()
    with pytest.raises(UsageError, match="another slide of this name") as refused:
        segment(tmp_path / "b" / "s.tif", tmp_path / "out")
    words = str(refused.value)
    assert all(str(tmp_path / name / "s.tif") in words for name in "ab") and "--overwrite" not in words


def test_an_array_gives_what_the_slide_gives(slide: PaintedSlide, tmp_path: Path) -> None:
    _, table = segment(slide.path, tmp_path)
    cells = segment_array(fake_model(), slide.image, 0.5, BASE)
    (chunk,) = table.iter_chunks(1 << 20)
    np.testing.assert_array_equal(cells.centroid_xy, chunk.cells.centroid_xy)
    np.testing.assert_array_equal(cells.contour_xy, chunk.cells.contour_xy)
    with open_segmenter(fake_model(), BASE) as segmenter:
        again = segment_array(segmenter, slide.image, 0.5, BASE)
    np.testing.assert_array_equal(cells.centroid_xy, again.centroid_xy)
    empty = segment_array(fake_model(classes=CLASSES), np.full((70, 50, 3), 240, np.uint8), 0.5, BASE)
    assert (
        isinstance(empty, Cells)
        and len(empty) == 0
        and empty.class_prob is not None
        and empty.class_prob.shape == (0, 2)
    )


def test_an_array_of_which_a_tile_fails_is_an_error(slide: PaintedSlide, torn: set[int]) -> None:
    with pytest.raises(TileError, match="bad block"):
        segment_array(fake_model(), slide.image, 0.5, BASE)


def test_a_real_network_differs_between_batches_by_rounding_only(slide: PaintedSlide) -> None:
    torch.manual_seed(3)
    module = CellVTA(TINY).eval()
    model = LoadedModel(fake_model(classes=CLASSES, tile_px=128, overlap_px=32).spec, module, entry=None)
    image = slide.image[:230, :300]
    one, four = (
        segment_array(model, image, 0.5, replace(BASE, infer=replace(BASE.infer, batch_size=b))) for b in (1, 4)
    )
    assert len(one) == len(four)
    np.testing.assert_allclose(one.centroid_xy, four.centroid_xy, atol=0.5)


def test_tiles_are_resolved_and_checked() -> None:
    spec = fake_model().spec
    assert resolve_tiles(spec, TileConfig()) == TileConfig(256, 64)
    assert resolve_tiles(spec, TileConfig(512)) == TileConfig(512, 64)
    with pytest.raises(UsageError, match="--tile-size 250: must be a multiple of 16"):
        resolve_tiles(spec, TileConfig(250))
    with pytest.raises(UsageError, match="--overlap 32 or less"):
        resolve_tiles(spec, TileConfig(64))


def test_small_planes_get_small_tiles_but_only_in_torch() -> None:
    with open_segmenter(fake_model(tile_px=1024), BASE) as segmenter:
        onnx = replace(segmenter, config=replace(segmenter.config, infer=InferConfig(engine="onnx")))
        small, long = (slide_from_array(np.zeros((*size, 3), np.uint8), 0.5) for size in ((200, 300), (20, 3000)))
        assert lay_out(small, segmenter).grid.size_px == 304
        assert lay_out(long, segmenter).grid.size_px == 1024
        assert lay_out(small, onnx).grid.size_px == 1024


@pytest.fixture
def three(slide: PaintedSlide, tmp_path: Path) -> list[SlideInput]:
    """Two good slides and, between them, a file that is no slide."""
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"II*\0 not a slide")
    small = tmp_path / "small.tif"
    paint_slide(small, 300, 200, 0.5, [(50, 50), (200, 100)], 7.0)
    return [source(slide.path), source(bad), source(small)]


def test_one_bad_slide_of_three_is_recorded_and_the_rest_goes_on(three: list[SlideInput], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_segmenter(fake_model(), BASE) as segmenter:
        outcomes = list(segment_slides(three, segmenter, out))
        again = list(segment_slides(three, segmenter, out))
    assert [o.status for o in outcomes] == ["done", "failed", "done"] and outcomes[2].cells == 2
    assert [o.status for o in again] == ["skipped", "failed", "skipped"] and again[2].cells == 2
    assert exit_code(outcomes) == 1 and outcomes[1].error is not None and "bad.tif" in outcomes[1].error
    content = json.loads((out / "bad" / "run.json").read_text())
    assert content["status"] == "failed" and content["error"] == outcomes[1].error
    assert content["slide"]["sha256_head"] and content["slide"]["mpp"] is None
    assert set(outcomes[0].to_json()) == {"slide", "status", "cells", "seconds", "error", "verdict"}


def test_a_failure_does_not_touch_what_was_done(slide: PaintedSlide, tmp_path: Path) -> None:
    segment(slide.path, tmp_path)
    with open_segmenter(fake_model(), replace(BASE, tiles=TileConfig(512))) as segmenter:
        (outcome,) = segment_slides([source(slide.path)], segmenter, tmp_path)
    assert outcome.status == "stale" and exit_code([outcome]) == 2
    assert json.loads((tmp_path / "seams" / "run.json").read_text())["status"] == "done"


def test_exit_codes() -> None:
    good, bad = SlideOutcome("a", "done", 1, 1.0), SlideOutcome("b", "failed", None, 1.0, "x", 1)
    usage = SlideOutcome("c", "failed", None, 1.0, "y", 2)
    assert [exit_code(o) for o in ([], [good], [good, bad], [usage], [usage, usage], [usage, good], [usage, bad])] == [
        0,
        0,
        1,
        2,
        2,
        1,
        1,
    ]


class NoDevice(FakeMask):
    """A network whose device is gone."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        raise CellslideError("device lost")


def test_an_error_of_the_network_fails_the_slide_with_its_words(slide: PaintedSlide, tmp_path: Path) -> None:
    model = LoadedModel(fake_model().spec, NoDevice(), entry=None)
    with open_segmenter(model, BASE) as segmenter:
        (outcome,) = segment_slides([source(slide.path)], segmenter, tmp_path)
    assert outcome.error == "device lost"
    assert json.loads((tmp_path / "seams" / "run.json").read_text())["error"] == "device lost"


def test_shards_partition_the_slides() -> None:
    ids = [f"slide-{i}" for i in range(200)]
    parts = [[s for s in ids if in_shard(s, (k, 3))] for k in (1, 2, 3)]
    assert sorted(sum(parts, [])) == sorted(ids) and all(40 < len(p) < 95 for p in parts)


def test_signals_ask_for_a_stop_and_handlers_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    monkeypatch.setattr("cellslide.batch.run.STOP_S", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    with StopOnSignal() as stop:
        assert stop() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped") as stopped, StopOnSignal():
        # Work that does not look whether it is to stop is stopped all the same.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert stopped.value.exit_code == 143
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_memory_that_runs_out_on_the_way_changes_nothing(slide: PaintedSlide, tmp_path: Path) -> None:
    from tests.support.fakes import HungryMask

    _, expected = segment(slide.path, tmp_path / "a")
    hungry = LoadedModel(fake_model().spec, HungryMask(fits=2), entry=None)
    _, table = segment(slide.path, tmp_path / "b", replace(BASE, infer=replace(BASE.infer, batch_size=8)), hungry)
    assert_same(columns(expected), columns(table))


def test_segmenter_is_usable_twice(slide: PaintedSlide, tmp_path: Path) -> None:
    config = replace(BASE, infer=replace(BASE.infer, workers=1))
    with open_segmenter(fake_model(), config) as segmenter:
        assert isinstance(segmenter, Segmenter) and isinstance(segmenter.engine, TorchEngine)
        a, _ = segment_slide(source(slide.path), segmenter, tmp_path / "a")
        b, _ = segment_slide(source(slide.path), segmenter, tmp_path / "b")
    assert a.counts == b.counts
