"""The class of a nucleus is one thing: every file, page and snippet gives the same counts by class for one slide.

On the slide some nuclei abstain and some objects are rejected; the latter are in no count. Another rule changes all of
it at once, and so does a command that goes on from what an older version has written.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from click.testing import CliRunner

from cellslide.cli.main import cli
from cellslide.evaluate.dataset import Sample
from cellslide.evaluate.predictors import read_nuclei
from cellslide.report.compare.agreement import read_nuclei as compared_nuclei
from cellslide.report.explain.select import Selection, read_typed, select_cells
from cellslide.store.cell_table import open_table
from cellslide.store.table_schema import ABSTAINED, NOT_NUCLEUS
from cellslide.view.answers import Viewer
from tests.conftest import CHECKOUT
from tests.support.browser import Chromium
from tests.support.fakes import fake_model
from tests.support.older_table import make_version_1
from tests.support.rejecting import ABSTAIN, SIZE_PX, paint_doubtful, rejecting_classifier
from tests.view.test_page import ALL, HERE, looking, numbers, settled, slide_to
from tests.viewed import serving

FORMATS = "zarr,geojson,parquet,csv,labels,h5ad,tissuumaps"
QUICK = ("--device", "cpu", "--no-progress")
Counts = dict[str, int]


def invoke(*arguments: object) -> None:
    done = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the slide and its results in every format."""
    top = tmp_path_factory.mktemp("meaning")
    paint_doubtful(top / "slide.tif")
    (top / "slide.tif").rename(top / "slide.svs")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, top / "slide.svs", top / "out")
    return top


def run(patch: pytest.MonkeyPatch, slide: Path, out: Path) -> None:
    """Run fake networks on the slide, into every format."""
    patch.setattr("cellslide.weights.load_model", lambda *_: fake_model())
    patch.setattr("cellslide.weights.classifier.load_classifier", rejecting_classifier)
    invoke(
        "run", slide, "-o", out, "--organ", "breast", "--gate", "local", "--abstain", ABSTAIN, "--no-tissue",
        "--workers", 0, "--format", FORMATS, *QUICK,
    )  # fmt: skip


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the slide's folder that may be changed."""
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out" / "slide"


def kept(frame: pd.DataFrame) -> Counts:
    """Count the nuclei of a table by class."""
    return dict(Counter(frame.loc[frame["is_nucleus"].astype(bool), "class"]))


def of_table(folder: Path) -> Counts:
    with open_table(folder / "cells.zarr") as table:
        return {name: n for name, n in table.count_classes().items() if n}


def of_geopandas(folder: Path) -> Counts:
    with open_table(folder / "cells.zarr") as table:
        return kept(table.to_geopandas())


def of_anndata(folder: Path) -> Counts:
    with open_table(folder / "cells.zarr") as table:
        return kept(table.to_anndata().obs)


def of_h5ad(folder: Path) -> Counts:
    import anndata

    return kept(anndata.read_h5ad(folder / "cells.h5ad").obs)


def of_geojson(folder: Path) -> Counts:
    features = json.loads(gzip.decompress((folder / "cells.geojson.gz").read_bytes()))["features"]
    counts = Counter(feature["properties"]["classification"]["name"] for feature in features)
    del counts[NOT_NUCLEUS]
    return dict(counts)


def of_labels(folder: Path) -> Counts:
    """Join the label map, where a pixel is the id plus 1, with the CSV."""
    labels = np.unique(np.asarray(zarr.open_group(folder / "labels.ome.zarr", mode="r")["0"][...]))
    classes = pd.read_csv(folder / "cells.csv.gz").set_index("cell_id")["class"]
    return dict(Counter(classes.loc[labels[labels > 0].astype(int) - 1]))


