"""Labels of nuclei by marker genes: of a bundle's cells, brought to the nuclei found on the H&E slide.

bundle -> counts -> clusters -> names -> confidence -> nuclei that match -> columns of cells.zarr, clusters.csv, a page
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.errors import UsageError
from cellslide.formats.files import renew_files
from cellslide.progress import IDLE, Watch
from cellslide.slides.slide import Slide
from cellslide.store.anndata_columns import Categorical, Columns
from cellslide.store.cell_table import BLOCK_ROWS, CellTable, TableExtender, open_table
from cellslide.store.run_record import TABLE, read_record
from cellslide.store.slide_folder import close_record, held
from cellslide.types import Float64, Int64
from cellslide.xenium.alignment import Alignment
from cellslide.xenium.bundle import Bundle, XeniumNuclei, id_text
from cellslide.xenium.confidence import Confidence, Pairs, match_nuclei, rate_labels
from cellslide.xenium.expression import (
    Clusters,
    LabelSettings,
    cluster_cells,
    cluster_means,
    count_genes,
    good_cells,
)
from cellslide.xenium.markers import AMBIGUOUS, ClusterNames, Markers, name_clusters, override_names, write_names
from cellslide.xenium.page import write_page

CLUSTERS, PAGE = "xenium_clusters.csv", "xenium.html"
COLUMNS = ("label", "label_confidence", "label_kept", "purity", "margin", "cluster", "matched_um", "xenium_cell")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """How many cells and nuclei went where; `left_out` by reason, `labels` the kept nuclei of the slide by class."""

    cells: int
    left_out: dict[str, int]
    clusters: int
    ambiguous: int
    nuclei_seen: int
    nuclei_xenium: int
    matched: int
    labelled: int
    kept: int
    labels: dict[str, int]

    @property
    def matched_share(self) -> float:
        """Share of the Xenium nuclei on the slide that are one with a nucleus seen there."""
        return self.matched / max(self.nuclei_xenium, 1)

    @property
    def kept_share(self) -> float:
        """Share of the labelled nuclei that are sure enough."""
        return self.kept / max(self.labelled, 1)


@dataclass(frozen=True, slots=True)
class CellLabels:
    """The good cells of a bundle: id codes (N,), labels (N,) into `classes` and -1 for ambiguous, clusters, confidence.

    expression  mean log expression (K, G) of the clusters.
    """

    cell: Int64
    label: Int64
    classes: tuple[str, ...]
    clusters: Clusters
    names: ClusterNames
    confidence: Confidence
    expression: Float64
    n_cells: int
    left_out: dict[str, int]


def label_cells(bundle: Bundle, markers: Markers, settings: LabelSettings, edited: Path | None = None) -> CellLabels:
    """Label the cells of a bundle; `edited` is a table of clusters whose labels go before the ones found here.

    Raises UsageError where too few cells are good, or the table is of other clusters.
    """
    cells = bundle.cells()
    counts = count_genes(bundle, cells, settings.least_qv)
    good, left = good_cells(counts, cells, settings)
    clusters = cluster_cells(counts[good], settings)
    mean, z = cluster_means(clusters)
    names = name_clusters(z, bundle.genes, markers, settings.least_margin)
    if edited is not None:
        names = override_names(edited, names, markers.assignable)
    classes = tuple(name for name in markers.assignable if name in names.label)
    of_cluster = np.array([classes.index(n) if n != AMBIGUOUS else -1 for n in names.label], np.int64)
    label = of_cluster[clusters.cluster]
    rivals = classes if len(classes) > 1 else (*classes, *(n for n in markers.assignable if n not in classes))
    rated = rate_labels(clusters.pca, clusters.log, label, rivals, markers.genes, bundle.genes, settings.neighbours)
    return CellLabels(cells.cell[good], label, classes, clusters, names, rated, mean, len(good), left)


def label_slide(
    bundle: Bundle, folder: Path, slide: Slide, alignment: Alignment, markers: Markers, settings: LabelSettings,
    edited: Path | None = None, watch: Watch = IDLE,
) -> LabelCounts:  # fmt: skip
    """Label the nuclei of `folder/cells.zarr`, which were found on `slide`, in columns that are added to it.

    label             class or "ambiguous", missing where no good cell matches.
    label_confidence  0..1; label_kept  whether it is enough; purity and margin, its parts.
    cluster           of the cell, -1 for none; matched_um  how far its nucleus lies, NaN for none; xenium_cell  its id.
    Writes the clusters and a page beside the table. Raises UsageError as `label_cells`, BusyError, TableError.
    """
    began = time.perf_counter()
    found = label_cells(bundle, markers, settings, edited)
    with held(folder, watch) as watch:
        renew_files(folder, watch)
        with open_table(folder / TABLE) as table:
            record = read_record(folder) or table.run
            size_um = np.array([slide.info.mpp_x, slide.info.mpp_y])
            xy_px = np.stack([np.asarray(table.vector(name), np.float64) for name in ("x", "y")], axis=1)
            nuclei, placed = _on_slide(bundle, slide, alignment)
            pairs = match_nuclei(xy_px * size_um, placed * size_um, settings.match_um)
            columns = _columns(found, nuclei, pairs, len(table), settings.least_confidence)
            counts = _count(found, columns, pairs, len(table), len(nuclei.cell))
            record.config = {**record.config, "xenium_label": _settings(bundle, alignment, markers, settings, counts)}
            _extend(table, columns, record)
        sizes = np.bincount(found.clusters.cluster, minlength=len(found.names.label)).tolist()
        write_names(folder / CLUSTERS, found.names, sizes)
        run = str(bundle.manifest.get("run_name") or "not told")
        facts = asdict(counts) | {"run": run, "matched_share": counts.matched_share, "kept_share": counts.kept_share}
        picture = slide, xy_px, columns
        write_page(folder / PAGE, *picture, found.names, found.expression, bundle.genes, markers, sizes, facts)
        close_record(record, folder, record.peak_device_bytes, began)
    return counts


def _on_slide(bundle: Bundle, slide: Slide, alignment: Alignment) -> tuple[XeniumNuclei, Float64]:
    """Return the nuclei that lie on the slide, and their level-0 places."""
    nuclei = bundle.nuclei()
    placed = alignment.to_slide(nuclei.centroid_um)
    inside = ((placed >= 0) & (placed < (slide.info.width_px, slide.info.height_px))).all(axis=1)
    if not inside.any():
        raise UsageError(f"{bundle.folder}: none of its nuclei lies on the slide; run `cellslide xenium check`")
    return XeniumNuclei(nuclei.cell[inside], nuclei.centroid_um[inside], nuclei.merged), placed[inside]


def _columns(found: CellLabels, nuclei: XeniumNuclei, pairs: Pairs, n: int, least: float) -> Columns:
    """Return the new columns of the n rows of the table."""
    order = np.argsort(found.cell, kind="stable")
    code = nuclei.cell[pairs.xenium]
    at = np.minimum(np.searchsorted(found.cell[order], code), len(order) - 1)
    good = found.cell[order][at] == code
    seen, cell = pairs.seen[good], order[at[good]]

    def spread(values: NDArray[Any], none: object, dtype: Any, rows: Int64 = seen) -> NDArray[Any]:
        column = np.full(n, none, dtype)
        column[rows] = values
        return column

    names = (*found.classes, AMBIGUOUS)
    label = np.where(found.label < 0, len(found.classes), found.label)[cell]
    purity, margin, confidence = (part[cell] for part in found.confidence)
    ids = np.array([id_text(int(one)) for one in code], object)
    return Columns({
        "label": Categorical(spread(label, -1, np.int16), names),
        "label_confidence": spread(confidence, np.nan, np.float32),
        "label_kept": spread(np.nan_to_num(confidence) >= least, False, np.bool_)
        & (spread(label, -1, np.int64) < len(found.classes)),
        "purity": spread(purity, np.nan, np.float32),
        "margin": spread(margin, np.nan, np.float32),
        "cluster": spread(found.clusters.cluster[cell], -1, np.int32),
        "matched_um": spread(pairs.distance_um, np.nan, np.float32, pairs.seen),
        "xenium_cell": spread(ids, "", object, pairs.seen),
    })  # fmt: skip


def _count(found: CellLabels, columns: Columns, pairs: Pairs, n_seen: int, n_xenium: int) -> LabelCounts:
    label, kept = columns.obs["label"], np.asarray(columns.obs["label_kept"])
    assert isinstance(label, Categorical)
    labelled = (label.codes >= 0) & (label.codes < len(found.classes))
    by_class = np.bincount(label.codes[kept].astype(np.int64), minlength=len(found.classes))
    return LabelCounts(
        found.n_cells, found.left_out, len(found.names.label), int((label.codes == len(found.classes)).sum()), n_seen,
        n_xenium, len(pairs.seen), int(labelled.sum()), int(kept.sum()),
        dict(zip(found.classes, by_class.tolist(), strict=False)),
    )  # fmt: skip


def _settings(
    bundle: Bundle, alignment: Alignment, markers: Markers, settings: LabelSettings, counts: LabelCounts
) -> dict[str, Any]:
    return {
        "bundle": str(bundle.folder.resolve()), "version": ".".join(map(str, bundle.version)),
        "run": str(bundle.manifest.get("run_name") or ""), "alignment": alignment.matrices.tolist(),
        "markers": {name: list(genes) for name, genes in markers.genes.items()}, **asdict(settings),
        "counts": asdict(counts),
    }  # fmt: skip


def _extend(table: CellTable, columns: Columns, record: Any) -> None:
    extender = TableExtender(table)
    try:
        for start in range(0, max(len(table), 1), BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, len(table)))
            extender.append(Columns({name: _rows(column, rows) for name, column in columns.obs.items()}))
        extender.close(record)
    except BaseException:
        extender.abort()
        raise


def _rows(column: Any, rows: slice) -> Any:
    return Categorical(column.codes[rows], column.names) if isinstance(column, Categorical) else column[rows]
