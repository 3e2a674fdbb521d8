"""docs/xenium.md does what it says, on the slide and bundle that it paints; its nuclei are those painted, not found."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cellslide import import_cells
from cellslide.cli.main import cli
from tests.conftest import CHECKOUT


@pytest.mark.skipif(importlib.util.find_spec("scanpy") is None, reason="needs the extra spatial")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page = (CHECKOUT / "docs" / "xenium.md").read_text(encoding="utf-8")
    program: dict[str, Any] = {}
    for kind, text in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if kind == "python":
            exec(compile(text, "docs/xenium.md", "exec"), program)
            continue
        for line in text.splitlines():
            if "label" in line and not Path("out").exists():
                _put_nuclei(program["painting"].centroid_xy)
            words = shlex.split(line)[1:]
            result = CliRunner().invoke(cli, [*words, *(["--fields", "1"] if "check" in words else [])])
            assert result.exit_code == 0, f"{line}: {result.output}"
    assert len(program["kept"]) > 400
    assert "T_Cell" in capsys.readouterr().out


def _put_nuclei(xy: Any) -> None:
    Path("nuclei.csv").write_text("x,y\n" + "".join(f"{x},{y}\n" for x, y in xy))
    import_cells("nuclei.csv", "he_image.tif", "out").close()
