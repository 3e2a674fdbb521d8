"""What marker labels cost a classifier: it learns from recovered labels, and from the true ones of the same nuclei.

    python benchmarks/slide_labels.py DATA/brca-m2c OUT

Fields of BRCA-M2C are laid out as two slides, one of the training images and one of those that validate. Over the
nuclei of the first a bundle is painted (`painted-transcripts`, 10 % doublets), `xenium label` names them, and
`train nuclass-local` learns from the column `label`, from `truth` of the nuclei that were kept (`truth_kept`), and from
`truth` of all. All are scored by the true classes of the second slide. Labels take a
minute and a half of one core, each training under two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from cellslide import import_cells, open_slide
from cellslide.evaluate.dataset import read_dataset
from cellslide.slides.painted import write_pyramid
from cellslide.store.anndata_columns import Categorical, Columns
from cellslide.store.cell_table import TableExtender, open_table
from cellslide.train.fit import fit
from cellslide.train.nuclass.recipe import NuClassRecipe
from cellslide.train.recipe import build
from cellslide.train.task import FitOptions
from cellslide.train.tasks import nuclass
from cellslide.types import Float64, Int64
from cellslide.xenium.alignment import read_alignment
from cellslide.xenium.bundle import Bundle
from cellslide.xenium.expression import LabelSettings
from cellslide.xenium.label import label_slide
from cellslide.xenium.markers import read_markers
from cellslide.xenium.painted import PaintSettings, paint_bundle, turned_matrix

MPP, FIELD_PX, ACROSS = 0.5, 512, 6
KINDS = {"tumor_epithelial": "Epithelial_Malignant", "lymphocyte": "T_Cell", "stromal": "Endothelial"}
GENES = ("EPCAM", "KRT8", "KRT18", "KRT19", "KRT5", "CD3D", "CD3E", "CD2", "CD4", "IL7R", "PECAM1", "VWF", "KDR",
         "CD34", "FLT1", "HOUSE1", "HOUSE2")  # fmt: skip
BACKBONE = {"name": "resnet18", "args": {"channels": [16, 32, 64, 128]}, "pool": "avg"}
RECIPE = {
    "id": "slide-labels", "mpp": 0.25, "local": {"field_px": 144, "input_px": 48},
    "context": {"field_px": 384, "input_px": 96}, "classes": list(KINDS.values()), "organs": ["breast"],
    "unknown_organ_p": 0.0, "jitter_px": 6, "batch_size": 64, "epochs": 4, "epoch_samples": 1920, "freeze_epochs": 0,
    "precision": "fp32", "monitor": "", "datasets": {"pair": {"val": {"split": "val"}}},
    "model": {"local": BACKBONE, "context": BACKBONE, "organ_width": 16, "film_width": 32, "head_width": 256},
    "optim": {"lr": 2e-3, "backbone_lr": 2e-3, "layer_decay": 1.0, "weight_decay": 0.05, "schedule": "cosine",
              "warmup_steps": 30, "ema": 0.99},
    "loss": {"smoothing": 0.05}, "augment": {"scale": [0.8, 1.25], "blur_p": 0.1, "jpeg_p": 0.1, "noise_p": 0.1},
}  # fmt: skip


def lay_out(data: Path, split: str, path: Path, most: int) -> tuple[Float64, Int64]:
    """Write fields of a split as one slide; return its nuclei's places (N, 2), px, and kinds (N,)."""
    samples = read_dataset(data, split).samples[:most]
    image = np.full((-(-len(samples) // ACROSS) * FIELD_PX, ACROSS * FIELD_PX, 3), 244, np.uint8)
    xy, kind = [], []
    for k, sample in enumerate(samples):
        corner = np.array([k % ACROSS, k // ACROSS]) * FIELD_PX
        pixels, points = sample.load_image()[:FIELD_PX, :FIELD_PX], sample.load_points()
        image[corner[1] : corner[1] + pixels.shape[0], corner[0] : corner[0] + pixels.shape[1]] = pixels
        rows = [i for i, name in enumerate(points.class_name) if name in KINDS and (points.xy[i] < FIELD_PX).all()]
        xy.append(points.xy[rows] + corner)
        kind.append([list(KINDS).index(points.class_name[i]) for i in rows])
    write_pyramid(path, image, MPP)
    return np.concatenate(xy), np.concatenate(kind).astype(np.int64)


def import_nuclei(slide: Path, xy: Float64, kind: Int64, out: Path) -> tuple[Path, Int64]:
    """Make the slide's table of the nuclei; return its folder and the kind of each row."""
    slide.with_suffix(".csv").write_text("x,y\n" + "".join(f"{x:.2f},{y:.2f}\n" for x, y in xy))
    import_cells(slide.with_suffix(".csv"), slide, out).close()
    with open_table(out / slide.stem / "cells.zarr") as table:
        found = np.stack([table.vector("x"), table.vector("y")], axis=1)
    near = np.array([((xy - place) ** 2).sum(axis=1).argmin() for place in found])
    return out / slide.stem, kind[near]


def add_columns(folder: Path, columns: dict[str, Int64]) -> None:
    """Add columns of classes, -1 for none, to a table."""
    with open_table(folder / "cells.zarr") as table:
        extender = TableExtender(table)
        words = tuple(KINDS.values())
        extender.append(Columns({name: Categorical(k.astype(np.int16), words) for name, k in columns.items()}))
        extender.close(table.run)


def label(folder: Path, slide: Path, xy: Float64, kind: Int64, out: Path) -> np.ndarray:
    """Paint a bundle over the nuclei and label them by it; return which labels (N,) of the table are kept."""
    rates = np.full((len(KINDS), len(GENES)), 0.4)
    for k in range(len(KINDS)):
        rates[k, 5 * k : 5 * k + 5] = 12.0
    rates[:, 15:] = 4.0
    with open_slide(slide) as pixels:
        matrix = turned_matrix((pixels.info.width_px, pixels.info.height_px), MPP, 0.2125)
        painted = paint_bundle(out, xy, rates[kind], GENES, matrix, PaintSettings(doublets=0.1))
        bundle = Bundle(out)
        markers = read_markers("nuclass", bundle.genes, list(KINDS.values()))
        place = read_alignment(painted.alignment, bundle.pixel_size)
        label_slide(bundle, folder, pixels, place, markers, LabelSettings())
    with open_table(folder / "cells.zarr") as table:
        return np.asarray(table.vector("label_kept"), np.bool_)


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    folders = {}
    for split, most in (("train", 40), ("val", 12)):
        slide = given.out / f"{split}.tif"
        xy, kind = lay_out(given.data, split, slide, most)
        folders[split], kind_of = import_nuclei(slide, xy, kind, given.out / "cells")
        if split == "train":
            kept = label(folders[split], slide, xy, kind, given.out / "outs")
            add_columns(folders[split], {"truth": kind_of, "truth_kept": np.where(kept, kind_of, -1)})
            n_train = len(kind_of)
        else:
            add_columns(folders[split], dict.fromkeys(("label", "truth", "truth_kept"), kind_of))
    with open_table(folders["train"] / "cells.zarr") as table:
        label_column, truth = table.column("label"), table.column("truth")
        assert isinstance(label_column, Categorical) and isinstance(truth, Categorical)
        said = np.array(label_column.names)[label_column.codes]
        right = float((said == np.array(truth.names)[truth.codes])[kept].mean())
    listed = given.out / "pair.csv"
    listed.write_text(
        f"cells,organ,split\n{folders['train'].resolve()},breast,train\n{folders['val'].resolve()},breast,val\n"
    )
    accuracy: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        for column in ("label", "truth_kept", "truth"):
            recipe = build(NuClassRecipe, {**RECIPE, "seed": seed, "labels": {"column": column}})
            run = given.out / f"{column}-{seed}"
            fit(nuclass.LOCAL, recipe, FitOptions(run, [listed], "cpu", 1, fresh=True, log_every=25))
            accuracy.setdefault(column, []).append(
                json.loads((run / "card.json").read_text())["metrics"]["val/accuracy"]
            )
    print(json.dumps({"nuclei": n_train, "kept": int(kept.sum()), "kept_right": right, "accuracy": accuracy}, indent=1))


if __name__ == "__main__":
    main()
