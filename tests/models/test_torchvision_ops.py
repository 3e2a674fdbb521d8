"""A torchvision that was built for another torch must not stop what only imports it by the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cellslide.models import torchvision_ops
from tests.conftest import CHECKOUT


def test_operators_are_declared_for_a_torchvision_that_fails(tmp_path: Path) -> None:
    """As the real one does: importing it fails until the operators are there."""
    (tmp_path / "torchvision").mkdir()
    source = "import torch\nif not hasattr(torch.ops.torchvision, 'nms'):\n    raise RuntimeError('no nms')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(source)
    code = (
        f"import sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(CHECKOUT)!r}]\n"
        "from cellslide.models.torchvision_ops import declare_torchvision_operators as declare\n"
        "first = declare()\nassert first is not None and declare() is first\n"
        "import torchvision\nprint(torchvision.__file__)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(str(tmp_path))


def test_nothing_is_declared_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_ops, "_kept", [])
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert torchvision_ops.declare_torchvision_operators() is None
    assert torchvision_ops._kept == []
