"""Painted transcripts: a genuine Xenium bundle of made-up transcripts over given nuclei, for tests and demonstrations.

A number that is measured on such a bundle says nothing of tissue; it is named `painted-transcripts` wherever it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from scipy.spatial import cKDTree

from cellslide.store.atomic import beside, write_json, write_text
from cellslide.types import Float32, Float64, Int32, Int64
from cellslide.xenium.alignment import Alignment
from cellslide.xenium.bundle import UNASSIGNED, id_text

CONTROLS = (
    "NegControlProbe_00042",
    "NegControlCodeword_0500",
    "antisense_ULK3",
    "BLANK_0069",
    "UnassignedCodeword_0001",
)
CELL_REACH_UM = 8.0
NUCLEUS_RADIUS_UM = 3.5
RING_VERTICES = 12
Version = Literal["1.0.2", "1.7.1", "2.0.0", "3.1.0", "4.0.1"]


@dataclass(frozen=True, slots=True)
class PaintSettings:
    """How transcripts are painted and written.

    depth_sd     SD of the log-normal factor on all rates of a nucleus; spread_um  SD of a transcript's place about it.
    ambient      share of transcripts that lie anywhere; low_qv  share whose quality is drawn from 0 to 20, else 40.
    controls     share of controls; doublets  share of nuclei that draw from a neighbour's rates too, half and half.
    version      decides columns and ids: numbers below 1.3, bytes in parquet below 2, text from 2 on.
    """

    pixel_size: float = 0.2125
    depth_sd: float = 0.5
    spread_um: float = 3.0
    ambient: float = 0.05
    low_qv: float = 0.1
    controls: float = 0.01
    doublets: float = 0.0
    version: Version = "3.1.0"
    ending: Literal[".parquet", ".csv.gz", ".csv"] = ".parquet"
    row_group: int = 50_000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PaintedBundle:
    """What was painted: the folder, its alignment file, uint32 (N, G) transcripts that each nucleus drew, doublets."""

    folder: Path
    alignment: Path
    counts: Int32
    doublet: Int64


def turned_matrix(
    size_px: tuple[int, int], mpp: float, pixel_size: float, turn_degrees: float = 90.0, mirrored: bool = False
) -> Float64:
    """Return a matrix from a slide's level-0 pixels to morphology pixels, turned, with no negative place."""
    angle, scale = np.radians(turn_degrees), mpp / pixel_size
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    turn = turn @ np.diag([-1.0 if mirrored else 1.0, 1.0])
    width, height = size_px
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64) @ turn.T
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = turn, 100.0 - corners.min(axis=0)
    return matrix


