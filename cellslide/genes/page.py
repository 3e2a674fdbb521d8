"""The page of predicted genes: maps, beside the true ones and the correlation where the genes were measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellslide.genes.maps import GeneMap
from cellslide.genes.scores import GeneScores
from cellslide.report.images import heat_uri, webp_uri
from cellslide.report.rendering import part, template
from cellslide.slides.slide import Slide
from cellslide.store.atomic import write_text

MOST_GENES, PICTURE_PX, QUALITY = 24, 900, 70


@dataclass(frozen=True, slots=True)
class Shown:
    """One gene: pictures of what is predicted and was measured, what the brightest colour means, the correlation."""

    name: str
    predicted: str
    true: str | None
    most: float
    spearman: float | None


def write_page(
    path: Path, slide: Slide, weights: str, genes: Sequence[str], maps: Mapping[str, GeneMap], scores: GeneScores | None
) -> None:
    """Write the page of one slide; of many genes those are shown that vary most, all of them stand in genes.zarr."""
    rows, cols = maps["predicted"].values.shape[1:]
    page = template("genes.html").render(
        title=f"Predicted genes of {slide.info.slide_id}", style=part("report.css"), weights=weights,
        picture=webp_uri(slide.thumbnail(PICTURE_PX), QUALITY), shown=list(_shown(genes, maps, scores)), n=len(genes),
        scores=scores, size=(cols, rows),
    )  # fmt: skip
    write_text(path, page)


def _shown(genes: Sequence[str], maps: Mapping[str, GeneMap], scores: GeneScores | None) -> Iterator[Shown]:
    values, true = maps["predicted"].values, maps.get("true")
    spread = np.array([np.nanstd(one) for one in values])
    for k in sorted(np.argsort(-spread, kind="stable")[:MOST_GENES], key=lambda k: genes[k]):
        both = [values[k]] if true is None else [values[k], true.values[k]]
        most = float(np.nanmax(both)) if not np.isnan(both).all() else 0.0
        pictures = [heat_uri(np.nan_to_num(one).astype(np.float64), most) for one in both]
        rank = None if scores is None else scores.by_gene[genes[k]]["spearman"]
        yield Shown(genes[k], pictures[0], pictures[1] if len(pictures) > 1 else None, most, rank)
