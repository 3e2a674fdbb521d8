"""Compiled kernels: why there are none, and that what was compiled once is loaded afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from cellslide.cli import doctor
from cellslide.geometry import kernels
from cellslide.inference import stream as detect
from cellslide.nuclei import hover_decode as decode
from tests.conftest import CHECKOUT


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    kernels.why_not.cache_clear()
    yield
    kernels.why_not.cache_clear()


def test_numba_may_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert not kernels.available()
    assert "NUMBA_DISABLE_JIT" in str(kernels.why_not())
    check = doctor._kernels()
    assert check.state == "note" and "NUMBA_DISABLE_JIT" in check.detail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("Numba needs NumPy 2.4 or less"), "Numba needs NumPy"),
        (RuntimeError("cannot cache function: no locator available"), "NUMBA_CACHE_DIR"),
    ],
)
def test_a_numba_that_cannot_serve_is_told(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise error

    monkeypatch.delenv("NUMBA_DISABLE_JIT", raising=False)
    monkeypatch.setattr(kernels, "import_module", refuse)
    assert words in str(kernels.why_not())


def test_doctor_compiles_and_tells_where() -> None:
    if not kernels.available():
        pytest.skip(f"no compiled kernels here: {kernels.why_not()}")
    check = doctor._kernels()
    assert check.state == "ok" and str(kernels.cache_folder()) in check.detail
    assert any(kernels.cache_folder().glob("label_kernels.measure-*.nbi"))


def test_a_second_process_compiles_nothing() -> None:
    if not kernels.available():
        pytest.skip(f"no compiled kernels here: {kernels.why_not()}")
    decode.prepare()
    code = (
        "import json\nfrom cellslide.geometry import label_kernels\n"
        "from cellslide.nuclei import gradient_kernels, hover_decode, watershed_kernels\nhover_decode.prepare()\n"
        "modules = (gradient_kernels, label_kernels, watershed_kernels)\n"
        "used = [f.stats for m in modules for f in vars(m).values() if hasattr(f, 'stats')]\n"
        "print(json.dumps([sum(sum(s.cache_hits.values()) for s in used),"
        " sum(sum(s.cache_misses.values()) for s in used)]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=os.environ, capture_output=True, text=True, check=True
    )
    hits, misses = json.loads(answer.stdout)
    assert hits >= 7 and misses == 0


def test_left_out_ends_with_its_block() -> None:
    before = kernels.available()
    with pytest.raises(KeyError), kernels.left_out():
        assert not kernels.available()
        raise KeyError
    assert kernels.available() == before


def test_of_several_workers_one_compiles_first(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def prepare() -> None:
        told.append("begin")
        time.sleep(0.03)
        told.append("end")

    monkeypatch.setattr(detect, "prepare", prepare)
    turn, prepared, together = threading.Lock(), threading.Event(), threading.Barrier(4)

    def start() -> None:
        together.wait()
        detect._prepare(turn, prepared)  # type: ignore[arg-type]

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One does it alone; then all of them, which is nothing to that one.
    assert told[:2] == ["begin", "end"] and len(told) == 2 * 5
    # So far on, the others do not wait for each other.
    assert told[2:4] == ["begin", "begin"]
