"""From a table of samples to genes: counted, trained, scored beside baselines, mapped; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")

from cellslide.api import evaluate_genes, predict_genes
from cellslide.cli.main import cli
from cellslide.errors import UsageError
from cellslide.genes.maps import GeneMap
from cellslide.genes.network import Reader, open_network, predict
from cellslide.genes.samples import fold_of, read_samples
from cellslide.genes.scores import MinMae, recall_at, score_genes
from cellslide.genes.tiles import GeneTiles, TileShape
from cellslide.genes.tokens import TokenGrid, count_tokens
from cellslide.slides.slide import open_slide
from cellslide.store.foreign_files import read_yaml
from cellslide.types import Plane
from cellslide.xenium.alignment import read_alignment
from cellslide.xenium.bundle import Bundle
from tests.support.fusion_samples import GENES, MPP, SIZE_PX, paint_sample, write_samples

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
RECIPE: dict[str, Any] = {
    "id": "toy-fusion", "mpp": 1.0, "stride": 4, "min_transcripts": 1,
    "source_panel": ["H", "P"], "target_panel": ["B", "D"],
    "batch_size": 16, "epochs": 7, "epoch_samples": 256, "patience": 0, "precision": "fp32", "flips": True,
    "model": {"vit": "vit_tiny_patch16_224", "vit_args": VIT, "token_head": True},
    "optim": {"lr": 3.0e-3, "backbone_lr": 1.5e-3, "warmup_steps": 8},
}  # fmt: skip


def _cli(*args: object) -> str:
    found = CliRunner().invoke(cli, [str(a) for a in args], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def _recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({**RECIPE, **changes}))
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fusion")
    return write_samples(folder, ("train", "train", "train", "train", "val", "test", "test"))


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    _cli("train", "fusion", table, "--recipe", _recipe(folder), "-o", folder / "run", "--workers", 0)
    return folder / "run"


def test_tokens_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    made = paint_sample(tmp_path / "s", 5)
    bundle = Bundle(made.bundle)
    alignment = read_alignment(made.bundle / "he_imagealignment.csv", bundle.pixel_size)
    with open_slide(made.slide, mpp=MPP) as slide:
        grid = TokenGrid(Plane.of(slide.info, 1.5), 10)
    counted = count_tokens(bundle, alignment, grid).toarray()
    plain = np.zeros_like(counted)
    for block in bundle.transcripts():
        for x, y, gene, qv in zip(block.x_um, block.y_um, block.gene, block.qv, strict=True):
            (px, py) = alignment.to_slide(np.array([[x, y]]))[0] / 1.5
            col, row = int(np.floor(px / 10)), int(np.floor(py / 10))
            if gene >= 0 and qv >= 20 and 0 <= col < grid.n_cols and 0 <= row < grid.n_rows:
                plain[row * grid.n_cols + col, gene] += 1
    assert counted.sum() > 500
    assert np.array_equal(counted, plain)


def test_squares_and_sums_share_one_grid(table: Path, tmp_path: Path) -> None:
    sample = read_samples(table)[0]
    shape = TileShape(1.0, 48, 8, 3)
    tiles = GeneTiles(sample, shape, tmp_path)
    assert tiles.tokens is not None
    every = np.arange(len(GENES))
    for k in (0, 7, len(tiles.grid) - 1):
        x0, y0 = tiles.grid.tile(k).read_xyxy[:2]
        found = tiles.counts(k, every)
        row, col = divmod(k, tiles.grid.n_cols)
        assert found.sum() == tiles.tokens.sums(shape.edge, shape.stride)[row, col]
        assert (x0, y0) == (col * 24, row * 24)
        assert found.shape == (36, len(GENES))
    assert tiles.tokens.sums(6, 3).shape == (tiles.grid.n_rows, tiles.grid.n_cols)
    assert len(list(tmp_path.iterdir())) == 1, "counted once"
    GeneTiles(sample, shape, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    GeneTiles(sample, replace(shape, patch_px=16), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "another grid is counted anew"


def test_a_network_learns_what_no_source_tells(table: Path, run: Path, tmp_path: Path) -> None:
    """B is of dark cells, which neither H nor P counts: the picture must have been read."""
    report = evaluate_genes(table, weights=run, min_transcripts=1, split="test")
    assert report.scores is not None
    assert (report.slides, report.patients, report.counted_times) == (2, 2, 1)
    assert report.tiles == report.scores.n_tiles > 100
    found = report.scores.by_gene["B"]["spearman"]
    assert found is not None and found > 0.75
    density = report.baselines["density"].by_gene["B"]["spearman"]
    assert density is not None and found > density + 0.1
    output = _cli("evaluate", table, "--weights", run, "--min-transcripts", 1, "--json", tmp_path / "g.json")
    assert "min_mae" in output
    assert json.loads((tmp_path / "g.json").read_text())["scores"]["spearman"] == pytest.approx(report.scores.spearman)


def test_the_same_whatever_the_batch(table: Path, run: Path, tmp_path: Path) -> None:
    network = open_network(None, run)
    tiles = GeneTiles(read_samples(table)[-1], network.shape, tmp_path)
    found = [np.concatenate([p.y for p in predict(Reader(network, tiles), tiles.kept, n)]) for n in (7, 64)]
    assert np.abs(found[0] - found[1]).max() < 1e-5


def test_maps_of_a_slide(table: Path, run: Path, tmp_path: Path) -> None:
    sample = read_samples(table)[-1]
    counts = predict_genes(
        sample.slide, tmp_path, weights=run, transcripts=sample.bundle, alignment=sample.alignment, mpp=MPP,
        level="token",
    )  # fmt: skip
    assert counts.scores is not None and counts.scores.spearman is not None and counts.scores.spearman > 0.6
    folder = tmp_path / sample.slide.stem
    assert "rank correlation" in (folder / "genes.html").read_text()
    root: Any = zarr.open_group(folder / "genes.zarr", mode="r")
    tokens = root["images/predicted_tokens/s0"][:]
    assert tokens.shape == (2, SIZE_PX // 8, SIZE_PX // 8)
    assert root["images/predicted/s0"].shape == (2, SIZE_PX // 32, SIZE_PX // 32)
    spatialdata = pytest.importorskip("spatialdata", reason="needs the extra spatial")
    image = spatialdata.read_zarr(folder / "genes.zarr").images["true"]
    assert list(image.coords["c"].values) == ["B", "D"]
    from spatialdata.transformations import get_transformation

    matrix = get_transformation(image).to_affine_matrix(("x", "y"), ("x", "y"))
    assert np.allclose(matrix @ (0.5, 0.5, 1), (16, 16, 1))


def test_a_map_is_read_between_centres() -> None:
    values = np.array([[[0.0, 2.0], [4.0, np.nan]]], np.float32)
    found = GeneMap(values, (10.0, 10.0), (20.0, 20.0)).at(np.array([[10.0, 10], [20, 10], [20, 20], [90, 90]]))
    assert found[:3, 0].tolist() == pytest.approx([0.0, 1.0, 2.0])
    assert np.isnan(found[3, 0])


def test_what_is_missing_is_named(table: Path, run: Path, tmp_path: Path) -> None:
    sample = read_samples(table)[0]
    with pytest.raises(UsageError, match=r"--transcripts.*H, P"):
        predict_genes(sample.slide, tmp_path, weights=run, mpp=MPP)
    with pytest.raises(UsageError, match="--weights"):
        predict_genes(sample.slide, tmp_path, mpp=MPP)
    entry = read_yaml(run / "model.yaml", UsageError)
    entry["config"]["genes_in"] = ["H", "MISSING1"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    (other / "model.yaml").write_text(json.dumps(entry))
    given: Any = {"weights": other, "transcripts": sample.bundle, "alignment": sample.alignment, "mpp": MPP}
    with pytest.raises(UsageError, match=r"MISSING1.*--missing-genes zero"):
        predict_genes(sample.slide, tmp_path, **given)
    assert predict_genes(sample.slide, tmp_path, zero_missing=True, **given).genes == 2


def test_tables_that_cannot_be(table: Path, tmp_path: Path) -> None:
    rows = table.read_text().splitlines()
    for text, word in (
        (rows[0].replace("bundle", "outs"), "no column bundle"),
        (rows[0], "no samples"),
        ("\n".join([rows[0], rows[1].replace("s0/slide0.png", "none.png")]), "no such slide"),
        ("\n".join([rows[0], rows[1], rows[5].replace("P4", "P0")]), "P0 is in two splits"),
        ("\n".join([rows[0], rows[1][:-3] + "x"]), "no number"),
    ):
        wrong = table.parent / "wrong.csv"
        wrong.write_text(text + "\n")
        with pytest.raises(UsageError, match=word):
            read_samples(wrong)


def test_folds_part_patients(table: Path) -> None:
    samples = read_samples(table)
    seen = []
    for k in (1, 2, 3):
        split = fold_of(samples, k, 3)
        seen += [s.patient for s in split if s.split == "test"]
        assert {s.split for s in split} == {"train", "val", "test"}
    assert sorted(seen) == sorted(s.patient for s in samples)
    with pytest.raises(UsageError, match="--fold"):
        fold_of(samples, 1, 9)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"target_panel": ["B", "NOPE"]}, "NOPE"),
        ({"target_panel": []}, "target_panel"),
        ({"target_panel": ["B", "H"]}, "source_panel and in target_panel"),
        ({"stride": 9}, "stride"),
        ({"min_transcripts": 10**6}, "min_transcripts"),
    ],
)
def test_recipes_that_cannot_be(table: Path, tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    args = ["train", "fusion", table, "--recipe", _recipe(tmp_path, **changes), "-o", tmp_path / "r", "--workers", 0]
    found = CliRunner().invoke(cli, [str(a) for a in args])
    assert found.exit_code == 2
    assert word in found.output


def test_targets_by_variation(table: Path, tmp_path: Path) -> None:
    pytest.importorskip("skmisc", reason="needs the extra spatial")
    args = ("--max-steps", 1, "--workers", 0, "-o", tmp_path / "r")
    _cli("train", "fusion", table, "--recipe", _recipe(tmp_path, target_panel="hvg:2", source_panel=[]), *args)
    recipe = read_yaml(tmp_path / "r" / "recipe.yaml", UsageError)
    assert len(recipe["target_panel"]) == 2
    assert sorted([*recipe["source_panel"], *recipe["target_panel"]]) == sorted(GENES)
    assert set(recipe["target_panel"]) <= {"B", "D", "P"}


def test_contrast_and_what_begins_with_it(table: Path, tmp_path: Path) -> None:
    model = {"variant": "late_add_token", "vit": "vit_tiny_patch16_224", "vit_args": VIT}
    common = {"model": model, "epochs": 4, "source_panel": ["D", "H", "P"]}
    clip = _recipe(tmp_path, **common, target_panel=[], id="toy-clip", monitor="val/recall@1")
    _cli("pretrain", "clip", table, "--recipe", clip, "-o", tmp_path / "clip", "--workers", 0)
    report = evaluate_genes(table, weights=tmp_path / "clip", min_transcripts=1)
    assert report.recall["pool"] == report.tiles
    assert report.recall["recall@5"] > 2 * 5 / report.tiles
    tuned = _recipe(tmp_path, **{**common, "model": {**model, "variant": "late_concat_token"}}, target_panel=["B"])
    args = ("--init", tmp_path / "clip", "--max-steps", 1, "--workers", 0, "-o", tmp_path / "tuned")
    _cli("train", "fusion", table, "--recipe", tuned, *args)
    found = CliRunner().invoke(cli, ["genes", str(read_samples(table)[0].slide), "--weights", str(tmp_path / "clip"),
                                      "-o", str(tmp_path), "--mpp", "1", "--transcripts",
                                      str(read_samples(table)[0].bundle), "--alignment",
                                      str(read_samples(table)[0].alignment)])  # fmt: skip
    assert found.exit_code == 2 and "predicts no genes" in found.output


def test_scores_are_those_of_plain_forms() -> None:
    rng = np.random.default_rng(0)
    true = rng.random((40, 3)).astype(np.float32)
    pred = (true + 0.2 * rng.random((40, 3))).astype(np.float32)
    true[:, 2] = 1.0
    scores = score_genes(pred, true, np.repeat([0, 1], 20), ["a", "b", "c"])
    from scipy.stats import pearsonr, spearmanr

    assert scores.constant == ("c",)
    assert scores.by_gene["a"]["spearman"] == pytest.approx(spearmanr(pred[:, 0], true[:, 0])[0])
    assert scores.spearman == pytest.approx(np.mean([spearmanr(pred[:, k], true[:, k])[0] for k in (0, 1)]))
    assert scores.pearson == pytest.approx(np.mean([pearsonr(pred[:, k], true[:, k])[0] for k in (0, 1)]), abs=1e-6)
    x = rng.random((40, 5)).astype(np.float32)
    baseline = MinMae(5, 3)
    baseline.add(x[:25], true[:25])
    baseline.add(x[25:], true[25:])
    wanted = [int(np.abs(x - true[:, [t]]).mean(0).argmin()) for t in range(3)]
    assert np.array_equal(baseline.predict(x), x[:, wanted])
    z = np.eye(6, dtype=np.float32)
    assert recall_at(z, z, 6) == {"recall@1": 1.0, "recall@5": 1.0}
    assert recall_at(z, z[::-1].copy(), 6)["recall@1"] == pytest.approx(0.0)


def test_info_nce_is_that_of_the_plain_form() -> None:
    import torch

    from cellslide.train.fusion.training import info_nce

    rng = np.random.default_rng(0)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.normal(size=(2, 5, 4)))
    logits = 10 * a @ b.T
    rows, cols = (np.log(np.exp(m).sum(1)) - np.diag(m) for m in (logits, logits.T))
    found = info_nce(torch.from_numpy(a), torch.from_numpy(b), torch.tensor(10.0))
    assert float(found) == pytest.approx((rows.mean() + cols.mean()) / 2)


def test_a_network_without_an_image_is_scored_on_the_tiles_it_learned_from(table: Path, tmp_path: Path) -> None:
    model = {**RECIPE["model"], "variant": "expr_only_token", "token_head": False}
    args = ("--max-steps", 1, "--workers", 0, "-o", tmp_path / "r")
    _cli("train", "fusion", table, "--recipe", _recipe(tmp_path, model=model), *args)
    assert open_network(None, tmp_path / "r").shape == TileShape(1.0, 32, 8, 4)
