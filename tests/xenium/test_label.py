"""Labels of painted transcripts: what was painted is found, a class without markers is not, doubt ranks errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellslide import import_cells, open_slide, read_cells
from cellslide.errors import UsageError
from cellslide.formats.verify import verify_folder
from cellslide.store.anndata_columns import Categorical
from cellslide.types import Float64, Int64
from cellslide.xenium import expression
from cellslide.xenium.alignment import read_alignment
from cellslide.xenium.bundle import Bundle
from cellslide.xenium.confidence import match_nuclei, rate_labels, scale_margins
from cellslide.xenium.expression import LabelSettings, cluster_cells
from cellslide.xenium.label import COLUMNS, LabelCounts, label_slide
from cellslide.xenium.markers import AMBIGUOUS, name_clusters, override_names, read_markers, write_names
from tests.support.xenium_slide import CLASSES, GENES, PaintedPair, paint_pair, programmes

needs_spatial = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("scanpy", "igraph")), reason="needs the extra spatial"
)
WANTED = CLASSES[:3]


def test_markers_of_a_panel_and_their_coverage(tmp_path: Path) -> None:
    markers = read_markers("nuclass", [*GENES, "KRT17"])
    assert len(markers.asked) == 18
    assert all(len(genes) == 10 for genes in markers.asked.values())
    assert markers.genes["T_Cell"] == ("CD3D", "CD3E", "CD2", "CD4", "IL7R")
    assert "Acinar" not in markers.assignable
    assert any("Acinar: 0 of 10" in line and "cannot be assigned" in line for line in markers.coverage())
    assert any("T_Cell and Lymphocyte share 3 of 3" in line for line in markers.alike())
    assert not read_markers("nuclass", GENES, WANTED).alike()
    (tmp_path / "own.yaml").write_text("A: [hla.a, cd3d, CD3E]\nB: [GENE1, x]\n")
    own = read_markers(str(tmp_path / "own.yaml"), [*GENES, "HLA-A"])
    assert own.genes == {"A": ("HLA-A", "CD3D", "CD3E"), "B": ("GENE1",)}


@pytest.mark.parametrize("text", ["[]", "A: x", "A: []", "B: [GENE1, GENE2]"])
def test_marker_files_that_mark_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"m\.yaml"):
        read_markers(str(tmp_path / "m.yaml"), GENES)
    with pytest.raises(UsageError, match="--markers"):
        read_markers(str(tmp_path / "none.yaml"), GENES)
    with pytest.raises(UsageError, match="--classes"):
        read_markers("nuclass", GENES, ["Neuron"])


def test_clusters_take_the_class_that_leads(tmp_path: Path) -> None:
    markers = read_markers("nuclass", GENES, WANTED)
    z = np.zeros((3, len(GENES)))
    z[0, 5:10], z[0, :5] = 1.5, 0.2
    z[1, 5:10], z[1, 10:15] = 1.5, 1.4
    z[2] = -0.3
    names = name_clusters(z, GENES, markers, 0.25)
    assert names.label == ("T_Cell", AMBIGUOUS, AMBIGUOUS)
    assert names.second[1] == "Endothelial"
    assert names.margin[0] == pytest.approx(1.3)
    write_names(tmp_path / "c.csv", names, [3, 2, 1])
    text = (tmp_path / "c.csv").read_text()
    (tmp_path / "c.csv").write_text(text.replace("1,ambiguous", "1,Endothelial"))
    assert override_names(tmp_path / "c.csv", names, WANTED).label == ("T_Cell", "Endothelial", AMBIGUOUS)
    for wrong in ("1,Neuron", "7,T_Cell", "x,T_Cell"):
        (tmp_path / "c.csv").write_text(f"cluster,label\n{wrong}\n")
        with pytest.raises(UsageError, match=r"c\.csv"):
            override_names(tmp_path / "c.csv", names, WANTED)


def test_confidence_is_that_of_the_plain_form() -> None:
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    pca, log = rng.normal(size=(60, 4)), rng.uniform(0, 3, (60, 6))
    label = rng.integers(-1, 2, 60)
    markers = {"A": ["a", "b", "c"], "B": ["d", "e", "f"]}
    found = rate_labels(pca, sp.csr_matrix(log), label, ("A", "B"), markers, "abcdef", 10)
    for i in np.flatnonzero(label >= 0):
        near = np.argsort(((pca - pca[i]) ** 2).sum(axis=1))[:10]
        assert found.purity[i] == pytest.approx(((label[near] == label[i]).sum() - 1) / 9)
        means = log[i, :3].mean(), log[i, 3:].mean()
        assert found.margin[i] == pytest.approx(means[label[i]] - means[1 - label[i]])
    own = found.margin[label >= 0]
    mad = np.median(np.abs(own - np.median(own)))
    scaled = np.clip(0.5 + 0.5 * (own - np.median(own)) / (3 * mad), 0, 1)
    np.testing.assert_allclose(found.confidence[label >= 0], 0.6 * found.purity[label >= 0] + 0.4 * scaled)
    assert np.isnan(found.confidence[label < 0]).all()


def test_margins_that_hardly_differ_are_scaled_by_quartiles_then_by_the_deviation() -> None:
    most = np.array([0.0] * 9 + [1.0])
    assert scale_margins(most, np.ones(10, bool))[:9].tolist() == [0.5] * 9
    assert scale_margins(most, np.ones(10, bool))[9] == 1
    assert scale_margins(np.zeros(4), np.ones(4, bool)).tolist() == [0.5] * 4


def test_nuclei_match_one_to_one_the_nearest_first() -> None:
    seen = np.array([[0.0, 0], [10, 0], [20, 0]])
    xenium = np.array([[1.0, 0], [0.5, 0], [12.9, 0], [24, 0]])
    pairs = match_nuclei(seen, xenium, 3.0)
    assert pairs.seen.tolist() == [0, 1]
    assert pairs.xenium.tolist() == [1, 2]
    assert pairs.distance_um.tolist() == pytest.approx([0.5, 2.9])
    assert len(match_nuclei(seen, np.empty((0, 2)), 3.0).seen) == 0


def auroc(score: Float64, positive: Any) -> float:
    rank = np.argsort(np.argsort(score)) + 1
    n = int(positive.sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def label(pair: PaintedPair, folder: Path, **settings: Any) -> tuple[Path, LabelCounts]:
    """Import the painted nuclei as the slide's, 0.5 µm off, and label them."""
    rng = np.random.default_rng(3)
    xy = pair.xy_px + rng.normal(0, 2, pair.xy_px.shape)
    rows = "\n".join(f"{x:.2f},{y:.2f}" for x, y in xy)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nuclei.csv").write_text("x,y\n" + rows + "\n")
    import_cells(folder / "nuclei.csv", pair.slide, folder).close()
    bundle = Bundle(pair.bundle.folder)
    with open_slide(pair.slide) as slide:
        counts = label_slide(
            bundle, folder / slide.info.slide_id, slide, read_alignment(pair.bundle.alignment, bundle.pixel_size),
            read_markers("nuclass", bundle.genes, WANTED), LabelSettings(**settings),
        )  # fmt: skip
        return folder / slide.info.slide_id, counts


