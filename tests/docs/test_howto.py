"""The how-to pages do what they say: their commands and their Python are run in order, up to another program's window.

Commands of cellslide run with fake networks on a painted slide. Of another program's command it is checked that the
files it is given are there. Python marked "window" must compile; the rest of a page's Python is one program.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cellslide.cli.main import cli
from tests.conftest import CHECKOUT
from tests.house.test_style import PROJECT
from tests.painted import grid_centres, paint_slide
from tests.support.cluster_fakes import load_fake_classifier
from tests.support.fakes import fake_model

FOLDER = CHECKOUT / "docs" / "how-to"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
TUTORIAL = CHECKOUT / "docs" / "tutorial.md"
FLAGS = {
    "run": ("--no-tissue", "--device", "cpu", "--workers", "0", "--no-progress"),
    "classify": ("--device", "cpu", "--no-progress"),
}
FENCED = r"^```([^\n]*)\n(.*?)^```$"
N = 48
OTHERS = {"napari", "tissuumaps_server", "npx"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: what its opening line says, and its text."""

    kind: str
    text: str


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks in order; every block of a page must say what it is."""
    for kind, text in re.findall(FENCED, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        assert kind in {"sh", "python", "python window", "groovy"}, f"{page.name}: a block of {kind!r}"
        yield Block(kind, text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a slide and what `cellslide run` makes of it."""
    folder = tmp_path_factory.mktemp("howto")
    centres = grid_centres(400, 300, 50)
    colors = [(255, 100, 100) if k % 2 else (60, 60, 220) for k in range(len(centres))]
    paint_slide(folder / "slide.tif", 400, 300, 0.5, centres, 7.0, disc_color=colors)
    (folder / "slide.tif").rename(folder / "slide.svs")
    with pytest.MonkeyPatch.context() as patch:
        fake(patch)
        patch.chdir(folder)
        call(("run", "slide.svs", "-o", "out", "--organ", "breast"))
    return folder


def fake(patch: pytest.MonkeyPatch) -> None:
    """Put fake networks in the place of those that ship."""
    patch.setattr("cellslide.weights.load_model", lambda *_: fake_model())
    patch.setattr("cellslide.weights.classifier.load_classifier", load_fake_classifier)
    patch.setenv("MPLBACKEND", "agg")


def call(arguments: tuple[str, ...]) -> None:
    """Run one command of cellslide; it must end well."""
    done = CliRunner().invoke(cli, [*arguments, *FLAGS.get(arguments[0], ())])
    assert done.exit_code == 0, f"cellslide {shlex.join(arguments)}\n{done.output}"


def run_shell(text: str) -> None:
    """Run the commands of a block, or look at what they name."""
    for line in filter(None, text.splitlines()):
        program, *arguments = shlex.split(line)
        if program == "cellslide":
            call(tuple(arguments))
        elif (program, arguments[0]) == ("pip", "install"):
            asked = re.findall(r"cellslide\[(\w+)\]", line)
            assert set(asked) <= set(PROJECT["optional-dependencies"]), line
        else:
            assert program in OTHERS, f"not a command that the pages may use: {line}"
            assert all(Path(name).exists() for name in arguments if name.startswith(("out", "."))), line


def check_groovy(text: str) -> None:
    """Look at the files that a script of QuPath reads; what it writes is written in its place."""
    for name in re.findall(r'importObjectsFromFile\("(.+?)"\)', text):
        assert Path(name).is_file(), name
    for name in re.findall(r'exportAllObjectsToGeoJson\("(.+?)"', text):
        Path(name).write_bytes(gzip.decompress(Path("out/slide/cells.geojson.gz").read_bytes()))


def missing_packages(blocks: list[Block]) -> list[str]:
    """Return the packages that the Python of a page imports and that are not here."""
    tree = [ast.parse(block.text) for block in blocks if block.kind == "python"]
    found = (node for part in tree for node in ast.walk(part) if isinstance(node, (ast.Import, ast.ImportFrom)))
    names = {a.name for node in found for a in node.names if isinstance(node, ast.Import)}
    names |= {n.module for part in tree for n in ast.walk(part) if isinstance(n, ast.ImportFrom) and n.module}
    return sorted(name for name in {name.split(".")[0] for name in names} if not importlib.util.find_spec(name))


