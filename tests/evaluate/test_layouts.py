"""Distributed data sets: what their readers give, scores that are known by hand, and files that are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cellslide.cli.main import cli
from cellslide.errors import UsageError
from cellslide.evaluate.dataset import Sample
from cellslide.evaluate.layouts.registry import open_dataset
from cellslide.evaluate.report import EvalReport
from cellslide.evaluate.score import Nuclei, truth_of
from cellslide.evaluate.scoring import Scoring
from tests.support.labelled import paint
from tests.support.layouts import (
    PLACES,
    SHAPE,
    drawn,
    write_conic,
    write_consep,
    write_monuseg,
    write_nuclass,
    write_nuinsseg,
    write_ocelot,
    write_pannuke,
    write_puma,
)

NEO, INF, EPI = "neoplastic", "inflammatory", "epithelial"


def scored(root: Path, protocol: str, split: str | None, found: dict[str, tuple[str, str]]) -> EvalReport:
    """Score images where `found` tells which discs are found, and as what."""

    def predict(sample: Sample, _: float) -> Nuclei:
        labels, names = drawn(found[sample.stem])
        nuclei = Nuclei.from_labels(labels)
        return Nuclei(nuclei.xy, labels, nuclei.label_id, tuple(names.values()))

    return Scoring.read(root, split, protocol).score("twin", predict)[0]


def test_pannuke_scores_by_image_tissue_and_class(tmp_path: Path) -> None:
    write_pannuke(tmp_path, 1, ["Breast", "Breast", "Colon", "Colon"], [(NEO, INF), (NEO, NEO), (EPI, ""), ("", "")])
    write_pannuke(tmp_path, 2, ["Skin"], [(NEO, INF)])
    found = {"fold1_00000": (NEO, INF), "fold1_00001": (NEO, ""), "fold1_00002": ("dead", ""), "fold1_00003": ("", "")}
    report = scored(tmp_path, "pannuke", "fold1", found)
    assert (report.n_images, report.n_nuclei, report.mpp, report.detection.radius_um) == (4, 5, 0.25, 3)
    s = report.instance
    # PQ of the images with nuclei: 1, one of two found 2/3, 1; with classes 1, 2/3, 0.
    assert s.bpq == pytest.approx(8 / 9, abs=1e-5) and s.mpq == pytest.approx(5 / 9, abs=1e-5)
    assert s.bpq_tissue == pytest.approx((5 / 6 + 1) / 2, abs=1e-5)
    assert s.mpq_tissue == pytest.approx((5 / 6 + 0) / 2, abs=1e-5)
    # Counts together: neoplastic 2 of 3, inflammatory 1 of 1, epithelial 0 of 1.
    assert s.mpq_pooled == pytest.approx((0.8 + 1 + 0) / 3, abs=1e-5)
    assert report.class_quality is not None and report.class_quality[NEO].pq == pytest.approx(5 / 6, abs=1e-5)
    assert report.class_quality["connective"].pq is None
    assert set(report.organs or ()) == {"Breast", "Colon"}
    # F_c of epithelial: the one nucleus has a wrong class, so 0; of neoplastic 2 TP / (2 TP + missed).
    assert report.classes is not None
    f1 = {c.name: c.f1 for c in report.classes}
    assert f1[EPI] == 0 and f1[NEO] == pytest.approx(4 / 5) and f1["connective"] is None


def test_pannuke_gives_pixels_and_a_class_to_every_nucleus(tmp_path: Path) -> None:
    write_pannuke(tmp_path, 3, ["Bile-duct"], [(INF, NEO)])
    (sample,) = open_dataset(tmp_path).samples
    assert (sample.split, sample.organ, sample.width, sample.height) == ("fold3", "Bile-duct", *SHAPE[::-1])
    labels = drawn((INF, NEO))[0]
    assert np.array_equal(sample.load_image(), paint(labels)) and np.array_equal(sample.load_mask() > 0, labels > 0)
    truth = truth_of(sample)
    # Labels go by the order of the channels.
    np.testing.assert_allclose(truth.xy, PLACES[::-1])
    assert truth.class_name == (NEO, INF)


def test_a_crescent_keeps_its_class(tmp_path: Path) -> None:
    write_pannuke(tmp_path, 1, ["Breast"], [(NEO, "")])
    path = next(tmp_path.rglob("masks.npy"))
    masks = np.load(path)
    masks[0, 7:21, 12:22, 0] = 0  # Its centroid now lies outside of it.
    np.save(path, masks)
    (sample,) = open_dataset(tmp_path).samples
    assert truth_of(sample).class_name == (NEO,)


def test_conic_patches_and_the_tiles_of_cellvta(tmp_path: Path) -> None:
    write_conic(tmp_path, ["consep_1-0000", "glas_12-0003"], [("plasma", "lymphocyte"), ("", "eosinophil")])
    first, second = open_dataset(tmp_path).samples
    assert (first.stem, first.patient, first.cohort, first.mpp) == ("consep_1-0000", "consep_1", "consep", 0.5)
    assert second.patient == "glas_12" and truth_of(second).class_name == ("eosinophil",)
    found = {"consep_1-0000": ("plasma", ""), "glas_12-0003": ("", "eosinophil")}
    report = scored(tmp_path, "conic", None, found)
    assert report.detection.radius_um == 3
    assert report.instance.mpq_pooled == pytest.approx(2 / 3, abs=1e-5)  # plasma 1, lymphocyte 0, eosinophil 1
    assert report.instance.mpq == pytest.approx((0.5 + 1) / 2, abs=1e-5)
    tiles = Scoring.read(tmp_path, None, "conic-cellvta").data.samples
    assert [t.stem for t in tiles[:4]] == [f"consep_1-0000_{r}_{c}" for r in (0, 224) for c in (0, 224)]
    assert {t.load_image().shape for t in tiles} == {(256, 256, 3)} and tiles[0].mpp == pytest.approx(0.5 * 64 / 480)
    # (14, 14) and (46, 40) of 64 are at 105 and at (345, 300) of 480; the second begins at 240, in what tiles share.
    assert [truth_of(t).class_name for t in tiles[:4]] == [("plasma",), ("lymphocyte",), (), ("lymphocyte",)]
    np.testing.assert_allclose(truth_of(tiles[3]).xy, [(345 - 224, 300 - 224)], atol=0.6)


def test_consep_joins_its_classes(tmp_path: Path) -> None:
    write_consep(tmp_path, ("healthy epithelial", "muscle"))
    (sample,) = open_dataset(tmp_path, "test").samples
    assert (sample.stem, sample.mpp) == ("test_1", 0.25) and sample.load_image().shape == (*SHAPE, 3)
    assert truth_of(sample).class_name == ("healthy epithelial", "muscle")
    report = scored(tmp_path, "consep", "test", {"test_1": ("tumor_epithelial", "stromal")})
    assert {c.name: c.support for c in report.classes or ()} == {
        "epithelial": 1, "inflammatory": 0, "other": 0, "spindle-shaped": 1,
    }  # fmt: skip
    assert report.instance.mpq == pytest.approx(1, abs=1e-5) and report.mean_f1 == 1


def test_monuseg_fills_outlines_as_its_authors_do(tmp_path: Path) -> None:
    # Pixel centres are whole numbers from 1 there: columns 4 to 9 have theirs within 4.5 to 10.5.
    first = [(4.5, 2.5), (10.5, 2.5), (10.5, 6.5), (4.5, 6.5)]
    second = [(x + 4, y) for x, y in first]
    write_monuseg(tmp_path / "train", [first, second, [(1.0, 1.0)]])
    (sample,) = open_dataset(tmp_path).samples
    assert (sample.patient, sample.split, sample.mpp, sample.points_path) == ("TCGA-18-5592", "train", 0.25, None)
    mask = sample.load_mask()
    rows, cols = np.nonzero(mask)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (2, 5, 4, 13)
    # Of the overlap the first has all.
    assert [np.count_nonzero(mask == k) for k in np.unique(mask)[1:]] in ([16, 24], [24, 16])
    assert len(np.unique(mask[2, 4:10])) == 1
    report = scored(tmp_path, "monuseg", "train", {sample.stem: ("", "")})
    assert report.classes is None and report.instance.aji == 0
    (tmp_path / "train" / "Tissue Images" / f"{sample.stem}.tif").unlink()
    with pytest.raises(UsageError, match=r"image TCGA-18-5592.*\.tif is missing"):
        open_dataset(tmp_path)


def test_ocelot_pairs_within_15_pixels(tmp_path: Path) -> None:
    write_ocelot(tmp_path)
    first, second, _ = sorted(open_dataset(tmp_path).samples, key=lambda s: s.stem)
    assert (first.split, first.organ, first.patient, first.mpp) == ("train", "kidney", "TCGA-A1-A001", 0.195)
    assert first.mask_path is None and first.load_points().class_name == ("tumor", "other")

    def predict(sample: Sample, _: float) -> Nuclei:
        return Nuclei(np.array([(14.0, 29.0), (46, 55.5)]), class_name=("tumor", "other"))

    report = Scoring.read(tmp_path, None, "ocelot").score("twin", predict)[0]
    # Of two images alike the tumour cell is 15 px away, the other 15.5; the third has none.
    assert {c.name: (c.support, c.f1) for c in report.classes or ()} == {"other": (2, 0), "tumor": (2, 4 / 5)}
    assert report.mean_f1 == pytest.approx(2 / 5) and len(second.load_points()) == 0
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(UsageError, match=r"metadata\.json.*missing"):
        open_dataset(tmp_path)


def test_puma_joins_ten_classes_to_three(tmp_path: Path) -> None:
    write_puma(tmp_path, ["tumor", "plasma_cell", "lymphocyte", "stroma"])
    (sample,) = open_dataset(tmp_path).samples
    assert (sample.cohort, sample.mpp) == ("primary", 0.23)
    mask = sample.load_mask()
    assert [np.count_nonzero(mask == k) for k in range(1, 5)] == [64, 64, 64, 128]
    assert np.array_equal(mask[40:48, 8:16], mask[40:48, 20:28])
    truth = truth_of(sample)

    def predict(*_: object) -> Nuclei:
        return Nuclei(truth.xy, class_name=("tumor", "tils", "tumor", "other"))

    report = Scoring.read(tmp_path, None, "puma").score("twin", predict)[0]
    found = {c.name: (c.support, c.f1) for c in report.classes or ()}
    assert found == {"other": (1, 1), "tils": (2, pytest.approx(2 / 3)), "tumor": (1, pytest.approx(2 / 3))}
    assert len(Scoring.read(tmp_path, None, "puma-10").classes.names) == 10


def test_nuinsseg_has_organs_and_no_pixel_size(tmp_path: Path) -> None:
    write_nuinsseg(tmp_path)
    (sample,) = open_dataset(tmp_path).samples
    assert (sample.organ, sample.mpp) == ("human bladder", None)
    assert np.array_equal(sample.load_mask(), drawn(("a", "b"))[0])
    with pytest.raises(UsageError, match="--mpp"):
        Scoring.read(tmp_path, None, "nuinsseg")


@pytest.mark.parametrize("one_array", [True, False])
def test_nuclass_is_a_crop_a_cell(tmp_path: Path, one_array: bool) -> None:
    write_nuclass(tmp_path, [("c1", 14, "lung"), ("c2", "Acinar", "pancreas")], one_array)
    first, second = open_dataset(tmp_path, "val").samples
    assert (first.organ, first.load_points().class_name, second.load_points().class_name) == (
        "lung", ("T_Cell",), ("Acinar",),
    )  # fmt: skip
    x, y = first.load_points().xy[0].astype(int)
    assert first.load_image()[y, x].tolist() == [90, 60, 140]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"manifest\.csv is missing.*pannuke: masks\.npy"):
        open_dataset(tmp_path)
    write_pannuke(tmp_path, 2, ["Skin"], [(NEO, INF)])
    with pytest.raises(UsageError, match="--split fold1.*fold2"):
        open_dataset(tmp_path, "fold1")
    next(tmp_path.rglob("types.npy")).unlink()
    with pytest.raises(UsageError, match=r"fold2 lacks types\.npy"):
        open_dataset(tmp_path)


def test_arrays_that_do_not_go_together(tmp_path: Path) -> None:
    write_conic(tmp_path, ["a-0"], [("plasma", "")])
    np.save(tmp_path / "images.npy", np.zeros((2, *SHAPE, 3), np.uint8))
    with pytest.raises(UsageError, match=r"images\.npy.*does not go"):
        open_dataset(tmp_path)
    (tmp_path / "images.npy").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read as an array"):
        open_dataset(tmp_path)


def test_command_reads_a_layout(tmp_path: Path) -> None:
    write_pannuke(tmp_path, 1, ["Breast"], [(NEO, INF)])
    command = ["evaluate", "--model", "classical", str(tmp_path), "--protocol", "pannuke", "--no-progress"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0 and "1 images, 2 nuclei" in result.output, result.output


def test_a_damaged_mat_is_one_error(tmp_path: Path) -> None:
    write_consep(tmp_path, ("muscle", ""))
    (sample,) = open_dataset(tmp_path).samples
    assert sample.mask_path is not None
    for content in (b"", b"MATLAB 7.3 MAT-file" + bytes(600)):
        sample.mask_path.write_bytes(content)
        with pytest.raises(UsageError, match=r"test_1\.mat: inst_map and type_map cannot be read"):
            sample.load_mask()
