"""No command asks for the network by itself: the demo runs where there is none, and nothing tries to call out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cellslide.verify import verify_folder
from tests.painted import paint_slide
from tests.watched import run_watched


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


def test_segment_calls_nobody(tmp_path: Path) -> None:
    paint_slide(tmp_path / "s.tif", 300, 200, 0.5, [(100, 100)], 7.0)
    flags = ("--device", "cpu", "--workers", "0", "--no-progress", "--no-tissue")
    done = run_watched(tmp_path, "fake", ["segment", tmp_path / "s.tif", "-o", tmp_path / "out", *flags], no_network())
    assert done.code == 0, done.stderr
    assert done.calls == ()
    assert done.outside(tmp_path / "out", tmp_path / "cache", tmp_path / "scratch") == []


@pytest.mark.slow
def test_the_demo_needs_no_network(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["demo", "-o", out, "--device", "cpu", "--no-progress"]
    done = run_watched(tmp_path, "small", command, no_network(), timeout_s=110)
    assert done.code == 0, done.stderr
    assert done.calls == ()
    verdict = verify_folder(out / "demo-slide")
    assert verdict.faults == [] and verdict.cells
    assert done.outside(out, tmp_path / "cache", tmp_path / "scratch") == []
