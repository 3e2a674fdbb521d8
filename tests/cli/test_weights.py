"""`cellslide weights`: output, consent and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from cellslide.cli.main import cli
from cellslide.weights.manifest import Manifest
from tests.models.test_checkpoint import model_of, publish


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder, and keep the hub's cache empty too."""
    monkeypatch.setenv("CELLSLIDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def run(*args: Any, **options: Any) -> Result:
    """Run `cellslide weights ARGS`."""
    return CliRunner().invoke(cli, ["weights", *map(str, args)], **options)


def test_list_names_all_and_marks_the_default() -> None:
    lines = run("list").stdout.splitlines()
    assert [line.split()[0].rstrip("*") for line in lines] == list(Manifest.load().entries)
    starred = [line for line in lines if line.split()[0].endswith("*")]
    names = ["cellslide-nuclei-light*", "cellslide-points*", "cells-breast-colon*"]
    assert [line.split()[0] for line in starred] == names
    by_id = {line.split()[0]: line for line in lines}
    assert " gated " in by_id["uni"]
    assert " yours to add " in by_id["cellvta-uni-conic"]
    assert " to fetch " in by_id["cellvit-sam-h-x40-amp"]


def test_list_by_task_as_json() -> None:
    rows = json.loads(run("list", "--task", "backbone", "--json").stdout)
    assert {row["task"] for row in rows} == {"backbone"}
    assert {"uni", "uni2-h", "dinov3-vitl16"} <= {row["id"] for row in rows}


def test_show_prints_yaml_and_the_steps() -> None:
    result = run("show", "cellvta-uni-pannuke-split1")
    entry = yaml.safe_load(result.stdout)
    assert entry["source"] == "user"
    assert entry["sha256"] is None
    assert entry["classes"][0] == {"name": "Neoplastic", "color": [255, 0, 0]}
    assert "# not here: " in result.stdout


def test_unknown_id_is_exit_2() -> None:
    result = run("show", "cellvta")
    assert result.exit_code == 2
    assert result.stderr.startswith("cellslide: no weights called cellvta: did you mean ")


def test_fetch_offline_is_exit_3() -> None:
    result = run("fetch", "uni2-h", "--accept-licence", "CC-BY-NC-ND-4.0")
    assert result.exit_code == 3
    assert "HF_HUB_OFFLINE" in result.stderr
    assert result.stderr.count("\n") == 1


def test_fetch_without_terminal_wants_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    result = run("fetch", "uni2-h")
    assert result.exit_code == 2
    assert "licence CC-BY-NC-ND-4.0" in result.stdout
    assert "--accept-licence 'CC-BY-NC-ND-4.0'" in result.stderr


def test_fetch_of_what_only_the_user_may_get_is_exit_3() -> None:
    result = run("fetch", "cellvta-uni-conic")
    assert result.exit_code == 3
    assert "CellVTA_UNI_conic.pth" in result.stderr


def test_verify_of_missing_weights_is_exit_3() -> None:
    result = run("verify", "uni")
    assert result.exit_code == 3
    assert "huggingface.co/MahmoodLab/UNI" in result.stderr


def test_add_verify_and_change(tmp_path: Path, cache: Path) -> None:
    path = publish(tmp_path / "lab.pth", "CellViT256", model_of("CellViT256"))
    assert run("add", path).stdout == "lab: added; use it with --model lab\n"
    assert run("verify").stdout.splitlines()[-1].startswith("lab: ok ")
    (cache / "lab" / "lab.pth").write_bytes(b"x" * path.stat().st_size)
    result = run("verify", "lab")
    assert result.exit_code == 3
    assert result.stdout.startswith("lab: DIFFERS ")


def test_trusted_file_may_be_replaced_on_purpose(tmp_path: Path, cache: Path) -> None:
    (cache / "uni").mkdir(parents=True)
    file = cache / "uni" / "pytorch_model.bin"
    file.write_bytes(b"one")
    assert "(trusted on first use)" in run("verify", "uni").stdout
    file.write_bytes(b"two")
    assert run("verify", "uni").exit_code == 3
    assert run("verify", "uni", "--trust").exit_code == 0
    assert run("verify", "uni").exit_code == 0
    assert run("verify", "--trust").exit_code == 2


def test_refused_pickle_is_exit_3(tmp_path: Path) -> None:
    import torch

    from tests.models.test_checkpoint import Evil

    torch.save({"arch": "CellViT256", "model_state_dict": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    result = run("add", tmp_path / "evil.pth")
    assert result.exit_code == 3
    assert "blocked: " in result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["list", "show", "fetch", "verify", "add"])
def test_each_command_has_help(name: str) -> None:
    assert run(name, "--help").exit_code == 0
