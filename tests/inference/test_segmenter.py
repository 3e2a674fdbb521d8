"""A model made ready: what it needs beside its weights starts while they are loaded."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import pytest

from cellslide.config import InferConfig, SegmentConfig
from cellslide.errors import MissingDependencyError, WeightsError
from cellslide.inference import segmenter
from cellslide.inference.segmenter import load_segmenter, may_need_decoding
from cellslide.types import ModelKind
from cellslide.weights import LoadedModel
from tests.support.fakes import fake_model

CONFIG = SegmentConfig(infer=InferConfig(device="cpu", workers=1))


class Processes(Executor):
    """Says whether it was ended."""

    ended = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.ended = True


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    pool = Processes()
    monkeypatch.setattr(segmenter, "start_processes", lambda workers: pool)
    return pool


@pytest.mark.parametrize(("kind", "ended"), [("mask", False), ("point", True), ("box", True)])
def test_processes_start_before_the_weights_and_end_where_nothing_is_decoded(
    processes: Processes, kind: ModelKind, ended: bool
) -> None:
    def load(model: str | None, weights: Path | None) -> LoadedModel:
        assert not processes.ended
        return fake_model(kind)

    with load_segmenter(load, CONFIG) as ready:
        assert processes.ended == ended
        assert ready.detector._pool is (None if ended else processes)
    assert processes.ended


def test_processes_end_where_the_weights_cannot_be_loaded(processes: Processes) -> None:
    def load(model: str | None, weights: Path | None) -> LoadedModel:
        raise WeightsError("not there")

    with pytest.raises(WeightsError, match="not there"):
        load_segmenter(load, CONFIG)
    assert processes.ended


def test_nothing_starts_for_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object) -> LoadedModel:
        raise AssertionError(given)

    monkeypatch.setattr(segmenter, "start_processes", never)
    with pytest.raises(MissingDependencyError, match="cuda:99"):
        load_segmenter(never, replace(CONFIG, infer=InferConfig(device="cuda:99", workers=1)))


@pytest.mark.parametrize(
    ("model", "weights", "expected"),
    [
        (None, None, True),
        ("cellslide-nuclei-small", None, True),
        ("cellslide-points-small", None, False),
        ("detect", None, False),
        ("no-such-model", None, False),  # whoever loads it says so, and nothing is to be waited for
        ("detect", Path("other.safetensors"), True),
    ],
)
def test_only_networks_that_may_find_masks_need_decoding(
    model: str | None, weights: Path | None, expected: bool
) -> None:
    assert may_need_decoding(replace(CONFIG, model=model, weights=weights)) == expected
