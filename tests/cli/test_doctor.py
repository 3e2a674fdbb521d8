"""`cellslide doctor`: it sees what is missing, and its list is that of the package."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from cellslide.cli import doctor
from cellslide.cli.doctor import OPTIONAL, REQUIRED, Check
from cellslide.cli.main import cli
from tests.conftest import CHECKOUT


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "cache"))


def declared() -> dict[str, str]:
    """Return the required distributions of the project and their floors."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    found = {}
    for line in project["dependencies"]:
        match = re.match(r"([\w-]+)(?:\[[^]]*\])?>=([\w.]+)", line)
        assert match, line
        found[match[1]] = match[2]
    return found


def test_list_agrees_with_the_project() -> None:
    listed = {name: floor for names, _, floor in REQUIRED for name in names.split("|")}
    del listed["opencv-python"]  # The same module with windows; it serves as well.
    assert listed == declared()
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, extra in OPTIONAL:
        assert any(line.startswith(name) for line in extras[extra]), f"{name} is not in the extra {extra}"


def test_all_well_is_0_and_json_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("packages", "numpy", "ok", "2.0"), Check("weights", "gated access", "note", "token not set")]
    monkeypatch.setattr(doctor, "run_checks", lambda online: iter(checks))
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["ok"] is True
    assert json.loads(result.stdout)["checks"][0] == {
        "group": "packages", "name": "numpy", "state": "ok", "detail": "2.0",
    }  # fmt: skip
    assert "numpy" in CliRunner().invoke(cli, ["doctor"]).stdout


def test_missing_is_3_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda online: iter([Check("packages", "zarr", "missing", "gone")]))
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 3
    assert json.loads(result.stdout)["ok"] is False
    assert result.stderr.strip().endswith("required and not there: zarr")


def test_packages_that_are_absent_old_or_broken_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = (
        ("no-such-package", "os", "1"),
        ("numpy", "numpy", "999"),
        ("pillow", "no_such_module", "1"),
        ("no-such-package|click", "click", "8"),
    )
    monkeypatch.setattr(doctor, "REQUIRED", packages)
    monkeypatch.setattr(doctor, "OPTIONAL", (("no-such-extra", "train"),))
    checks = list(doctor._packages())
    assert [c.state for c in checks] == ["missing", "missing", "missing", "ok", "note"]
    assert "older than 999" in checks[1].detail and "ModuleNotFoundError" in checks[2].detail


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64", "ARM64", "ppc64le", "riscv64"])
def test_isal_is_missed_only_where_the_package_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    (line,) = (line for line in project["dependencies"] if line.startswith("isal"))
    marker = Requirement(line).marker
    asked = marker.evaluate({"sys_platform": system, "platform_machine": machine})
    monkeypatch.setattr(doctor, "REQUIRED", (("isal", "isal", "1.6"),))
    monkeypatch.setattr(doctor, "OPTIONAL", ())
    monkeypatch.setattr(doctor, "_installed", lambda names: (names[0], None))
    monkeypatch.setattr(doctor.sys, "platform", system)
    monkeypatch.setattr(doctor.platform, "machine", lambda: machine)
    (check,) = doctor._packages()
    assert check.state == ("missing" if asked else "note")


def test_codecs_and_openslide_work_here() -> None:
    for name in ("jpeg8", "jpeg2k", "webp"):
        assert doctor._codec(name)
    assert doctor._openslide().startswith("library 4")
    broken = doctor._look("codecs", "odd", lambda: doctor._codec("odd"))
    assert broken.state == "missing" and "odd" in broken.detail


def test_cache_folder_must_be_writable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor._cache().state == "ok"
    assert not (tmp_path / "cache").exists()  # Looking makes nothing.
    (tmp_path / "file").touch()
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "file" / "below"))
    check = doctor._cache()
    assert check.state == "missing" and "CELLSLIDE_CACHE" in check.detail


def test_gated_access_asks_nobody_unless_online(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Check:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(doctor, "_ask_hub", refuse)
    for online in (False, True):  # HF_HUB_OFFLINE is set in tests.
        assert [c.state for c in doctor._gated(online)] == ["note"]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    asked: list[str] = []
    monkeypatch.setattr(doctor, "_ask_hub", lambda hub, token: asked.append(hub) or Check("weights", hub, "ok", ""))
    assert len(list(doctor._gated(True))) == len(asked) > 0
    assert all("/" in hub for hub in asked)


def test_default_weights_are_checked() -> None:
    names = {c.name: c for c in doctor._weights()}
    assert "others" in names
    assert any("default" in name for name in names)
