"""The JSON Schemas of `docs/schema` hold for what runs write, as its README checks them, and refuse what is wrong."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cellslide.cli.main import cli
from tests.conftest import CHECKOUT
from tests.support.fakes import CLASSES, fake_model
from tests.support.rejecting import ABSTAIN, paint_doubtful, rejecting_classifier

jsonschema = pytest.importorskip("jsonschema", reason="not installed: pip install 'cellslide[test]'")
pytest.importorskip("anndata", reason="extra `spatial` is not installed")

COMMON = ("--no-tissue", "--workers", "0", "--device", "cpu", "--no-progress", "--format", "zarr")
RUNS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "typed": (fake_model(), ("run", "--gate", "local", "--abstain", str(ABSTAIN))),
    "points": (fake_model("point", classes=CLASSES), ("segment",)),
    "untyped": (fake_model(), ("segment",)),
}
(SNIPPET,) = re.findall(
    r"^```python\n(.*?)^```$", (CHECKOUT / "docs" / "schema" / "README.md").read_text(), re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Run each way of making a table, do what the README says, and return the names that it makes."""
    found = {}
    for name, (model, arguments) in RUNS.items():
        top = tmp_path_factory.mktemp(name)
        shutil.copytree(CHECKOUT / "docs" / "schema", top / "docs" / "schema")
        paint_doubtful(top / "slide.tif")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cellslide.weights.load_model", lambda *_, model=model: model)
            patch.setattr("cellslide.weights.classifier.load_classifier", rejecting_classifier)
            patch.chdir(top)
            done = CliRunner().invoke(cli, [*arguments, "slide.tif", "-o", "out", *COMMON], catch_exceptions=False)
            assert done.exit_code == 0, done.output
            world: dict[str, Any] = {}
            exec(SNIPPET, world)
            found[name] = {**world, "run": json.loads(Path("out/slide/run.json").read_text())}
    return found


def test_schemas_are_schemas(checked: dict[str, dict[str, Any]]) -> None:
    for schema in checked["typed"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_outputs_hold(checked: dict[str, dict[str, Any]]) -> None:
    rows = {name: world["cells"]["obs"] for name, world in checked.items()}
    assert all(len(found) == 96 for found in rows.values())
    assert {row["class"] for row in rows["typed"]} == {"pink", "blue", "abstained", "not_nucleus"}
    assert {row["class"] for row in rows["points"]} == {"pink", "blue"}
    assert {row["class"] for row in rows["untyped"]} == {"Nucleus"}


CELL_FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a share above 1": lambda cell: cell.update(class_prob=1.5),
    "no decision": lambda cell: cell.pop("class"),
    "rejected, with a class": lambda cell: cell.update(is_nucleus=False),
    "abstained, with a class": lambda cell: cell.update(abstained=True),
    "no class said, without the mark": lambda cell: cell.update({"class": "abstained"}),
}


@pytest.mark.parametrize("fault", CELL_FAULTS)
def test_a_cell_that_cannot_be_is_refused(checked: dict[str, dict[str, Any]], fault: str) -> None:
    cells = copy.deepcopy(checked["typed"]["cells"])
    CELL_FAULTS[fault](next(cell for cell in cells["obs"] if cell["class"] == "blue"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cells, checked["typed"]["schemas"]["cells"])


def test_another_version_is_refused(checked: dict[str, dict[str, Any]]) -> None:
    cells = copy.deepcopy(checked["typed"]["cells"])
    cells["uns"]["schema_version"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cells, checked["typed"]["schemas"]["cells"])


@pytest.mark.parametrize("key", ["counts", "files", "seconds"])
def test_a_record_without_a_part_is_refused(checked: dict[str, dict[str, Any]], key: str) -> None:
    run = copy.deepcopy(checked["typed"]["run"])
    del run[key]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(run, checked["typed"]["schemas"]["run"])
