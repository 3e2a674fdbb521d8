"""No command asks for the network by itself: the demo runs where there is none, and nothing tries to call out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cellslide.formats.verify import verify_folder
from tests.support.watched import run_watched


def no_network() -> list[str]:
    """Return what begins a command in a network namespace without interfaces; skips where that is not permitted."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare on this machine, so the network cannot be taken away")
    command = [unshare, "--net", "--map-root-user"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not permit network namespaces to its users")
    return command


def test_there_is_no_network_in_the_namespace() -> None:
    code = "import socket; print([name for _, name in socket.if_nameindex() if name != 'lo'])"
    told = subprocess.run([*no_network(), sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_needs_no_network(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["demo", "-o", out, "--device", "cpu", "--no-progress"]
    done = run_watched(tmp_path, "small", command, no_network(), timeout_s=280)
    assert done.code == 0, done.stderr
    assert done.calls == ()
    verdict = verify_folder(out / "demo-slide")
    assert verdict.faults == [] and verdict.cells
    assert done.outside(out, tmp_path / "cache", tmp_path / "scratch") == []