def of_report(folder: Path) -> Counts:
    (table,) = re.findall(r'<table id="classes">(.*?)</table>', (folder / "report.html").read_text(), re.DOTALL)
    rows = re.findall(r'<tr><th scope="row".*?>(.*?)</th><td>([\d,]+)</td>', table, re.DOTALL)
    found = {unescape(re.sub(r"<.*?>", "", name)).split()[0]: int(n.replace(",", "")) for name, n in rows}
    found.pop(NOT_NUCLEUS, None)
    return {name: n for name, n in found.items() if n}


def of_summary(folder: Path) -> Counts:
    with (folder.parent / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    pairs = dict(pair.split("=") for pair in row["classes"].split())
    found = {**{name: int(n) for name, n in pairs.items()}, ABSTAINED: int(row["abstained"])}
    assert int(row["typed"]) == int(row["cells"]) == sum(found.values())
    return {name: n for name, n in found.items() if n}


def of_cohort(folder: Path) -> Counts:
    """Turn the shares of the page back into counts: of the typed nuclei abstained, of those with a class each."""
    page = (folder.parent / "cohort.html").read_text()
    values = [float(value) for value in re.findall(r'<td class="n" data-v="([\d.e+-]+)"', page)]
    typed, abstained, *shares = values[-4:]
    found = {ABSTAINED: round(typed * abstained)}
    said = typed - found[ABSTAINED]
    found |= {name: round(said * share) for name, share in zip(("pink", "blue"), shares, strict=True)}
    return {name: n for name, n in found.items() if n}


def of_record(folder: Path) -> Counts:
    record = json.loads((folder / "run.json").read_text())
    counts, said = record["counts"], record["config"]["classify"]["counts"]
    found = {**said["classes"], ABSTAINED: counts["abstained"]}
    assert counts["nuclei"] == said["typed"] == sum(found.values()) and counts["rejected"] == said["rejected"]
    return {name: n for name, n in found.items() if n}


def of_view(folder: Path) -> Counts:
    """Take the page's counts, and those of single nuclei as the page is given them."""
    viewer = Viewer(folder, token="secret")
    facts, counts = (json.loads(viewer.answer(f"/s/slide/{name}.json").body) for name in ("facts", "counts"))
    names = [c["name"] for c in facts["classes"]]
    found = {**dict(zip(names, counts["classes"], strict=True)), ABSTAINED: counts["abstained"]}
    assert names[facts["rejects"]] == NOT_NUCLEUS and counts["untyped"] == 0
    assert facts["n"] == sum(found.values()) - found.pop(NOT_NUCLEUS)
    return {name: n for name, n in found.items() if n}


def of_evaluate(folder: Path) -> Counts:
    width, height = SIZE_PX
    fields = dict.fromkeys(Sample.__dataclass_fields__)
    sample = Sample(**{**fields, "image_path": Path("slide.png"), "width": width, "height": height})
    return dict(Counter(name or ABSTAINED for name in read_nuclei(folder.parent, sample).class_name or ()))


def of_explain(folder: Path) -> Counts:
    with open_table(folder / "cells.zarr") as table:
        typed = read_typed(table, select_cells(table, Selection("uncertain", len(table))))
    counts = Counter(typed.class_name)
    del counts[NOT_NUCLEUS]
    return dict(counts)


def of_compare(folder: Path) -> Counts:
    with open_table(folder / "cells.zarr") as table:
        nuclei = compared_nuclei(table)
    return dict(Counter(nuclei.names[k] for k in nuclei.class_index))


SOURCES: dict[str, Callable[[Path], Counts]] = {
    "geopandas": of_geopandas,
    "AnnData": of_anndata,
    "h5ad": of_h5ad,
    "GeoJSON": of_geojson,
    "parquet": lambda folder: kept(pd.read_parquet(folder / "cells.parquet")),
    "CSV": lambda folder: kept(pd.read_csv(folder / "cells.csv.gz")),
    "TissUUmaps": lambda folder: kept(pd.read_csv(folder / "cells.tissuumaps.csv")),
    "labels": of_labels,
    "report": of_report,
    "summary": of_summary,
    "cohort": of_cohort,
    "run.json": of_record,
    "view": of_view,
    "evaluate": of_evaluate,
    "explain": of_explain,
    "compare": of_compare,
}


def all_counts(folder: Path) -> dict[str, Counts]:
    pytest.importorskip("anndata", reason="extra `spatial` is not installed")
    return {"table": of_table(folder), **{name: count(folder) for name, count in SOURCES.items()}}


def test_every_file_and_page_counts_the_same(made: Path) -> None:
    found = all_counts(made / "out" / "slide")
    # Of 96 discs of five colours in turn.
    assert found["table"] == {"blue": 20, "pink": 19, ABSTAINED: 38}
    assert {name: counts for name, counts in found.items() if counts != found["table"]} == {}


def test_the_view_shows_the_same_and_hatches_what_is_no_nucleus(chromium: Chromium, made: Path) -> None:
    counts = of_table(made / "out" / "slide")
    with serving(Viewer(made / "out")) as server, looking(chromium, server, "slide") as page:
        # Classes in the order of the weights, then what abstained and what was not typed; 19 discs were rejected.
        expected = [counts["pink"], counts["blue"], 19, counts[ABSTAINED], 0]
        assert numbers(page, HERE) == numbers(page, ALL) == expected
        assert page.text("#status").startswith("77 nuclei in view of 77")
        assert "rejected" in page.texts("#classes tbody tr")[2]
        page.shot("view-rejected", whole=False)
        slide_to(page, "abstain", 0)
        settled(page)
        assert numbers(page, HERE) == numbers(page, ALL) == [19, 39, 38, 0, 0]
        assert page.text("#status").startswith("58 nuclei in view of 58")


def test_another_rule_changes_all_of_it(folder: Path) -> None:
    invoke("classify", folder, "--regate", "--gate", "local", "--abstain", 0, *QUICK)
    found = all_counts(folder)
    # Nothing abstains: what was blue at best is blue, and what was no nucleus at best is none.
    assert found["table"] == {"blue": 39, "pink": 19}
    assert {name: counts for name, counts in found.items() if counts != found["table"]} == {}


@pytest.mark.parametrize("command", ["export", "run", "regate"])
def test_what_an_older_version_wrote_is_brought_up_to_date_first(
    made: Path, folder: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = of_table(folder)
    make_version_1(folder / "cells.zarr")
    (folder / "cells.csv.gz").write_bytes(b"of another meaning")
    assert of_table(folder) == of_view(folder) == of_explain(folder) == of_evaluate(folder) == expected
    verified = CliRunner().invoke(cli, ["verify", str(folder)])
    assert verified.exit_code == 1 and "schema version 1" in verified.output
    if command == "run":
        run(monkeypatch, made / "slide.svs", folder.parent)
    elif command == "regate":
        invoke("classify", folder, "--regate", "--gate", "local", "--abstain", ABSTAIN, *QUICK)
    else:
        invoke("export", folder, "--format", "geojson")
    with open_table(folder / "cells.zarr") as table:
        assert table.version == 2
    assert {name: counts for name, counts in all_counts(folder).items() if counts != expected} == {}
    invoke("verify", folder)


def test_snippets_count_the_same(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spatialdata", reason="extra `spatial` is not installed")
    monkeypatch.chdir(folder.parent.parent)
    expected = of_table(folder)
    blocks = re.findall(r"^```python\n(.*?)^```$", (CHECKOUT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (text for text in blocks if "read_zarr" in text)
    world: dict[str, Any] = {}
    exec(block, world)
    assert dict(Counter(world["nuclei"].obs["class"])) == expected
    page = (CHECKOUT / "docs" / "how-to" / "scanpy.md").read_text()
    first, *_ = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(first, world)
    assert dict(Counter(world["nuclei"].obs["class"])) == expected
