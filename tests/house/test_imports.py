"""Imports point down from room to room: read from the source, so that lazy imports inside functions count too."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.conftest import CHECKOUT

PACKAGE = CHECKOUT / "cellslide"

# A file may import from its own room, from rooms of its own rank and from those below (docs/architecture.md).
ROOMS = (
    "cli > api > batch > bench, train, view, embed, measure, dataset > genes > evaluate, report, xenium > classify, "
    "pipeline > inference, formats > weights, slides, plausibility > models, store, nuclei > geometry > config, "
    "progress > types, errors"
)
RANKS = {room.strip(): rank for rank, rooms in enumerate(ROOMS.split(">")) for room in rooms.split(",")}
RANKS |= {"": -2, "__main__": -2}
NUMPY_ONLY = ("types", "errors", "config", "progress", "geometry", "nuclei", "store", "slides", "plausibility",
              "evaluate", "formats", "xenium")  # fmt: skip
NO_NUMPY = {"torch", "timm", "lightning", "torchvision", "onnxruntime"}
FORBIDDEN = {("models", "store"), ("models", "slides"), ("evaluate", "models"), ("evaluate", "weights")}
# Pairs of files that import each other, each with its reason; none is to be added.
CIRCLES = {
    ("weights.cache", "weights.manifest"): "entries that users add lie in the cache folder",
}


@cache
def sources() -> dict[str, Path]:
    """Return the files of the package by their dotted names below it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """Return the dotted names that a file imports, as they are written."""
    path, found = sources()[name], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def own_imports(name: str) -> set[str]:
    """Return the files of the package that a file imports."""
    found = set()
    for dotted in imports(name):
        if dotted == "cellslide" or dotted.startswith("cellslide."):
            inside = dotted.removeprefix("cellslide").lstrip(".")
            found.add(inside if inside in sources() else inside.rpartition(".")[0])
    return found - {name}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_imports_point_down() -> None:
    wrong = []
    for name in sources():
        assert room(name) in RANKS, f"{name} lies in no room of the line"
        for other in own_imports(name):
            # The face of the package holds its version and nothing that works.
            if other and (RANKS[room(other)] < RANKS[room(name)] or (room(name), room(other)) in FORBIDDEN):
                wrong.append(f"{name} imports {other}, which stands above it")
    assert not wrong, "\n".join(wrong)


def test_no_two_files_import_each_other() -> None:
    found = {(a, b) for a in sources() for b in own_imports(a) if a < b and a in own_imports(b) and a}
    assert found == set(CIRCLES)


def test_no_longer_circles() -> None:
    """Take away files that import none of those left, until nothing is left."""
    left = {name: own_imports(name) for name in sources() if name}
    for a, b in CIRCLES:
        left[a].discard(b)
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"these import each other in a circle: {sorted(left)}"
        for name in free:
            del left[name]


def test_rooms_of_numpy_know_no_torch() -> None:
    for name in sources():
        if room(name) in NUMPY_ONLY:
            assert not {dotted.partition(".")[0] for dotted in imports(name)} & NO_NUMPY, name


def test_few_files_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    assert {room(name) for name in sources()} <= RANKS.keys()


def test_help_is_quick() -> None:
    """Processor time, best of 5: wall time would measure what else this machine does."""
    took = []
    for _ in range(5):
        before = os.times()
        answer = subprocess.run(
            [sys.executable, "-m", "cellslide", "--help"], cwd=CHECKOUT, capture_output=True, text=True, check=True
        )
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert "segment" in answer.stdout
    assert min(took) < 0.5, f"--help took {min(took):.2f} s"


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "timm", "geopandas", "zarr", "cv2", "numpy", "pandas", "shapely", "yaml", "rich.console"]
    code = (
        "import sys\nfrom cellslide.cli.main import cli\n"
        "try:\n    cli(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print('HEAVY', [m for m in {heavy} if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip().endswith("HEAVY []")