@pytest.fixture
def world(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in a copy of the finished folder; returns the names that the page's Python makes."""
    shutil.copytree(finished, tmp_path / "here")
    fake(monkeypatch)
    monkeypatch.chdir(tmp_path / "here")
    return {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [*PAGES, TUTORIAL], ids=lambda page: page.stem)
def test_page_does_what_it_says(page: Path, world: dict[str, Any]) -> None:
    blocks = list(blocks_of(page))
    if missing := missing_packages(blocks):
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'cellslide[test]'")
    assert any(block.kind == "sh" for block in blocks)
    for block in blocks:
        if block.kind == "sh":
            run_shell(block.text)
        elif block.kind == "groovy":
            check_groovy(block.text)
        else:
            code = compile(block.text, str(page), "exec")
            if block.kind == "python":
                exec(code, world)
    CHECKS.get(page.stem, lambda _: None)(world)


def napari_shows_each_nucleus(world: dict[str, Any]) -> None:
    n = len(world["centres"])
    assert n == len(world["colors"]) == int(world["levels"][0].max().compute()) == N
    assert world["scale"] == [0.5, 0.5] and len(set(world["colors"].values())) == 2
    assert world["picture"].shape[:2] == (75, 100) and world["zoom"] == 4
    y, x = world["centres"][7]
    assert int(world["levels"][0][int(y), int(x)].compute()) == 8


def scanpy_knows_classes(world: dict[str, Any]) -> None:
    assert world["cells"].n_obs == N and set(world["cells"].obs["class"]) == {"pink", "blue"}
    assert world["cohort"].n_obs == N and set(world["cohort"].obs["slide"]) == {"slide"}
    assert "rank_genes_groups" in world["sure"].uns and len(world["sure"]) == (~world["cells"].obs["abstained"]).sum()


def squidpy_finds_neighbours(world: dict[str, Any]) -> None:
    cells = world["cells"]
    # Discs stand 25 µm apart: within 50 µm are twelve places of a grid.
    assert int((cells.obsp["spatial_connectivities"] > 0).sum(1).max()) == 12
    assert cells.uns["class_nhood_enrichment"]["zscore"].shape == (2, 2)


def vitessce_finds_everything(world: dict[str, Any]) -> None:
    config = json.loads(Path("out/slide/vitessce.json").read_text())
    options = config["datasets"][0]["files"][0]["options"]
    named = [options["obsFeatureMatrix"]["path"], options["obsSegmentations"]["path"]]
    named += [options["obsSegmentations"]["tablePath"], *(found["path"] for found in options["obsSets"]["obsSets"])]
    for path in named:
        assert (Path("out/slide/cells.zarr") / path / "zarr.json").is_file(), path
    assert config["datasets"][0]["files"][0]["url"].endswith("/cells.zarr")
    scopes = {name for view in config["layout"] for name in view["coordinationScopes"]}
    assert scopes <= set(config["coordinationSpace"])


def corrected_nuclei_keep_their_ids(_: dict[str, Any]) -> None:
    from cellslide.store.cell_table import open_table

    first, second = (open_table(Path(name) / "slide" / "cells.zarr") for name in ("out", "corrected"))
    assert sorted(first.vector("uuid")) == sorted(second.vector("uuid")) and len(second) == N


def tissuumaps_names_the_slide(_: dict[str, Any]) -> None:
    project = json.loads(Path("out/slide/cells.tmap").read_text())
    source = Path("out/slide") / project["layers"][0]["tileSource"].removesuffix(".dzi")
    assert source.resolve() == Path("slide.svs").resolve()


def tutorial_ends_with_densities_and_a_picture(world: dict[str, Any]) -> None:
    assert world["counts"].sum() == N and set(world["counts"].index) <= {"pink", "blue", "abstained"}
    searched = 400 * 300 * 0.5**2 / 1e6
    assert world["per_mm2"].sum() == pytest.approx(N / searched, rel=1e-3)
    squares = pd.read_csv("densities.csv", index_col=["row", "column"])
    # 200 x 150 µm are two by two squares of 100 µm, the lower ones cut in half.
    assert list(squares) == ["per_mm2_pink", "per_mm2_blue"] and len(squares) == 4
    areas = np.array([0.01, 0.01, 0.005, 0.005])[:, None]
    said = N - world["squares"]["abstained"].sum()
    assert (squares.sort_index().to_numpy() * areas).sum() == pytest.approx(said, rel=1e-3)
    assert Path("densities.png").stat().st_size > 10_000 and Path("numbers/measure.html").is_file()


CHECKS = {
    "tutorial": tutorial_ends_with_densities_and_a_picture,
    "napari": napari_shows_each_nucleus,
    "scanpy": scanpy_knows_classes,
    "squidpy": squidpy_finds_neighbours,
    "vitessce": vitessce_finds_everything,
    "qupath": corrected_nuclei_keep_their_ids,
    "tissuumaps": tissuumaps_names_the_slide,
}


def test_every_page_is_listed_and_checked() -> None:
    listed = set(re.findall(r"\]\((\w+)\.md\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert listed == {page.stem for page in PAGES} == set(CHECKS) - {"tutorial"}


def test_the_readme_leads_to_each_page_and_shows_a_light_picture() -> None:
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert {page.stem for page in PAGES} <= set(re.findall(r"\]\(docs/how-to/(\w+)\.md\)", text))
    (picture,) = re.findall(r"!\[.+?\]\((.+?\.png)\)", text)
    assert 20_000 < (CHECKOUT / picture).stat().st_size < 300_000


@pytest.mark.parametrize("line", ["cellslide export out --format nothing", "npx http-server out/none", "wget x"])
def test_a_page_that_is_wrong_is_found(line: str, world: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        run_shell(line)
