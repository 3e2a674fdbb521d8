"""Work that ends its process: for the tests of devices. It imports little, so that a process starts quickly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellslide.errors import Interrupted, MissingDependencyError


@dataclass(frozen=True, slots=True)
class LightSource:
    """What is asked of a slide here."""

    slide_id: str


@dataclass(frozen=True, slots=True)
class Light:
    """What is asked of a target here."""

    source: LightSource


@dataclass(frozen=True, slots=True)
class Ended:
    """How such a slide ended."""

    slide: str
    status: str


@dataclass(frozen=True, slots=True)
class Hazard:
    """Ends its process on a slide called "killer", on "flaky" the first time; waits on "slow" until it is stopped."""

    folder: Path

    @contextmanager
    def open(self, device: str, processes: int) -> Iterator[Any]:
        """Give what does one slide."""
        if device == "cuda:9":
            raise MissingDependencyError("--device cuda:9: not on this machine")
        yield self.one

    def one(self, target: Light, progress: Any, stop: Any) -> Ended:
        """Do one slide."""
        name, mark = target.source.slide_id, self.folder / target.source.slide_id
        progress.begin(name, 3, 0)
        if name == "killer" or (name == "flaky" and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while name == "slow":
            mark.touch()
            if (code := stop()) is not None:
                raise Interrupted(code)
        progress.advance(5)
        progress.stage("write")
        return Ended(name, "done")
