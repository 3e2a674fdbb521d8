"""Twins of distributed data sets: their files and names, with a few small discs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from cellslide.evaluate.layouts import conic, consep, pannuke
from tests.support.labelled import discs, paint

SHAPE = (64, 64)
PLACES = [(14.0, 14.0), (46.0, 40.0)]
CELLS = "14,14,2\n46,40,1\n"
# Classes of the two discs of each image; "" draws none there.
Kinds = Sequence[tuple[str, str]]


def drawn(kinds: tuple[str, str]) -> tuple[NDArray[np.int32], dict[int, str]]:
    """Return the label map of an image, and the class of each label."""
    labels = discs(SHAPE, PLACES, 8)
    for k, kind in enumerate(kinds, 1):
        if not kind:
            labels[labels == k] = 0
    return labels, {k: kind for k, kind in enumerate(kinds, 1) if kind}


def write_pannuke(root: Path, fold: int, tissues: Sequence[str], images: Kinds) -> None:
    """Write one fold in its folders."""
    masks = np.zeros((len(images), *SHAPE, 6))
    for i, kinds in enumerate(images):
        labels, names = drawn(kinds)
        for k, name in names.items():
            # Numbers run over the fold, with gaps, as in the real one.
            masks[i, ..., pannuke.CLASSES.index(name)][labels == k] = 10 * i + 3 * k
        masks[i, ..., 5] = labels == 0
    pixels = np.stack([paint(drawn(kinds)[0]) for kinds in images]).astype(np.float64)
    for part, name, array in (
        ("images", "images", pixels), ("masks", "masks", masks), ("images", "types", np.array(tissues)),
    ):  # fmt: skip
        folder = root / f"Fold {fold}" / part / f"fold{fold}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", array)


def write_conic(root: Path, names: Sequence[str], images: Kinds) -> None:
    """Write the arrays and the names of the patches."""
    labels = np.zeros((len(images), *SHAPE, 2), np.uint16)
    for i, kinds in enumerate(images):
        instance, kind_of = drawn(kinds)
        labels[i, ..., 0] = instance * 7
        for k, name in kind_of.items():
            labels[i, ..., 1][instance == k] = conic.CLASSES.index(name) + 1
    np.save(root / "labels.npy", labels)
    np.save(root / "images.npy", np.stack([paint(drawn(kinds)[0]) for kinds in images]))
    (root / "patch_info.csv").write_text("\n".join(["patch_info", *names]) + "\n")


def write_consep(root: Path, kinds: tuple[str, str]) -> None:
    """Write one test image with its .mat, numbers of nuclei with a gap."""
    labels, names = drawn(kinds)
    kind = np.zeros(SHAPE)
    for k, name in names.items():
        kind[labels == k] = consep.CLASSES.index(name) + 1
    for part in ("Images", "Labels"):
        (root / "Test" / part).mkdir(parents=True)
    save(root / "Test" / "Images" / "test_1.png", labels)
    savemat(root / "Test" / "Labels" / "test_1.mat", {"inst_map": labels * 5.0, "type_map": kind})


def write_monuseg(root: Path, rings: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Write one training image with outlines."""
    for part in ("Tissue Images", "Annotations"):
        (root / part).mkdir(parents=True)
    save(root / "Tissue Images" / "TCGA-18-5592-01Z-00-DX1.tif", drawn(("a", "b"))[0])
    regions = ""
    for ring in rings:
        vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in ring)
        regions += f"<Region><Vertices>{vertices}</Vertices></Region>"
    text = f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>"
    (root / "Annotations" / "TCGA-18-5592-01Z-00-DX1.xml").write_text(text)


def write_ocelot(root: Path) -> None:
    """Write an image of each split with two cells, in the one for tests none."""
    for split, key, rows in (("train", "001", CELLS), ("test", "002", ""), ("val", "003", CELLS)):
        for part in ("images", "annotations"):
            (root / part / split / "cell").mkdir(parents=True)
        save(root / "images" / split / "cell" / f"{key}.jpg", drawn(("a", "b"))[0])
        (root / "annotations" / split / "cell" / f"{key}.csv").write_text(rows)
    about = {
        key: {"slide_name": f"TCGA-A1-A{key}-01Z", "organ": "kidney", "cell": {"resized_mpp_x": 0.195}}
        for key in ("001", "002", "003")
    }
    (root / "metadata.json").write_text(json.dumps({"sample_pairs": about}))


def write_puma(root: Path, kinds: Sequence[str]) -> None:
    """Write a region with squares, the last of them in two parts."""
    stem = "training_set_primary_roi_001"
    for part in ("01_training_dataset_tif_ROIs", "01_training_dataset_geojson_nuclei"):
        (root / part).mkdir(parents=True)
    save(root / "01_training_dataset_tif_ROIs" / f"{stem}.tif", drawn(("a", "b"))[0])
    shapes = [{"type": "Polygon", "coordinates": [square(8 + 14 * k, 8)]} for k in range(len(kinds) - 1)]
    shapes.append({"type": "MultiPolygon", "coordinates": [[square(8, 40)], [square(20, 40)]]})
    features = [
        {"type": "Feature", "geometry": shape, "properties": {"classification": {"name": f"nuclei_{kind}"}}}
        for shape, kind in zip(shapes, kinds, strict=True)
    ]
    path = root / "01_training_dataset_geojson_nuclei" / f"{stem}_nuclei.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def square(x: int, y: int, edge: int = 8) -> list[tuple[int, int]]:
    """Return a closed ring."""
    return [(x, y), (x + edge, y), (x + edge, y + edge), (x, y + edge), (x, y)]


def write_nuinsseg(root: Path) -> None:
    """Write an image of one organ."""
    labels = drawn(("a", "b"))[0]
    for part in ("tissue images", "label masks modify"):
        (root / "human bladder" / part).mkdir(parents=True)
    save(root / "human bladder" / "tissue images" / "human_bladder_01.png", labels)
    Image.fromarray((labels * 3).astype(np.uint16)).save(
        root / "human bladder" / "label masks modify" / "human_bladder_01.tif"
    )


def write_nuclass(root: Path, cells: Sequence[tuple[str, int | str, str]], one_array: bool, split: str = "val") -> None:
    """Write cells (id, class, organ) of a split."""
    folder = root / split
    folder.mkdir(parents=True)
    kept = {key: {"class_id": kind, "tissue_type": organ} for key, kind, organ in cells}
    (folder / "annotations.json").write_text(json.dumps(kept))
    picture = paint(discs((1024, 1024), [(512, 512)], 20))
    with h5py.File(folder / "patches_1024x1024.h5", "w") as file:
        if one_array:
            file["keys"] = list(kept)[::-1]
            file.create_dataset("images", data=np.stack([picture] * len(kept)), chunks=(1, 256, 256, 3), compression=1)
        for key in () if one_array else kept:
            file.create_dataset(key, data=picture, compression=1)


def save(path: Path, labels: NDArray[np.int32]) -> None:
    """Write the picture of a label map."""
    Image.fromarray(paint(labels)).save(path)
