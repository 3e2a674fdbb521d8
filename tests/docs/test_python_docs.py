"""Every block of docs/python.md runs, in order, as one program on a painted slide with the models that ship."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cellslide.evaluate.dataset import write_manifest
from tests.conftest import CHECKOUT
from tests.painted import DISC, grid_centres, paint_slide
from tests.support.labelled import add_image, discs

PAGE = CHECKOUT / "docs" / "python.md"


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks and {kind for kind, _ in blocks} == {"python"}
    painted = paint_slide(
        tmp_path / "slide.tif", 320, 240, 0.5, grid_centres(320, 240, 40), 9.0, background="tissue", disc_color=DISC
    )
    (tmp_path / "nuclei.csv").write_text("x,y\n" + "".join(f"{x},{y}\n" for x, y in painted.centres_xy))
    labels = discs((128, 128), [(30, 30), (90, 40), (60, 90)], 9)
    write_manifest(tmp_path / "dataset", [add_image(tmp_path / "dataset", "one", labels, split="val")])
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for _, code in blocks:
        exec(compile(code, str(PAGE), "exec"), scope)
    assert len(scope["cells"]) and len(scope["vectors"]) == len(scope["names"]) == len(scope["cells"])
    assert len(scope["frame"]) == scope["adata"].n_obs > 0
    assert len(scope["table"]) == len(painted.centres_xy)
    assert scope["scores"].n_images == 1
    shutil.rmtree(tmp_path / "out")
