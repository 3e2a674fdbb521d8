"""The rows of a GPU: measured by code that runs on any device, and said to be not measured where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from cellslide.bench.fake import DrawnMaps
from cellslide.bench.gpu import (
    NUCLEI,
    TYPINGS,
    busy_row,
    classify_rows,
    network_row,
    one_after_another,
    sample_nothing,
    sampling_row,
    segment_rows,
    typing_row,
)
from cellslide.bench.rows import BenchOptions
from cellslide.classify.effects import random_classifier
from cellslide.config import InferConfig
from cellslide.inference.torch_engine import TorchEngine
from cellslide.models import layers
from cellslide.models.cellvta import CellVTA
from cellslide.slides.slide import slide_from_array
from cellslide.types import HoverDecode
from tests.inference.test_torch_engine import TINY
from tests.support.fakes import fake_spec

ON_CPU = InferConfig(device="cpu", batch_size=2, precision="fp32")


@pytest.fixture
def engine() -> TorchEngine:
    torch.manual_seed(0)
    spec = fake_spec(tile_px=128, overlap_px=64, decode=HoverDecode("fixed"))
    return TorchEngine(CellVTA(TINY).eval(), spec, ON_CPU, 128)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_its_rows_are_not_measured() -> None:
    rows = [*segment_rows(BenchOptions()), *classify_rows(BenchOptions())]
    assert [made.target for made in rows] == [
        "≤ 0.7 s a mm2", "≤ 0.25 of the network's time", "≥ 0.9 of the time", "≥ 1000 nuclei/s",
        *(f"≤ {hours} hours for {NUCLEI:,} nuclei" for hours in (0.12, 0.25)),
    ]  # fmt: skip
    assert all(made.value is None and made.met is None and made.note == "not measured" for made in rows)


def test_a_network_alone_and_in_the_flow(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = network_row(engine, 1)
    assert alone.value is not None and alone.count == 2
    sampling = sampling_row(engine, 1, replace(alone, value=1e9))
    assert sampling.value == pytest.approx(1, abs=0.01)  # next to a network that takes so long, all else is nothing
    slide = slide_from_array(np.full((300, 300, 3), 200, np.uint8), engine.spec.mpp)
    seconds = iter((8.0, 6.0))  # the flow, then the network alone

    def passed(work: Callable[[], object]) -> float:
        work()
        return next(seconds)

    monkeypatch.setattr("cellslide.bench.gpu.passed", passed)
    busy = busy_row(engine, slide, 0)
    assert busy.value == 0.75
    assert busy.count == 16  # 300 px by steps of 64


def test_drawn_maps_stand_for_what_a_network_finds(engine: TorchEngine) -> None:
    class Counting:
        """Counts the tiles that pass."""

        spec, name, precision, device, batch_size = engine.spec, "counts", "fp32", "cpu", 3
        tiles = 0

        def launch(self, images: np.ndarray):  # type: ignore[no-untyped-def]
            self.tiles += len(images)
            return lambda: [None] * len(images)

        def peak_device_bytes(self) -> int:
            return 7

    counting, maps = Counting(), object()
    drawn = DrawnMaps(engine.spec, maps, counting)  # type: ignore[arg-type]
    assert drawn.launch(np.zeros((3, 8, 8, 3), np.uint8))() == [maps] * 3 and drawn.peak_device_bytes() == 7
    one_after_another(drawn, np.zeros((3, 8, 8, 3), np.uint8), 8)
    assert counting.tiles == 3 + 8


@pytest.mark.parametrize("number", range(len(TYPINGS)))
def test_each_way_of_typing_can_be_measured(number: int) -> None:
    typing = TYPINGS[number]
    smaller = replace(typing, config=replace(typing.config, context_size=typing.config.context_size and 64))
    slide = slide_from_array(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8), 0.25)
    xy = np.random.default_rng(1).uniform(0, 700, (12, 2))
    made = typing_row(smaller, random_classifier("small"), ON_CPU, slide, xy, 1)
    assert made.value is not None and made.value > 0 and made.count == 12
    assert made.met is not None


def test_sampling_is_left_out_and_put_back(engine: TorchEngine) -> None:
    tile = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), np.uint8)
    usual = engine.launch(tile)()[0].hv
    with patch.object(layers, "sample_deformable", sample_nothing):
        without = engine.launch(tile)()[0].hv
    assert usual.shape == without.shape and not np.array_equal(usual, without)
