"""Fixtures that all tests may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.browser import Chromium, started

CHECKOUT = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """Return the folder of shared data sets and fixtures, or None where this machine has none."""
    named = os.environ.get("CELLSLIDE_SHARED")
    folder = Path(named) if named else CHECKOUT.parent / "shared"
    return folder if (folder / "contract.md").is_file() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data sets and fixtures; tests that need it are skipped without it."""
    folder = shared_folder()
    if folder is None:
        pytest.skip(
            "no shared data here: set CELLSLIDE_SHARED to the folder, or put it at ../shared beside the checkout"
        )
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """Return a headless browser that reaches this machine alone; tests that need it are skipped without Chromium.

    One for each file of tests: its event loop, which tests of other files must not find, ends with it.
    """
    with started() as browser:
        yield browser


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach a model hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile the loops that most tests meet before the first test begins, so that its time limit does not hold it."""
    if not session.items or session.config.option.collectonly:
        return
    from cellslide.geometry.outlines import ring_features
    from cellslide.nuclei import hover_decode

    hover_decode.prepare()
    square = np.array([[0.0, 0.0], [9.0, 0.0], [9.0, 9.0], [0.0, 9.0], [0.0, 0.0]])
    ring_features(square, np.array([0, len(square)], np.int64), 1.0, 1.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where no CUDA device is, asking torch only when such a test was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