def true_kind(xy: Float64, pair: PaintedPair) -> Int64:
    from scipy.spatial import cKDTree

    return pair.kind[cKDTree(pair.xy_px).query(xy)[1]]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[PaintedPair, Path, LabelCounts]:
    folder = tmp_path_factory.mktemp("xenium")
    pair = paint_pair(folder / "pair", turn=90, mirrored=True, doublets=0.1, depth_sd=0.5)
    return pair, *label(pair, folder / "out")


@needs_spatial
def test_painted_labels_are_recovered(labelled: tuple[PaintedPair, Path, LabelCounts]) -> None:
    pair, folder, counts = labelled
    with read_cells(folder) as table:
        found, kept = table.column("label"), np.asarray(table.vector("label_kept"), bool)
        confidence = np.asarray(table.vector("label_confidence"))
        matched = np.asarray(table.vector("matched_um"))
        xy = np.stack([table.vector("x"), table.vector("y")], axis=1)
        assert set(COLUMNS) <= set(table.columns)
    assert isinstance(found, Categorical)
    words = np.array([*found.names, "none"], object)[found.codes]
    kind = true_kind(xy, pair)
    truth = np.array([*WANTED, AMBIGUOUS], object)[kind]
    assert counts.matched_share > 0.97
    assert np.nanmax(matched) <= 3
    assert (words[kept] == truth[kept]).mean() >= 0.95
    assert kept[kind < 3].mean() > 0.7
    assert (words[kind == 3] == AMBIGUOUS).mean() >= 0.85  # doublets may take another's class
    typed = np.isfinite(confidence)
    wrong = words[typed] != truth[typed]
    assert wrong.any()
    assert auroc(-confidence[typed].astype(float), wrong) >= 0.8
    assert not kept[words == AMBIGUOUS].any()
    assert sum(counts.labels.values()) == counts.kept == int(kept.sum())
    assert verify_folder(folder).agrees


@needs_spatial
def test_neighbours_of_many_cells_come_in_a_form_that_scanpy_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynndescent
    import scipy.sparse as sp
    from sklearn.neighbors import KNeighborsTransformer

    class Descent(KNeighborsTransformer):  # type: ignore[misc]
        """As pynndescent from 0.7 on, without the time that it takes to compile."""

        def __init__(self, n_neighbors: int, metric: str, random_state: int, n_jobs: int) -> None:
            super().__init__(n_neighbors=n_neighbors, metric=metric, n_jobs=n_jobs)
            self.random_state = random_state

        def fit_transform(self, data: Any, *given: Any) -> Any:
            return sp.csr_array(super().fit_transform(data))

    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 200)
    counts = sp.csr_matrix(rng.poisson(programmes()[kind]))
    few = cluster_cells(counts, LabelSettings()).cluster
    monkeypatch.setattr(expression, "MANY_CELLS", 100)
    monkeypatch.setattr(pynndescent, "PyNNDescentTransformer", Descent)
    many = cluster_cells(counts, LabelSettings()).cluster
    for other in (many, kind):
        assert len(set(zip(few.tolist(), other.tolist(), strict=True))) == 3


@needs_spatial
def test_the_table_opens_in_anndata_and_spatialdata(labelled: tuple[PaintedPair, Path, LabelCounts]) -> None:
    pytest.importorskip("spatialdata")
    with read_cells(labelled[1]) as table:
        data = table.to_anndata()
        assert set(WANTED) <= set(data.obs["label"].cat.categories)
        assert data.obs["label_confidence"].between(0, 1).sum() == labelled[2].labelled
        assert table.to_spatialdata()["cells"].obs["label"].equals(data.obs["label"])


@needs_spatial
def test_the_page_shows_labels(labelled: tuple[PaintedPair, Path, LabelCounts], chromium: Any) -> None:
    with chromium.page(width_px=1280) as page:
        page.open(labelled[1] / "xenium.html")
        assert page.text("#matched") == f"{labelled[2].matched_share:.1%}"
        assert page.text("#run") == "painted-transcripts"
        assert page.pixels("#scene-1").std() > 10
        page.shot("xenium-1280")