def paint_bundle(
    folder: Path, xy_px: Float64, rates: Float64, genes: Sequence[str], matrix: Float64,
    settings: PaintSettings | None = None,
) -> PaintedBundle:  # fmt: skip
    """Write a Xenium bundle with transcripts of nuclei at level-0 places (N, 2) of a slide.

    rates   float (N, G), mean transcripts of each gene in a nucleus of middle depth.
    matrix  3x3, level-0 pixels to pixels of the morphology image, written beside the bundle as Xenium Explorer does.
    """
    settings = settings or PaintSettings()
    rng = np.random.default_rng(settings.seed)
    place_um = Alignment(matrix[None], settings.pixel_size).to_um(np.asarray(xy_px, np.float64))
    doublet = np.flatnonzero(rng.random(len(xy_px)) < settings.doublets)
    drawn = np.array(rates, np.float64)
    if len(doublet):
        other = cKDTree(place_um).query(place_um[doublet], k=2)[1][:, 1]
        drawn[doublet] = (rates[doublet] + rates[other]) / 2
    depth = rng.lognormal(0, settings.depth_sd, len(xy_px))
    counts = rng.poisson(drawn * depth[:, None])
    folder.mkdir(parents=True, exist_ok=True)
    rows = _transcripts(rng, place_um, counts, settings)
    ids = _ids(settings, len(xy_px))
    _write(
        folder / f"transcripts{settings.ending}",
        _transcript_table(rng, rows, (*genes, *CONTROLS), ids, settings),
        settings,
    )
    _write(folder / f"cells{settings.ending}", _cell_table(place_um, rows, len(genes), ids), settings)
    for stem, radius in (("nucleus_boundaries", NUCLEUS_RADIUS_UM), ("cell_boundaries", 2 * NUCLEUS_RADIUS_UM)):
        _write(folder / f"{stem}{settings.ending}", _ring_table(place_um, radius, ids, settings), settings)
    _write_manifest(folder, genes, len(xy_px), settings)
    alignment = folder / "he_imagealignment.csv"
    write_text(alignment, "".join(",".join(f"{value:.12g}" for value in row) + "\n" for row in matrix))
    return PaintedBundle(folder, alignment, counts.astype(np.int32), doublet)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Transcripts: places in µm (M, 2), features, the nucleus (row) in whose cell each lies or -1, quality."""

    xy_um: Float64
    feature: Int64
    owner: Int64
    qv: Float32


def _transcripts(rng: np.random.Generator, place_um: Float64, counts: Any, settings: PaintSettings) -> _Rows:
    nucleus, gene = np.nonzero(counts)
    times = counts[nucleus, gene]
    nucleus, gene = np.repeat(nucleus, times), np.repeat(gene, times)
    xy = place_um[nucleus] + rng.normal(0, settings.spread_um, (len(nucleus), 2))
    n_ambient, n_controls = (int(len(gene) * share) for share in (settings.ambient, settings.controls))
    low, high = (place_um.min(axis=0), place_um.max(axis=0)) if len(place_um) else (np.zeros(2), np.ones(2))
    anywhere = rng.uniform(low, high, (n_ambient + n_controls, 2))
    feature = np.concatenate([
        gene, rng.permutation(gene)[:n_ambient], counts.shape[1] + rng.integers(0, len(CONTROLS), n_controls)
    ])  # fmt: skip
    xy = np.concatenate([xy, anywhere])
    far, owner = cKDTree(place_um).query(xy) if len(place_um) else (np.empty(0), np.empty(0, np.int64))
    qv = np.where(rng.random(len(xy)) < settings.low_qv, rng.uniform(0, 20, len(xy)), 40.0).astype(np.float32)
    order = rng.permutation(len(xy))
    return _Rows(xy[order], feature[order], np.where(far <= CELL_REACH_UM, owner, -1)[order], qv[order])


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _ids(settings: PaintSettings, n: int) -> pa.Array:
    """Return the ids of n cells and, last, the word for none."""
    if _parts(settings.version) < (1, 3):
        return pa.array([*range(1, n + 1), UNASSIGNED], pa.int32())
    rng = np.random.default_rng(settings.seed)
    prefix = rng.choice(np.arange(1, max(8 * n, 2), dtype=np.int64) * 37 + 4000, n, replace=False)
    texts = [*(id_text((int(one) << 31) | 1) for one in prefix), "UNASSIGNED"]
    as_bytes = _parts(settings.version) < (2,) and settings.ending == ".parquet"
    return pa.array([text.encode() for text in texts], pa.binary()) if as_bytes else pa.array(texts)


def _transcript_table(
    rng: np.random.Generator, rows: _Rows, features: Sequence[str], ids: pa.Array, settings: PaintSettings
) -> pa.Table:
    n, version = len(rows.feature), _parts(settings.version)
    names = pa.array([name.encode() for name in features]) if pa.types.is_binary(ids.type) else pa.array(features)
    is_gene = rows.feature < len(features) - len(CONTROLS)
    columns: dict[str, Any] = {
        "transcript_id": pa.array(np.arange(n, dtype=np.uint64) + (1 << 48)),
        "cell_id": ids.take(pa.array(np.where(rows.owner < 0, len(ids) - 1, rows.owner))),
        "overlaps_nucleus": pa.array((rows.owner >= 0).astype(np.uint8)),
        "feature_name": pa.DictionaryArray.from_arrays(pa.array(rows.feature.astype(np.int32)), names),
        "x_location": rows.xy_um[:, 0].astype(np.float32),
        "y_location": rows.xy_um[:, 1].astype(np.float32),
        "z_location": rng.uniform(10, 20, n).astype(np.float32),
        "qv": rows.qv,
    }
    if version >= (1, 3):
        columns |= {"fov_name": pa.array(["A1"] * n), "nucleus_distance": np.zeros(n, np.float32)}
    if version >= (3,):
        columns |= {"codeword_category": pa.array(["predesigned_gene"] * n), "is_gene": pa.array(is_gene)}
    if settings.ending != ".parquet":
        columns["feature_name"] = columns["feature_name"].dictionary_decode()
    return pa.table(columns)


def _cell_table(place_um: Float64, rows: _Rows, n_genes: int, ids: pa.Array) -> pa.Table:
    n = len(place_um)
    inside = (rows.owner >= 0) & (rows.qv >= 20)
    genes = np.bincount(rows.owner[inside & (rows.feature < n_genes)], minlength=n)
    every = np.bincount(rows.owner[inside], minlength=n)
    return pa.table({
        "cell_id": ids.slice(0, n), "x_centroid": place_um[:, 0], "y_centroid": place_um[:, 1],
        "transcript_counts": genes, "control_probe_counts": every - genes, "total_counts": every,
        "cell_area": np.full(n, np.pi * (2 * NUCLEUS_RADIUS_UM) ** 2),
        "nucleus_area": np.full(n, np.pi * NUCLEUS_RADIUS_UM**2),
    })  # fmt: skip


def _ring_table(place_um: Float64, radius_um: float, ids: pa.Array, settings: PaintSettings) -> pa.Table:
    n, angle = len(place_um), np.linspace(0, 2 * np.pi, RING_VERTICES + 1)
    ring = radius_um * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    ring[-1] = ring[0]
    xy = (place_um[:, None] + ring).reshape(-1, 2).astype(np.float32)
    row = np.repeat(np.arange(n), len(ring))
    columns: dict[str, Any] = {"cell_id": ids.take(pa.array(row)), "vertex_x": xy[:, 0], "vertex_y": xy[:, 1]}
    if _parts(settings.version) >= (3,):
        columns["label_id"] = (row + 1).astype(np.uint32)
    return pa.table(columns)


def _write(path: Path, table: pa.Table, settings: PaintSettings) -> None:
    with beside(path) as scratch:
        if settings.ending == ".parquet":
            pq.write_table(table, scratch, row_group_size=settings.row_group)
            return
        packed = "gzip" if settings.ending == ".csv.gz" else None
        with pa.output_stream(scratch, compression=packed) as stream:
            pa_csv.write_csv(table, stream)


def _write_manifest(folder: Path, genes: Sequence[str], n: int, settings: PaintSettings) -> None:
    version = _parts(settings.version)
    manifest: dict[str, Any] = {
        "run_name": "painted-transcripts", "region_name": "painted-transcripts", "num_cells": n,
        "panel_name": "painted-transcripts", "panel_num_targets_predesigned": len(genes),
        "panel_num_targets_custom": 0, "pixel_size": settings.pixel_size,
        "analysis_sw_version": f"{'xenium' if version[0] % 2 else 'Xenium'}-{settings.version}.0",
    }  # fmt: skip
    if version >= (2,):
        manifest |= {"major_version": 5, "minor_version": 0}
    write_json(folder / "experiment.xenium", manifest)
    kinds = [*(("gene", name) for name in genes), *(("negative_control_probe", name) for name in CONTROLS)]
    targets = [
        {"type": {"descriptor": kind, "data": {"name": name}}, "codewords": [k]} for k, (kind, name) in enumerate(kinds)
    ]
    write_json(folder / "gene_panel.json", {"payload": {"targets": targets}})
