"""The start is timed in processes of its own, from weights in memory to nuclei."""

from __future__ import annotations

import numpy as np
import pytest

from cellslide.bench import start
from cellslide.bench.start import first_tile, in_process, start_rows
from tests.support.fakes import fake_model


def test_a_program_is_timed_and_what_it_says_last_is_kept() -> None:
    seconds, said = in_process("cellslide", "--version")
    assert 0 < seconds < 60 and "cellslide" in said


def test_the_first_of_each_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(0.3, "usage"), (0.4, "usage"), (9.0, "30.5"), (9.0, "1.5"), (9.0, "1.75")])
    monkeypatch.setattr(start, "in_process", lambda *words: next(answers))
    helped, first = start_rows(["some-model"], 2)
    assert (helped.value, helped.target, helped.met) == (0.35, "≤ 0.5 seconds", True)
    assert (first.form, first.value, first.least) == ("start: first tile, some-model", 1.625, 1.5)


@pytest.mark.parametrize("color", [120, 250])
def test_the_clock_runs_from_weights_to_nuclei(color: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.full((512, 512, 3), 250, np.uint8)
    image[100:120, 100:120] = color
    monkeypatch.setattr(start, "tissue", lambda size_px: image)
    monkeypatch.setattr(start, "load_model", lambda model, weights: fake_model())
    if color == 250:
        with pytest.raises(SystemExit, match="no nuclei"):
            first_tile(None)
    else:
        assert 0 < first_tile(None) < 60
