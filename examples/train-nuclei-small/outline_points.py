"""Turn a data set of points into one with outlines: a first model's maps, cut by the annotators' points.

Every nucleus of such a set has exactly one point, so the points say how many nuclei a blob holds and where they are.
The model only says how far each one reaches. What the two disagree on is written as 65535, "ignore", and trains
nothing.

    python outline_points.py --weights runs/first/model.safetensors POINTS_DATASET -o OUTLINED_DATASET
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import cv2
import numpy as np
import torch
from scipy import ndimage
from skimage.segmentation import watershed

from cellslide.evaluate.dataset import Sample, read_dataset, write_manifest
from cellslide.inference.device import cpu_computes_bf16
from cellslide.train.data import licences, resample_image
from cellslide.weights import LoadedModel, load_model

IGNORE = 65535


@dataclass(frozen=True)
class Rules:
    """When a nucleus is believed; lengths in µm, areas in µm².

    Near a point that no foreground reaches a probability of `faint` is enough: an annotator saw a nucleus there.
    """

    foreground: float = 0.5
    faint: float = 0.2
    faint_radius: float = 3.5
    sure: float = 0.85
    min_area: float = 6.0
    max_area: float = 400.0
    min_solidity: float = 0.8
    miss_radius: float = 2.5


def predict(model: LoadedModel, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return foreground probability (H, W) and HV maps (2, H, W)."""
    h, w = image.shape[:2]
    padded = np.pad(image, ((0, -h % 16), (0, -w % 16), (0, 0)), mode="reflect")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.spec.mean, model.spec.std))
    x = (torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255 - mean) / std
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=cpu_computes_bf16()):
        out = model.module(x)
    prob, hv = out["nuclei_binary_map"].float().softmax(1)[0, 1], out["hv_map"][0].float()
    return prob[:h, :w].numpy(), hv[:, :h, :w].numpy()


def cut(prob: np.ndarray, hv: np.ndarray, xy: np.ndarray, mpp: float, rules: Rules) -> np.ndarray:
    """Return uint16 labels (H, W): 0 background, k nucleus of point k - 1, IGNORE where nobody is sure."""
    rows, cols = (np.clip(xy[:, i].astype(int), 0, prob.shape[1 - i] - 1) for i in (1, 0))
    foreground = prob > rules.foreground
    missed = ~ndimage.binary_dilation(foreground)[rows, cols]
    seeds = np.ones(prob.shape, np.uint8)
    seeds[rows[missed], cols[missed]] = 0
    near = cv2.distanceTransform(seeds, cv2.DIST_L2, 5) < rules.faint_radius / mpp
    foreground |= (prob > rules.faint) & near & bool(missed.any())
    markers = np.zeros(prob.shape, np.int32)
    markers[rows, cols] = np.arange(1, len(xy) + 1)
    markers = ndimage.grey_dilation(markers, footprint=np.ones((3, 3))) * foreground
    edge_x = cv2.Sobel(hv[0], cv2.CV_32F, 1, 0, ksize=5) / 128
    edge_y = cv2.Sobel(hv[1], cv2.CV_32F, 0, 1, ksize=5) / 128
    border = np.maximum(-edge_x, -edge_y)  # HV falls steeply where one nucleus ends and the next begins
    depth = cv2.distanceTransform(foreground.astype(np.uint8), cv2.DIST_L2, 5)
    labels = watershed(border - 0.15 * depth, markers, mask=foreground)
    out = labels.copy()
    out[foreground & (labels == 0) & (prob > rules.sure)] = IGNORE
    for k, box in enumerate(ndimage.find_objects(labels, len(xy)), start=1):
        if box is None:
            cv2.circle(out, (int(cols[k - 1]), int(rows[k - 1])), round(rules.miss_radius / mpp), IGNORE, -1)
        elif not believed(labels[box] == k, mpp, rules):
            out[box][labels[box] == k] = IGNORE
    return out.astype(np.uint16)


def believed(mask: np.ndarray, mpp: float, rules: Rules) -> bool:
    """Whether a mask has the size and the roundness of a nucleus."""
    area = mask.sum() * mpp**2
    contours, _ = cv2.findContours(np.pad(mask, 1).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = cv2.contourArea(cv2.convexHull(np.concatenate(contours))) or 1.0
    solid = max(cv2.contourArea(c) for c in contours) / hull
    return rules.min_area <= area <= rules.max_area and solid >= rules.min_solidity


def outline(model: LoadedModel, sample: Sample, mpp: float, out: Path, rules: Rules) -> int:
    """Write image and mask of one sample at `mpp` µm/px; returns the number of nuclei kept."""
    if sample.mpp is None:
        raise click.ClickException(f"{sample.image_path}: mpp is empty in the manifest")
    scale = sample.mpp / mpp
    image = resample_image(sample.load_image(), scale)
    labels = cut(*predict(model, image), sample.load_points().xy * scale, mpp, rules)
    cv2.imwrite(str(out / "images" / f"{sample.stem}.png"), image[..., ::-1])
    cv2.imwrite(str(out / "masks" / f"{sample.stem}.png"), labels)
    return len(np.setdiff1d(np.unique(labels), (0, IGNORE)))


@click.command()
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--weights", type=click.Path(exists=True, path_type=Path), help="Weights of a run of one's own.")
@click.option("--model", help="Shipped or registered weights by id.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--mpp", type=float, help="Pixel size (µm) to work at.  [default: the model's]")
@click.option("--split", default="train", show_default=True)
@click.option(
    "--exclude-patient", "excluded", multiple=True, help="A patient that stands in a set kept for evaluation."
)
def main(
    dataset: Path,
    weights: Path | None,
    model: str | None,
    output: Path,
    mpp: float | None,
    split: str,
    excluded: tuple[str, ...],
) -> None:
    """Outline the nuclei of a point data set with one of --weights and --model."""
    if (weights is None) == (model is None):
        raise click.UsageError("give --weights or --model")
    network = load_model(model, weights)
    mpp = mpp or network.spec.mpp
    for folder in ("images", "masks"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    licence, note = "; ".join(licences(dataset)), "outlines by a model"
    rows: list[dict[str, object]] = []
    for s in (s for s in read_dataset(dataset, split).samples if s.patient not in excluded):
        n = outline(network, s, mpp, output, Rules())
        image, mask = f"images/{s.stem}.png", f"masks/{s.stem}.png"
        height, width = cv2.imread(str(output / mask), cv2.IMREAD_UNCHANGED).shape
        about = {"split": s.split, "patient": s.patient, "organ": s.organ, "mpp": mpp, "licence": licence, "note": note}
        rows.append({"file": image, "mask": mask, "width": width, "height": height, "n_nuclei": n, **about})
        click.echo(f"{s.stem}: {n} nuclei")
    write_manifest(output, rows)


if __name__ == "__main__":
    main()
