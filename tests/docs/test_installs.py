"""What installs cellslide elsewhere: the packages of the CPU, images, the conda recipe, the release."""

from __future__ import annotations

import re

import yaml

from cellslide import __version__
from tests.conftest import CHECKOUT
from tests.house.test_style import PROJECT

DOCKER = CHECKOUT / "docker"
# What conda-forge calls otherwise; OpenSlide's library is a package of its own there.
CONDA = {"torch": "pytorch", "opencv-python-headless": "py-opencv", "openslide-bin": "openslide", "isal": "python-isal"}


def name_of(requirement: str) -> str:
    """Return the name that a requirement begins with."""
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return found[0]


def wanted() -> list[str]:
    """Return the requirements of the package, without the GPU build of onnxruntime."""
    return [d for d in PROJECT["dependencies"] if not d.startswith("onnxruntime-gpu")]


def test_cpu_packages_are_those_of_the_project() -> None:
    lines = [line for line in (DOCKER / "cpu.txt").read_text().splitlines() if line and line[0] not in "#-"]
    assert lines == [d.partition(";")[0].strip() if d.startswith("onnxruntime") else d for d in wanted()]


def test_conda_recipe_names_the_same_packages_and_version() -> None:
    recipe = yaml.safe_load((DOCKER / "conda" / "recipe.yaml").read_text())
    assert recipe["context"]["version"] == __version__
    named = [line.split()[0] for line in recipe["requirements"]["run"]]
    assert sorted(named) == sorted(["python", *(CONDA.get(name_of(d), name_of(d)) for d in wanted())])


def test_image_runs_as_nobody_special_and_offline() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE)
    known = {"python:3.12-slim", "${FLAVOUR}"}
    for source, stage in stages:
        assert source in known, source
        known.add(stage)
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    assert all((CHECKOUT / name).exists() for line in copied for name in line.split())
    allowed = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert {name for line in copied for name in line.split()} == allowed
    assert text.index("USER 1000") < text.index("ENTRYPOINT") and "HF_HUB_OFFLINE=1" in text


def test_apptainer_definition_copies_what_is_there() -> None:
    text = (DOCKER / "cellslide.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n((?:(?!^%).*\n?)*)", text, re.MULTILINE))
    assert {"files", "post", "environment", "runscript", "test"} <= set(sections)
    assert all((CHECKOUT / line.split()[0]).exists() for line in sections["files"].splitlines() if line.strip())


def test_release_publishes_only_what_was_tried() -> None:
    jobs = yaml.safe_load((CHECKOUT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert set(jobs["publish"]["needs"]) == {"try", "site"} and jobs["try"]["needs"] == "build"
    assert {"ubuntu-latest", "macos-latest", "windows-latest"} == set(jobs["try"]["strategy"]["matrix"]["os"])
