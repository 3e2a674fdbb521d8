"""What holds for the project as a whole: its metadata, its wheel, its texts."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import CHECKOUT

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
MANIFEST = CHECKOUT / "weights_manifest.yaml"
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".sh", ""}


def project_files() -> list[Path]:
    """Return the files that belong to the project: tracked or new in git, else everything that is not hidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, check=False)
    if listed.returncode == 0:
        files = [CHECKOUT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        tops = ("cellslide", "tests", "docs", "examples", "benchmarks", ".ci")
        files = [p for top in tops for p in (CHECKOUT / top).rglob("*")] + list(CHECKOUT.glob("*"))
    return [p for p in files if p.is_file() and p.suffix in TEXT and "__pycache__" not in p.parts]


def installed() -> importlib.metadata.Distribution:
    """Return the installed package, unless it is this checkout itself."""
    for dist in importlib.metadata.distributions(name="cellslide"):
        if any(str(f) == "cellslide/cli/main.py" for f in dist.files or []):
            return dist
    pytest.skip("cellslide is not installed as a wheel here; .ci/run tests it installed")


def test_requirements_have_floors_and_no_caps() -> None:
    groups = PROJECT["optional-dependencies"]
    everything = PROJECT["dependencies"] + [r for group in groups.values() for r in group]
    for requirement in everything:
        name = requirement.split(";")[0]
        assert "<" not in name and "==" not in name and "~=" not in name, requirement
        assert ">=" in name or name.startswith("cellslide["), f"{requirement} has no floor"
    assert PROJECT["requires-python"] == ">=3.11"
    assert {"test", "train", "cluster", "spatial", "export"} <= set(groups)


def test_exactly_one_onnxruntime_is_asked_for() -> None:
    from packaging.requirements import Requirement

    wanted = [Requirement(r) for r in PROJECT["dependencies"] if r.startswith("onnxruntime")]
    for machine, system in (("x86_64", "linux"), ("AMD64", "win32"), ("arm64", "darwin"), ("aarch64", "linux"),
                            ("x86_64", "darwin")):  # fmt: skip
        chosen = [
            r for r in wanted if r.marker and r.marker.evaluate({"platform_machine": machine, "sys_platform": system})
        ]
        assert len(chosen) == 1, (machine, system)
        assert (chosen[0].name == "onnxruntime-gpu") == (system != "darwin" and machine in ("x86_64", "AMD64"))


def test_version_is_the_newest_in_the_changelog() -> None:
    from cellslide import __version__

    versions = re.findall(r"^## (\S+)", (CHECKOUT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == __version__


def test_readme_begins_with_the_two_commands_and_ci_runs_them() -> None:
    block = re.findall(r"```\n(.*?)```", (CHECKOUT / "README.md").read_text(), flags=re.DOTALL)[0]
    first, second = block.strip().splitlines()
    venv = "python3 -m venv .venv && .venv/bin/pip install "
    assert first == venv + ". && .venv/bin/cellslide demo"
    assert second == venv + "'.[test]' && .venv/bin/pytest"
    run = (CHECKOUT / ".ci" / "run").read_text()
    assert ".venv/bin/pip install --quiet '.[test]'" in run
    assert re.search(r"^\.venv/bin/pytest$", run, flags=re.MULTILINE)


COLUMNS = {
    "bpq": "bPQ", "bdq": "bDQ", "bsq": "bSQ", "aji": "AJI", "dice": "Dice", "f1_iou50": "F1 at IoU 0.5",
    "detection_f1": "detection F1 at 3 µm",
}  # fmt: skip


def scores_table(metrics: dict[str, dict[str, float]]) -> str:
    """Return the README's table of scores for the `metrics` of an entry of the manifest."""
    keys = [key for key in COLUMNS if any(key in row for row in metrics.values())]
    if not keys:
        return ""
    lines = ["| images | " + " | ".join(COLUMNS[key] for key in keys) + " |", "| --- |" + " --- |" * len(keys)]
    for name, row in metrics.items():
        cells = (f"{row[key]:.3f}" if row.get(key) is not None else "" for key in keys)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n" + "\n".join(lines) + "\n\n"


def test_readme_scores_are_those_of_the_manifest() -> None:
    content = yaml.safe_load(MANIFEST.read_text())
    shipped = next(e for e in content["weights"] if e["id"] == content["defaults"]["segment"])
    found = re.search(r"<!-- scores -->\n(.*)<!-- /scores -->", (CHECKOUT / "README.md").read_text(), flags=re.DOTALL)
    assert found, "README has lost its table of scores"
    expected = scores_table(shipped.get("metrics") or {})
    assert found[1] == expected, f"put this between the markers:\n{expected}"


def test_scores_table_shows_what_is_known() -> None:
    table = scores_table({"a": {"bpq": 0.5, "other": 1.0}, "b": {"dice": 0.25, "bpq": None}})
    assert table == "\n| images | bPQ | Dice |\n| --- | --- | --- |\n| a | 0.500 |  |\n| b |  | 0.250 |\n\n"


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md", "examples/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    page = CHECKOUT / name
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{name}: {target}"


def test_texts_name_no_machine_and_leave_nothing_open() -> None:
    home = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/\w")
    unfinished = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|NotImplemented" + r"Error)\b")
    for path in project_files():
        text = path.read_text(encoding="utf-8")
        assert not home.search(text), f"{path}: names a folder of one machine"
        if path.suffix == ".py":
            assert not unfinished.search(text), f"{path}: unfinished"


def test_wheel_carries_the_manifest_and_the_default_weights() -> None:
    dist = installed()
    manifest = Path(str(dist.locate_file("cellslide/weights_manifest.yaml")))
    assert manifest.read_bytes() == MANIFEST.read_bytes()
    content = yaml.safe_load(MANIFEST.read_text())
    names = {str(f) for f in dist.files or []}
    entries = {e["id"]: e for e in content["weights"]}
    for default in filter(None, content["defaults"].values()):
        file = entries[default]["file"]
        assert any(name.endswith(Path(file).name) for name in names), f"{default}: {file} is not in the wheel"
