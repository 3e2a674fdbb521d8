"""The page of labels by marker genes: clusters and labels on the slide, markers by cluster, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellslide.report.images import color_of, dots_uri, webp_uri
from cellslide.report.rendering import part, template
from cellslide.slides.slide import Slide
from cellslide.store.anndata_columns import Categorical, Columns
from cellslide.store.atomic import write_text
from cellslide.types import Float64, Int64, hex_color
from cellslide.xenium.markers import ClusterNames, Markers

PICTURE_PX, QUALITY = 1100, 70
DOT_PX, MOST_DOT_PX = 17, 7.0


@dataclass(frozen=True, slots=True)
class Layer:
    """Dots of one cluster or class over the picture."""

    name: str
    color: str
    count: int
    image: str


@dataclass(frozen=True, slots=True)
class DotRow:
    """A cluster in the plot of markers: for each gene a radius and the share of the gene's largest mean."""

    name: str
    dots: tuple[tuple[float, float, float], ...]


def write_page(
    path: Path, slide: Slide, xy_px: Float64, columns: Columns, names: ClusterNames, expression: Float64,
    genes: Sequence[str], markers: Markers, sizes: Sequence[int], facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the page of one slide, whose nuclei lie at `xy_px` (N, 2) and have the new `columns`."""
    picture = slide.thumbnail(PICTURE_PX)
    size = picture.shape[1], picture.shape[0]
    xy = (xy_px * (size[0] / slide.info.width_px)).astype(np.float32)
    label, cluster = columns.obs["label"], np.asarray(columns.obs["cluster"], np.int64)
    assert isinstance(label, Categorical)
    kept = np.asarray(columns.obs["label_kept"], np.bool_)
    by_cluster = [f"{k} {name}" for k, name in enumerate(names.label)]
    scenes = (
        ("Clusters", "All matched nuclei, by the cluster of their cell.", _layers(xy, cluster, by_cluster, size)),
        ("Labels that are kept", "Nuclei whose label is sure enough.",
         _layers(xy, np.where(kept, label.codes.astype(np.int64), -1), label.names[:-1], size)),
    )  # fmt: skip
    shown = list(dict.fromkeys(gene for name in markers.assignable for gene in markers.genes[name]))
    page = template("xenium.html").render(
        title=f"Marker labels of {slide.info.slide_id}", style=part("report.css"), picture=webp_uri(picture, QUALITY),
        size=size, scenes=scenes, genes=shown, rows=_dots(names, expression, genes, shown), coverage=markers.coverage(),
        alike=markers.alike(), names=names, sizes=sizes, facts=facts, step=DOT_PX,
    )  # fmt: skip
    write_text(path, page)


def _layers(xy: Any, codes: Int64, names: Sequence[str], size: tuple[int, int]) -> list[Layer]:
    total = int((codes >= 0).sum())
    layers = []
    for k, name in enumerate(names):
        here = xy[codes == k]
        layers.append(
            Layer(name, hex_color(color_of(k, len(names))), len(here), dots_uri(here, size, k, len(names), total))
        )
    return layers


def _dots(names: ClusterNames, expression: Float64, genes: Sequence[str], shown: Sequence[str]) -> list[DotRow]:
    """Return a dot for each cluster and marker: its area is the mean beside that of the cluster that has most."""
    place = {gene: k for k, gene in enumerate(genes)}
    values = expression[:, [place[gene] for gene in shown]]
    share = values / np.maximum(values.max(axis=0), 1e-9)
    return [
        DotRow(
            f"{k} {name}",
            tuple((DOT_PX * (g + 0.5), float(MOST_DOT_PX * np.sqrt(s)), float(s)) for g, s in enumerate(share[k])),
        )
        for k, name in enumerate(names.label)
    ]
