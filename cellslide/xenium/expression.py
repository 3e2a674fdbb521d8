"""Counts of genes by cell from the transcripts, and their clusters, by scanpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from cellslide.errors import MissingDependencyError, UsageError
from cellslide.types import Bool, Float64, Int64
from cellslide.xenium.bundle import Bundle, XeniumCells

MERGE_EVERY = 32
MOST_GENES = 2000
N_PCA, N_NEIGHBOURS, RESOLUTION = 30, 15, 0.6
# From so many cells on scanpy looks for neighbours by descent, not exactly.
MANY_CELLS = 8192


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """How cells are chosen, clustered, named and kept.

    least_transcripts, least_genes  of a cell, of transcripts with `least_qv`; nucleus_um2  its least and largest area.
    least_margin      by how much the best class must lead, in SDs of expression.
    neighbours        cells around each, itself among them, whose labels make its purity.
    least_confidence  of a label that is kept; match_um  farthest nucleus on the slide that is the same one.
    """

    least_qv: float = 20.0
    least_transcripts: int = 20
    least_genes: int = 5
    nucleus_um2: tuple[float, float] = (5.0, 300.0)
    resolution: float = RESOLUTION
    least_margin: float = 0.25
    neighbours: int = 50
    least_confidence: float = 0.6
    match_um: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("--min-qv", self.least_qv, 0, 40), ("--min-transcripts", self.least_transcripts, 1, 10_000),
            ("--min-genes", self.least_genes, 1, 10_000), ("--resolution", self.resolution, 0.01, 10),
            ("--min-margin", self.least_margin, 0, 10), ("--min-confidence", self.least_confidence, 0, 1),
            ("--match-um", self.match_um, 0.1, 20),
        ):  # fmt: skip
            if not low <= value <= high:
                raise UsageError(f"{name} {value:g}: must be {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class Clusters:
    """Of N cells: log expression (CSR, N x G), place in the space of components, and cluster, 0 the largest."""

    log: sp.csr_matrix
    pca: Float64
    cluster: Int64


def count_genes(bundle: Bundle, cells: XeniumCells, least_qv: float) -> sp.csr_matrix:
    """Return transcripts of each gene in each cell, CSR int32 (N, G), in one pass, without controls and low quality."""
    shape = len(cells.cell), len(bundle.genes)
    order = np.argsort(cells.cell, kind="stable")
    codes = cells.cell[order]
    total, parts = sp.csr_matrix(shape, dtype=np.int32), []
    for block in bundle.transcripts():
        used = block.kept(least_qv) & (block.cell >= 0)
        at = np.minimum(np.searchsorted(codes, block.cell[used]), max(len(codes) - 1, 0))
        known = codes[at] == block.cell[used] if len(codes) else np.zeros(0, np.bool_)
        row, gene = order[at[known]], block.gene[used][known]
        parts.append(sp.csr_matrix((np.ones(len(row), np.int32), (row, gene)), shape=shape))
        if len(parts) == MERGE_EVERY:
            total, parts = total + _sum(parts), []
    return sp.csr_matrix(total + _sum(parts)) if parts else total


def _sum(parts: list[sp.csr_matrix]) -> sp.csr_matrix:
    """Add the blocks first, which are small beside what they are added to."""
    return sum(parts[1:], start=parts[0])


def good_cells(counts: sp.csr_matrix, cells: XeniumCells, settings: LabelSettings) -> tuple[Bool, dict[str, int]]:
    """Tell which cells are good enough (N,), and how many are not, by reason; a cell counts under its first."""
    area, (low, high) = cells.nucleus_area_um2, settings.nucleus_um2
    transcripts = np.asarray(counts.sum(axis=1)).ravel()
    genes = np.diff(counts.indptr)
    reasons = {
        "no nucleus": area == 0,
        f"nucleus not {low:g} to {high:g} µm²": (area < low) | (area > high),
        f"fewer than {settings.least_transcripts} transcripts": transcripts < settings.least_transcripts,
        f"fewer than {settings.least_genes} genes": genes < settings.least_genes,
    }
    good, left = np.ones(len(area), np.bool_), {}
    for reason, bad in reasons.items():
        left[reason] = int((good & bad).sum())
        good &= ~bad
    return good, left


def cluster_cells(counts: sp.csr_matrix, settings: LabelSettings) -> Clusters:
    """Cluster cells as NuClass does: 1e4 a cell, log1p, 30 components, 15 neighbours, Leiden; clusters by their size.

    Of a panel of more than 2000 genes the components see the 2000 most variable ones (by counts, `seurat_v3`).
    Raises MissingDependencyError where scanpy or igraph is not installed, UsageError for too few cells.
    """
    scanpy, anndata = require_scanpy()
    if counts.shape[0] < 3 * N_NEIGHBOURS:
        raise UsageError(f"{counts.shape[0]} cells are good enough; clustering needs {3 * N_NEIGHBOURS} or more")
    data = anndata.AnnData(counts.astype(np.float32))
    if counts.shape[1] > MOST_GENES:
        scanpy.pp.highly_variable_genes(data, n_top_genes=MOST_GENES, flavor="seurat_v3")
    scanpy.pp.normalize_total(data, target_sum=1e4)
    scanpy.pp.log1p(data)
    n_pca = min(N_PCA, min(data.shape) - 1)
    scanpy.pp.pca(data, n_comps=n_pca, random_state=settings.seed)
    finder = _neighbour_finder(settings.seed) if len(data) >= MANY_CELLS else None
    scanpy.pp.neighbors(data, n_neighbors=N_NEIGHBOURS, random_state=settings.seed, transformer=finder)
    scanpy.tl.leiden(
        data,
        resolution=settings.resolution,
        flavor="igraph",
        n_iterations=2,
        directed=False,
        random_state=settings.seed,
    )
    found = data.obs["leiden"].cat.codes.to_numpy().astype(np.int64)
    return Clusters(sp.csr_matrix(data.X), np.asarray(data.obsm["X_pca"], np.float64), _by_size(found))


def _neighbour_finder(seed: int) -> Any:
    """Return the search by descent that scanpy takes for many cells, in a form that it can read.

    From its version 0.7 on pynndescent gives a csr_array, which scanpy up to 1.11 does not know.
    """
    from pynndescent import PyNNDescentTransformer

    class Finder(PyNNDescentTransformer):  # type: ignore[misc]
        def fit_transform(self, data: Any, *given: Any, **named: Any) -> sp.csr_matrix:
            return sp.csr_matrix(super().fit_transform(data, *given, **named))

    return Finder(n_neighbors=N_NEIGHBOURS, metric="euclidean", random_state=seed, n_jobs=1)


def _by_size(cluster: Int64) -> Int64:
    """Number clusters from the largest."""
    order = np.argsort(-np.bincount(cluster), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[cluster]


def cluster_means(clusters: Clusters) -> tuple[Float64, Float64]:
    """Return mean log expression (K, G) of the clusters, and the same in SDs of all cells from their mean."""
    n, k = len(clusters.cluster), int(clusters.cluster.max()) + 1
    member = sp.csr_matrix((np.ones(n), (clusters.cluster, np.arange(n))), shape=(k, n))
    mean = np.asarray((member @ clusters.log).todense()) / np.bincount(clusters.cluster)[:, None]
    overall = np.asarray(clusters.log.mean(axis=0)).ravel()
    square = np.asarray(clusters.log.multiply(clusters.log).mean(axis=0)).ravel()
    sd = np.sqrt(np.maximum(square - overall**2, 0))
    return mean, (mean - overall) / np.where(sd > 0, sd, 1)


def require_scanpy() -> tuple[Any, Any]:
    """Return scanpy and anndata; raises MissingDependencyError where they or igraph are not installed."""
    try:
        import anndata
        import igraph  # noqa: F401
        import scanpy
    except ImportError as error:
        raise MissingDependencyError(f"{error.name} is not installed: pip install 'cellslide[spatial]'") from error
    return scanpy, anndata
