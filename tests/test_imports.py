"""Imports point down: read from the source, so that lazy imports inside functions count too."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

PACKAGE = CHECKOUT / "cellslide"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a module may import from its own layer and from those before it.
LAYERS = (
    ("errors", "types"),
    (
        "across",
        "allocator",
        "kernels",
        "ring_kernels",
        "uuid_kernels",
        "shape_kernels",
    ),
    ("config", "record", "csvtext", "jsontext", "device", "pixelsize", "resample"),
    ("lock", "staging", "handing", "uuids", "text_kernels", "zarrchunks", "torchvision_ops", "ondevice"),
    ("readers", "tiles", "outlines", "models", "anndata_store", "demo"),
    ("slide", "hover", "points", "weights", "parts", "partial", "spatial"),
    ("gate", "taxonomy"),
    ("slides", "tissue", "tissue_detect", "merge", "table", "infer", "evaluate", "crops"),
    ("geojson", "featuretext", "labels", "h5ad", "tissuumaps", "detect", "onnx", "overlay", "nuclei_files", "reopen"),
    ("parquetjoin", "export", "segmenter", "report"),
    ("pipeline", "verify", "verify_geojson"),
    ("classify", "localcopy"),
    ("batch", "bench", "train", "pretrain", "calibrate", "explain", "embed", "probe"),
    ("view",),
    ("cohort", "devices", "devicework"),
    ("cluster",),
    ("cli",),
)
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
NUMPY_ONLY = {
    "types", "errors", "config", "slide", "slides", "tissue", "tiles", "hover", "merge", "outlines", "table",
    "geojson", "evaluate", "record", "parts", "partial", "gate", "taxonomy", "nuclei_files", "points",
}  # fmt: skip
FORBIDDEN = {
    "models": {"slide", "slides", "tissue", "tiles", "table", "pipeline", "cli"},
    "evaluate": {"models", "weights", "infer", "pipeline", "train"},
}


def _part(path: Path) -> str:
    """Return the module or subpackage right below `cellslide` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, `from cellslide import x` as `cellslide.x`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _own_parts(path: Path) -> set[str]:
    dotted = (name.split(".") for name in _imports(path) if name.startswith("cellslide."))
    return {names[1] for names in dotted if names[1] != "__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    part = _part(path)
    if part.startswith("__"):
        assert _own_parts(path) <= {"cli"}
        return
    assert part in RANKS, f"{part} has no place in the import order: give it one here and in docs/architecture.md"
    below = _own_parts(path) - {part}
    assert below <= set(RANKS), f"unknown modules {below - set(RANKS)}"
    assert part not in {"errors", "types"} or not below, f"{part} stands on nothing"
    wrong = {other for other in below if RANKS[other] > RANKS[part]}
    assert not wrong, f"{path.name} imports {wrong}, which stand above it"
    assert not below & FORBIDDEN.get(part, set())


@pytest.mark.parametrize("path", [p for p in MODULES if _part(p) in NUMPY_ONLY], ids=lambda p: p.stem)
def test_numpy_layers_know_no_torch(path: Path) -> None:
    roots = {name.split(".")[0] for name in _imports(path)}
    assert not roots & {"torch", "timm", "lightning", "torchvision", "onnxruntime"}


def test_cycle_between_files_of_one_rank_is_seen() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(_part(path), set()).update(_own_parts(path) - {_part(path)})
    done: list[str] = []
    while graph:
        free = sorted(name for name, needs in graph.items() if not needs & set(graph))
        assert free, f"these import each other in a circle: {sorted(graph)}"
        done += free
        for name in free:
            del graph[name]


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
