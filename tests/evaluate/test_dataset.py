"""The reader of data sets: rows, splits, pixels, and everything that a damaged manifest can say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellslide.errors import UsageError
from cellslide.evaluate.dataset import read_dataset, read_labels, read_points, write_manifest
from tests.support.labelled import add_image, discs, paint

# Wider than high, so that exchanged axes show.
LABELS = discs((40, 64), [(10, 12), (50, 30)], 6)


def one_row(root: Path, **columns: str) -> Path:
    return write_manifest(root, [add_image(root, "a", LABELS) | columns])


def test_sample_gives_back_what_was_written(tmp_path: Path) -> None:
    row = add_image(tmp_path, "a", LABELS, points=[(10.5, 12, "tumour"), (50, 30.25, "stroma")], patient="P1")
    dataset = read_dataset(write_manifest(tmp_path, [row]))
    (sample,) = dataset.samples
    assert (dataset.name, sample.dataset, sample.stem) == (tmp_path.name, tmp_path.name, "a")
    assert (sample.patient, sample.organ, sample.mpp, sample.width, sample.height) == ("P1", "breast", 0.25, 64, 40)
    image, mask, points = sample.load_image(), sample.load_mask(), sample.load_points()
    assert image.dtype == np.uint8 and np.array_equal(image, paint(LABELS))
    assert mask.dtype == np.int32 and np.array_equal(mask, LABELS)
    assert points.class_name == ("tumour", "stroma") and points.typed
    np.testing.assert_array_equal(points.xy, [(10.5, 12), (50, 30.25)])


def test_labels_above_255_survive(tmp_path: Path) -> None:
    labels = LABELS * 30_000
    (sample,) = read_dataset(write_manifest(tmp_path, [add_image(tmp_path, "a", labels)])).samples
    assert np.unique(sample.load_mask()).tolist() == [0, 30_000, 60_000]


def test_split_filters_and_an_unknown_one_names_the_known(tmp_path: Path) -> None:
    rows = [add_image(tmp_path, name, LABELS, split=split) for name, split in (("a", "train"), ("b", "val"))]
    write_manifest(tmp_path, rows)
    assert [s.stem for s in read_dataset(tmp_path).samples] == ["a", "b"]
    assert [s.stem for s in read_dataset(tmp_path, "val").samples] == ["b"]
    with pytest.raises(UsageError, match=r"--split test.*train, val"):
        read_dataset(tmp_path, "test")


def test_empty_cells_mean_absent(tmp_path: Path) -> None:
    row = add_image(tmp_path, "a", LABELS, mask=False, mpp="", width="", height="", organ="")
    (sample,) = read_dataset(write_manifest(tmp_path, [row])).samples
    assert sample.mask_path is None and sample.points_path is None and sample.mpp is None
    assert (sample.width, sample.height) == (64, 40)  # From the image itself.
    with pytest.raises(UsageError, match="no mask"):
        sample.load_mask()
    with pytest.raises(UsageError, match="no points"):
        sample.load_points()


@pytest.mark.parametrize("name", ["../outside.png", "images/../../outside.png"])
@pytest.mark.parametrize("column", ["file", "mask", "points"])
def test_a_path_may_not_leave_the_folder(tmp_path: Path, name: str, column: str) -> None:
    Image.fromarray(paint(LABELS)).save(tmp_path / "outside.png")
    root = tmp_path / "set"
    with pytest.raises(UsageError, match=r"line 2: .*outside the data set"):
        read_dataset(one_row(root, **{column: name}))


def test_absolute_paths_and_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside.png", tmp_path / "set"
    Image.fromarray(paint(LABELS)).save(outside)
    with pytest.raises(UsageError, match="outside the data set"):
        read_dataset(one_row(root, file=str(outside)))
    (root / "images" / "link.png").symlink_to(outside)
    with pytest.raises(UsageError, match="outside the data set"):
        read_dataset(one_row(root, file="images/link.png"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mpp": "zero"}, "mpp zero"),
        ({"mpp": "-0.25"}, "mpp -0.25"),
        ({"mpp": "nan"}, "mpp nan"),
        ({"mask": "masks/none.png"}, "does not exist"),
        ({"file": ""}, "file is empty"),
        ({"width": "wide"}, "whole numbers"),
    ],
)
def test_damaged_rows_name_the_line(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_dataset(one_row(tmp_path, **columns))


def test_size_that_differs_from_the_manifest_is_an_error(tmp_path: Path) -> None:
    (sample,) = read_dataset(one_row(tmp_path, width="65")).samples
    with pytest.raises(UsageError, match=r"64 x 40 px, but manifest\.csv says 65 x 40"):
        sample.load_image()


def test_folder_without_manifest_and_manifest_without_header(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"manifest\.csv is missing"):
        read_dataset(tmp_path)
    (tmp_path / "manifest.csv").write_text("image,label\na.png,b.png\n")
    with pytest.raises(UsageError, match="header lacks file"):
        read_dataset(tmp_path)


def test_truncated_image_is_named(tmp_path: Path) -> None:
    one_row(tmp_path)
    path = tmp_path / "images" / "a.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UsageError, match=r"a\.png: cannot be read"):
        read_dataset(tmp_path).samples[0].load_image()


def test_labels_of_each_format(tmp_path: Path) -> None:
    Image.fromarray(LABELS.astype(np.uint16)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", LABELS.astype(np.int64))
    tifffile.imwrite(tmp_path / "a.tif", LABELS.astype(np.uint32))
    for name in ("a.png", "a.npy", "a.tif"):
        assert np.array_equal(read_labels(tmp_path / name), LABELS), name


def test_what_is_no_label_image(tmp_path: Path) -> None:
    Image.fromarray(paint(LABELS)).save(tmp_path / "rgb.png")
    np.save(tmp_path / "half.npy", LABELS + 0.5)
    np.save(tmp_path / "minus.npy", -LABELS)
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    for name in ("rgb.png", "half.npy", "minus.npy", "pickle.npy"):
        with pytest.raises(UsageError, match=name):
            read_labels(tmp_path / name)


def test_points_without_class_and_with_bad_numbers(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("x,y\n1,2\n3.5,4\n")
    points = read_points(path)
    assert points.class_name == ("", "") and not points.typed
    for text in ("x,y\n1,two\n", "x,y\n1,inf\n", "x,z\n1,2\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"p\.csv"):
            read_points(path)


def test_real_sets_are_read_whole(shared: Path) -> None:
    tnbc, points = read_dataset(shared / "data" / "tnbc"), read_dataset(shared / "data" / "brca-m2c", "val")
    assert len(tnbc) == 40 and {s.mpp for s in tnbc.samples} == {0.25}
    assert len(np.unique(tnbc.samples[0].load_mask())) - 1 == 21
    assert set(points.samples[0].load_points().class_name) <= {"lymphocyte", "tumor_epithelial", "stromal"}
    assert not any(s.derived_instances for s in read_dataset(shared / "data" / "nuinsseg").samples)
    assert not any(s.derived_instances for s in tnbc.samples)
