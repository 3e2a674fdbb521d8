"""The network stage of the benchmark: its plain form is the same network, and a missing GPU is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cellslide.bench import flow
from cellslide.bench.fake import picture
from cellslide.bench.infer import engine_rows, plain_row, plainly, shipped
from cellslide.inference.torch_engine import TileNet
from cellslide.models.cellvta import CellVTA
from cellslide.weights import LoadedModel
from tests.inference.test_torch_engine import TINY
from tests.support.fakes import CLASSES, fake_spec

NEAR = replace(TINY, attention_radius=1, use_pos_embed=False)


@pytest.fixture
def model() -> LoadedModel:
    torch.manual_seed(0)
    spec = fake_spec(classes=CLASSES, tile_px=128, overlap_px=64, bf16_on_cpu=True)
    return LoadedModel(spec, CellVTA(NEAR).eval(), entry=None)


def test_the_plain_form_is_the_same_network(model: LoadedModel) -> None:
    net, tile = TileNet(model.module, model.spec), torch.from_numpy(picture(128))
    with torch.inference_mode():
        usual = net(tile)[2]
        with plainly():
            plain = net(tile)[2]
    torch.testing.assert_close(usual, plain, atol=2e-5, rtol=1e-4)
    assert not torch.equal(usual, plain)  # two ways of computing it


def test_rows_compare_with_the_plain_form(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellslide.inference.device.cpu_computes_bf16", lambda: True)
    first = plain_row(model, 1)
    assert first.ratio is None and first.met is None and first.value is not None
    found = list(engine_rows(model, first, 1))
    assert [made.form for made in found] == ["fake, fp32", "fake, bf16 (default)"]
    assert all(made.value is not None and made.ratio == pytest.approx(made.value / first.value) for made in found)
    assert [made.target for made in found] == ["", "≥ 2 ×"]  # what is asked of the default
    monkeypatch.setattr("cellslide.inference.device.cpu_computes_bf16", lambda: False)
    assert [made.form for made in engine_rows(model, first, 1)] == ["fake, fp32 (default)"]


def test_all_finders_of_the_package_are_measured() -> None:
    assert {model.entry.id for model in shipped()} == {
        "cellslide-nuclei-small", "cellslide-nuclei-light", "cellslide-points", "cellslide-points-small",
        "cellslide-boxes-small",
    }  # fmt: skip


def test_stages_that_wait_pass_every_tile_and_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "TILES", 20)
    one_after_another = 20 * (0.02 + 0.02 + 0.02)
    # The best of three, for a machine that is busy with something else.
    assert 20 * 0.02 / 2 <= min(flow.passed(0.02, 0.02, 0.02, 0.0) for _ in range(3)) < one_after_another
