"""The notebooks of examples/notebooks: committed without outputs, and every cell runs in order, offline."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT

FOLDER = CHECKOUT / "examples" / "notebooks"
# What a notebook must have at its end: names of its variables.
MADE = {
    "one_slide": ("table", "frame", "picture"),
    "cohort": ("cohort", "density", "failed"),
    "correct_train_compare": ("found", "scores", "comparison"),
}


def read_cells(name: str) -> list[dict[str, Any]]:
    """Return the cells of a notebook."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return notebook["cells"]


def test_all_are_known_listed_and_without_outputs() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(MADE)
    page = (CHECKOUT / "examples" / "README.md").read_text(encoding="utf-8")
    for name in MADE:
        assert f"notebooks/{name}.ipynb" in page
        code = [cell for cell in read_cells(name) if cell["cell_type"] == "code"]
        assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.fixture
def drawn_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.mark.parametrize("name", MADE)
@pytest.mark.usefixtures("drawn_nowhere")
def test_cells_run_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "correct_train_compare":
        pytest.importorskip("cellslide.train.framework", reason="extra `train` is not installed")
    monkeypatch.chdir(tmp_path)
    # Commands that a notebook starts find the package that is tested.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH")))))
    scope: dict[str, Any] = {}
    for number, cell in enumerate(read_cells(name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}.ipynb cell {number}", "exec"), scope)
    made = [scope[variable] for variable in MADE[name]]
    assert all(len(value) for value in made)
    if name == "cohort":
        assert list(made[2]) == ["missing.tif"] and len(made[0]) == 3 and (made[0]["mm2"] > 0).all()
    if name == "correct_train_compare":
        assert made[2].notna().all(axis=None) and made[2].loc["F1", "ships"] > 0.5
