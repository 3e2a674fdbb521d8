"""Freed memory is kept for the next tile, in threads too, where the C library can be told."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from cellslide.inference.cpu_memory import share_freed_memory
from tests.conftest import CHECKOUT

CODE = """
import resource, threading
from cellslide.inference.cpu_memory import {names}
{calls}
import numpy as np

def fill():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        kept = [np.ones(1 << 21) for _ in range(12)]
        del kept
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=fill)
thread.start()
thread.join()
"""


def faults(*names: str) -> int:
    """Return how many pages the fourth of equal rounds of twelve arrays of 16 MiB fetches, in a thread."""
    code = CODE.format(names=", ".join(names), calls="\n".join(f"{name}()" for name in names))
    answer = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to do with freed memory")
def test_what_a_thread_frees_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)  # which a command run earlier has set
    assert faults("share_freed_memory", "keep_freed_memory") < 500 < faults("keep_freed_memory")
    assert faults("share_freed_memory", "keep_freed_blocks") < 500


def test_processes_that_are_started_share_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    share_freed_memory()
    assert os.environ["MALLOC_ARENA_MAX"] == "1"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    share_freed_memory()
    assert os.environ["MALLOC_ARENA_MAX"] == "4"  # whoever set it knows why
