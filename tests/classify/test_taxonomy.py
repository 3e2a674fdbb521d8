"""Projection of classes: the published matrices, and the probability that is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellslide.classify.taxonomy import Taxonomy, known_taxonomies, load_taxonomy, project
from cellslide.errors import UsageError

SIXTEEN = (
    *("Acinar", "B_Cell", "Cardiomyocyte", "Ductal", "Endocrine", "Endothelial", "Endothelial_TumorAssociated"),
    *("Epithelial_Airway", "Epithelial_Alveolar", "Epithelial_Malignant", "Fibroblast", "Macrophage", "Mast_Cell"),
    *("Smooth_Muscle", "T_Cell", "Tumor_Associated_Fibroblast"),
)
# class -> where it goes, as the paper's appendix D prints it; every other class goes nowhere.
PUBLISHED = {
    "lung": {c: c for c in ("Endothelial", "Epithelial_Malignant", "T_Cell", "Tumor_Associated_Fibroblast")},
    "ovary": {c: c for c in ("Endothelial", "Epithelial_Malignant", "Macrophage")},
    "pancreas": {c: c for c in ("Acinar", "Ductal", "Endocrine", "Endothelial", "T_Cell")}
    | {"Fibroblast": "Fibroblast_like", "Tumor_Associated_Fibroblast": "Fibroblast_like"},
}


def test_the_published_matrices_are_there() -> None:
    assert known_taxonomies() == tuple(sorted(PUBLISHED))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_matrices_are_the_published_ones(name: str) -> None:
    taxonomy = load_taxonomy(name, SIXTEEN)
    assert taxonomy.names == tuple(sorted(set(PUBLISHED[name].values())))
    found = {c: taxonomy.names[row.argmax()] for c, row in zip(SIXTEEN, taxonomy.matrix, strict=True) if row.any()}
    assert found == PUBLISHED[name]


def test_projection_sums_and_reports_what_is_lost() -> None:
    taxonomy = load_taxonomy("pancreas", SIXTEEN)
    prob = np.zeros((2, 16), np.float32)
    prob[0, [SIXTEEN.index(c) for c in ("Fibroblast", "Tumor_Associated_Fibroblast", "Mast_Cell")]] = (0.3, 0.45, 0.25)
    prob[1, SIXTEEN.index("Acinar")] = 1
    p_eval, lost = project(prob, taxonomy)
    assert p_eval.dtype == np.float32 and p_eval.shape == (2, 6)
    assert p_eval[0, taxonomy.names.index("Fibroblast_like")] == pytest.approx(0.75)
    np.testing.assert_allclose(lost, [0.25, 0.0], atol=1e-7)
    np.testing.assert_allclose(p_eval.sum(axis=1) + lost, 1, atol=1e-6)


def test_example_of_the_paper(tmp_path: Path) -> None:
    file = tmp_path / "toy.csv"
    file.write_text("class,w,x,y,z\na,1,0,0,0\nb,0,1,0,0\nc,0,1,0,0\nd,0,0,1,0\ne,0,0,0,1\n")
    taxonomy = load_taxonomy(file, tuple("abcde"))
    p_eval, lost = project(np.array([[0.10, 0.15, 0.35, 0.25, 0.15]]), taxonomy)
    np.testing.assert_allclose(p_eval, [[0.10, 0.50, 0.25, 0.15]], rtol=1e-6)
    assert taxonomy.name == "toy" and lost.tolist() == [0.0]


def test_names_are_found_whatever_their_case_and_blanks(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("class,Immune,Other\nt cell,1,0\nB-Cell,1,0\nacinar,0,1\n")
    taxonomy = load_taxonomy(file, SIXTEEN)
    assert taxonomy.matrix[SIXTEEN.index("T_Cell")].tolist() == [1, 0]
    assert taxonomy.lost.sum() == 13
    assert taxonomy.names == ("Immune", "Other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,A\nT_Sell,1\n", "near are T_Cell"),
        ("name,A\nT_Cell,1\n", "header must be"),
        ("class,A,B\nT_Cell,1,1\n", "one 1 at most"),
        ("class,A,B\nT_Cell,0.5,0\n", "one 1 at most"),
        ("class,A,B\nT_Cell,1\n", "2 values"),
        ("class,A,a\nT_Cell,1,0\n", "given twice"),
        ("class,A\nT_Cell,1\nt cell,0\n", "two rows"),
        ("", "header must be"),
    ],
)
def test_damaged_matrix_says_what(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_taxonomy(file, SIXTEEN)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="lung, ovary, pancreas"):
        load_taxonomy("liver", SIXTEEN)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 classes"):
        project(np.ones((1, 3)), load_taxonomy("lung", SIXTEEN))
    with pytest.raises(ValueError, match="one class at most"):
        Taxonomy("t", np.ones((2, 2), np.float32), ("a", "b"))
