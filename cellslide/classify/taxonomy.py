"""Projection of a classifier's classes onto the classes of a study: p_eval = M^T p.

A matrix M is a CSV with the header `class,NAME,NAME,...` and one row of 0 and 1 per class of the classifier. A class
without a row, or with a row of zeros, has no counterpart: its probability is lost, and how much is lost is reported.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellslide.errors import UsageError
from cellslide.types import Float32

FOLDER = Path(__file__).resolve().parent.parent / "data" / "taxonomies"


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """A projection of K classes onto E others.

    matrix  float32 (K, E) of 0 and 1, rows in the classifier's order, at most one 1 in a row.
    names   the E classes that are projected onto.
    """

    name: str
    matrix: Float32
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or self.matrix.shape[1] != len(self.names):
            raise ValueError(f"matrix {self.matrix.shape} for {len(self.names)} classes")
        if not np.isin(self.matrix, (0, 1)).all() or (self.matrix.sum(axis=1) > 1).any():
            raise ValueError("entries must be 0 or 1, and a class may map to one class at most")

    @property
    def lost(self) -> NDArray[np.bool_]:
        """Bool (K,): the classes without a counterpart."""
        return np.asarray(self.matrix.sum(axis=1) == 0, np.bool_)


def known_taxonomies() -> tuple[str, ...]:
    """Return the names of the matrices that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.csv")))


def load_taxonomy(name_or_path: str | Path, classes: Sequence[str]) -> Taxonomy:
    """Return the projection of `classes` (a classifier's, in order) by a matrix of the package or a CSV file.

    Case, blanks, - and _ in class names make no difference. The matrices of the package are those of NuClass,
    appendix D. Raises UsageError on an unknown name, a damaged file, and a row whose class is not in `classes`.
    """
    path = FOLDER / f"{name_or_path}.csv"
    path = path if str(name_or_path) in known_taxonomies() else Path(name_or_path)
    if not path.is_file():
        raise UsageError(
            f"--taxonomy {name_or_path}: no such file, and the matrices at hand are {', '.join(known_taxonomies())}"
        )
    names, rows = _read(path)
    place = {_key(c): i for i, c in enumerate(classes)}
    matrix = np.zeros((len(classes), len(names)), np.float32)
    for name, values in rows:
        if _key(name) not in place:
            near = get_close_matches(name, classes, n=3, cutoff=0.4) or list(classes)
            raise UsageError(f"--taxonomy {path}: these weights know no class {name}; near are {', '.join(near)}")
        matrix[place[_key(name)]] = values
    return Taxonomy(path.stem, matrix, names)


def project(prob: NDArray[Any], taxonomy: Taxonomy) -> tuple[Float32, Float32]:
    """Return M^T p for each row of `prob` (N, K), float32 (N, E), and the probability that falls on no class, (N,).

    Nothing is scaled up to make good for what is lost. NuClass eq. 25. Raises ValueError on another number of classes.
    """
    if prob.shape[1] != len(taxonomy.matrix):
        raise ValueError(f"probabilities of {prob.shape[1]} classes, the taxonomy is for {len(taxonomy.matrix)}")
    p = np.asarray(prob, np.float64)
    lost = p[:, taxonomy.lost].sum(axis=1)
    return (p @ taxonomy.matrix).astype(np.float32), lost.astype(np.float32)


def _key(name: str) -> str:
    return name.strip().casefold().replace(" ", "_").replace("-", "_")


def _read(path: Path) -> tuple[tuple[str, ...], list[tuple[str, list[float]]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--taxonomy {path}: cannot be read as CSV ({error})") from error
    if not lines or len(lines[0]) < 2 or lines[0][0] != "class":
        raise UsageError(f"--taxonomy {path}: the header must be class,NAME,NAME,...")
    names = tuple(lines[0][1:])
    if len({_key(n) for n in names}) != len(names) or not all(names):
        raise UsageError(f"--taxonomy {path}: a class of the header is empty or given twice")
    rows = [_row(line, len(names), path) for line in lines[1:]]
    if len({_key(name) for name, _ in rows}) != len(rows):
        raise UsageError(f"--taxonomy {path}: a class has two rows")
    return names, rows


def _row(line: list[str], n_names: int, path: Path) -> tuple[str, list[float]]:
    name, cells = line[0], line[1:]
    if len(cells) != n_names or not set(cells) <= {"0", "1"} or cells.count("1") > 1:
        raise UsageError(f"--taxonomy {path}: the row of {name} must have {n_names} values, 0 save for one 1 at most")
    return name, [float(cell) for cell in cells]
